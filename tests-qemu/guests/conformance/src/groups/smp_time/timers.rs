//! The TSC-deadline timer of each processor's local APIC, and the preemption timer of each nested guest, all at once.

use core::arch::asm;

use shadow::controls::{ExitControls, Pin};
use shadow::exit::ExitReason;
use shadow::fields::*;

use super::{IA32_TSC_ADJUST, tsc};
use crate::apic;
use crate::code;
use crate::cpu::{invept, rdmsr, wrmsr};
use crate::fault::take_interrupt;
use crate::output::Suite;
use crate::smp::{Meeting, Processors, TAKEN, Work, number};
use crate::vm::Vm;

const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_VMX_MISC: u32 = 0x485;
const VECTOR: u8 = 0x71;
/// Interrupts or expiries of each processor in each case.
const ROUNDS: u64 = 300;
/// Rounds in cases in which each one costs many exits to the host.
const COSTLY_ROUNDS: u64 = 30;
/// The least ticks until a deadline. The actual number varies above that.
const DISTANCE: u64 = 3000;
/// The most ticks by which a machine may be late.
const SLACK: u64 = 20_000_000;
/// The preemption timer's value.
const VALUE: u32 = 1000;

#[unsafe(link_section = ".shared")]
static READY: Meeting = Meeting::new();

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    let cases: [(&str, Work, u64); 7] = [
        ("deadline-host", deadline_in_host, ROUNDS),
        ("deadline-host-own-tsc", deadline_with_own_tsc, ROUNDS),
        ("deadline-host-halted", deadline_in_halted_host, ROUNDS),
        ("deadline-nested", deadline_in_nested_guest, ROUNDS),
        ("preemption-timer", preemption_timer, ROUNDS),
        ("preemption-timer-saved", saved_preemption_timer, ROUNDS),
        ("preemption-timer-first-touches", preemption_timer_while_touching, COSTLY_ROUNDS),
    ];
    for (name, work, rounds) in cases {
        READY.clear();
        let expired = processors.run_on_all(work, 0);
        let expired = &expired[..processors.count()];
        let verdict = if expired.iter().all(|&count| count == rounds) { "" } else { "wrong: " };
        suite.case(name, format_args!("{verdict}{expired:?}"));
    }
}

/// The deadline of each round: not at the same time on all processors.
fn deadline(round: u64) -> u64 {
    tsc() + DISTANCE + (round * 37 + number() as u64 * 101) % 997
}

/// Arms the timer for each round, and counts the rounds with exactly one interrupt that is not too early.
fn count_deadlines(mut wait: impl FnMut(u64)) -> u64 {
    apic::enable_deadline_timer(VECTOR);
    READY.join();
    let mut right = 0;
    for round in 0..ROUNDS {
        let (taken, deadline) = (TAKEN.by(number(), VECTOR), deadline(round));
        let _ = wrmsr(IA32_TSC_DEADLINE, deadline);
        wait(deadline);
        let is_late_enough = tsc() >= deadline;
        let _ = take_interrupt();
        let is_disarmed = rdmsr(IA32_TSC_DEADLINE) == Ok(0);
        right += u64::from(is_late_enough && is_disarmed && TAKEN.by(number(), VECTOR) == taken + 1);
    }
    apic::disable_timer();
    right
}

fn deadline_in_host(_: u64) -> u64 {
    count_deadlines(|deadline| {
        let taken = TAKEN.by(number(), VECTOR);
        while TAKEN.by(number(), VECTOR) == taken && tsc() < deadline + SLACK {
            let _ = take_interrupt();
        }
    })
}

/// Every processor's TSC has another value: deadlines are values of the processor's own.
fn deadline_with_own_tsc(_: u64) -> u64 {
    let _ = wrmsr(IA32_TSC_ADJUST, (number() as u64 + 1) << 40);
    let right = deadline_in_host(0);
    let _ = wrmsr(IA32_TSC_ADJUST, 0);
    right
}

fn deadline_in_halted_host(_: u64) -> u64 {
    count_deadlines(|_| {
        let taken = TAKEN.by(number(), VECTOR);
        while TAKEN.by(number(), VECTOR) == taken {
            // SAFETY: interrupts are only counted; one that comes before HLT ends it.
            unsafe { asm!("sti", "hlt", "cli") };
        }
    })
}

/// The interrupt causes an exit, and is still pending afterwards.
fn deadline_in_nested_guest(_: u64) -> u64 {
    let mut vm = Vm::new(code!("2: jmp 2b"));
    vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING);
    count_deadlines(|_| {
        let _ = vm.run_again();
    })
}

/// The ticks of the TSC for one tick of the timer, as a shift (SDM A.6 "Miscellaneous Data").
fn rate() -> u64 {
    rdmsr(IA32_VMX_MISC).unwrap_or(0) & 0x1f
}

/// Runs the nested guest until its timer has expired. Returns whether that was neither too early nor much too late.
fn expires_in_time(vm: &mut Vm, mut other_exit: impl FnMut(&mut Vm) -> bool) -> bool {
    vm.set(PREEMPTION_TIMER_VALUE, VALUE);
    let before = tsc();
    while !vm.run_again().is(ExitReason::PREEMPTION_TIMER) {
        if !other_exit(vm) {
            return false;
        }
    }
    let ticks = tsc() - before;
    // The timer's first tick may be shorter, as it has begun already when the timer starts.
    ticks >= u64::from(VALUE - 1) << rate() && ticks <= (u64::from(VALUE) << rate()) + SLACK
}

fn preemption_timer(_: u64) -> u64 {
    let mut vm = Vm::new(code!("2: jmp 2b"));
    READY.join();
    (0..ROUNDS).filter(|_| expires_in_time(&mut vm, |_| false)).count() as u64
}

/// Other exits save the remaining count, and the next entry continues with it. The nested guest runs for longer than a
/// turn of the emulator, within which no time passes.
fn saved_preemption_timer(_: u64) -> u64 {
    let mut vm = Vm::new(code!("2: mov ecx, 1000", "3: loop 3b", "cpuid", "jmp 2b"));
    vm.or(EXIT_CONTROLS, ExitControls::SAVE_PREEMPTION_TIMER);
    READY.join();
    let is_right = |_: &u64| {
        let mut left = VALUE;
        expires_in_time(&mut vm, |vm| {
            vm.set(GUEST_RIP, vm.get(GUEST_RIP) + 2);
            let is_less = vm.get(PREEMPTION_TIMER_VALUE) <= left;
            left = vm.get(PREEMPTION_TIMER_VALUE);
            is_less
        })
    };
    (0..ROUNDS).filter(is_right).count() as u64
}

/// The nested guest reads one page of 2 MiB after the other of an EPT12 that has not been walked since INVEPT. Exits
/// that the host handles must not restart the timer.
fn preemption_timer_while_touching(_: u64) -> u64 {
    let mut vm = Vm::new(code!("2: mov rdx, [rax]", "add rax, 0x200000", "and eax, 0x3fffffff", "jmp 2b"));
    READY.join();
    let is_right = |_: &u64| {
        let _ = invept(2, [0; 2]);
        expires_in_time(&mut vm, |_| false)
    };
    (0..COSTLY_ROUNDS).filter(is_right).count() as u64
}
