//! Posted interrupts (SDM 30.6 "Posted-Interrupt Processing"): other processors set a bit of the descriptor, and send a
//! notification unless one is outstanding. The nested guest counts its interrupts, ends them at its virtual APIC, and
//! sends some to itself (30.1.5 "Self-IPI Virtualization").

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire};

use shadow::controls::{ExitControls, Pin, Primary, Secondary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use super::traffic::{self, Traffic};
use super::{HANDLED, READY, SENT, counting_handlers, end_virtual};
use crate::apic::{self, Message};
use crate::code;
use crate::fault::{fill_idt, take_interrupt};
use crate::memory::{GUEST_IDT, nested_handlers};
use crate::output::Suite;
use crate::smp::{MAX, Processors, TAKEN, number};
use crate::vm::{Verdict, Vm};

/// The vector of notifications.
const NOTIFICATION: u8 = 0xe2;
/// The vector that nested guests send to themselves. Their program contains it as well.
const TO_ITSELF: u8 = 0xd3;
/// A halted nested guest notices the end of the case at the next exit for the timer.
const TIMER: u32 = 20_000;

/// A posted-interrupt descriptor (SDM table 30-1): requests, then flags.
#[repr(align(64))]
struct Descriptor([AtomicU64; 8]);

/// "Outstanding notification", in the word after the requests.
const FLAGS: usize = 4;
const OUTSTANDING: u64 = 1;

#[unsafe(link_section = ".shared")]
static DESCRIPTORS: [Descriptor; MAX] = [const { Descriptor([const { AtomicU64::new(0) }; 8]) }; MAX];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    /// Switches RFLAGS.IF on and off, executes CPUID, and sends interrupts to itself.
    Busy,
    /// Halted.
    Halts,
}

/// The host's state when a notification arrives while the host runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Host {
    /// Interrupts are disabled: the notification waits for the next entry.
    Waits,
    /// Interrupts are enabled: the host takes the notification, and sends itself another before the entry.
    Takes,
}

const CASES: &[(&str, Program, Host)] = &[
    ("posted", Program::Busy, Host::Waits),
    ("posted-halted", Program::Halts, Host::Waits),
    ("posted-host-takes", Program::Busy, Host::Takes),
    ("posted-host-takes-halted", Program::Halts, Host::Takes),
];

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors, is_wanted: impl Fn(&str) -> bool) {
    for (index, &(name, ..)) in CASES.iter().enumerate().filter(|(_, case)| is_wanted(case.0)) {
        for vector in traffic::vectors().chain([TO_ITSELF]) {
            HANDLED.forget(vector);
        }
        READY.clear();
        SENT.clear();
        let defects = processors.run_on_all(take_part, index as u64);
        let total = traffic::total(&HANDLED);
        if traffic::is_right(&HANDLED) && defects.iter().all(|&defect| defect == 0) {
            suite.case(name, format_args!("{total} posted, {total} counted"));
        } else {
            suite.case(name, format_args!("wrong: {total} counted, defects {defects:x?}"));
        }
    }
}

/// Sets the bit of a vector, and sends a notification unless one is outstanding.
fn post(receiver: usize, vector: u8) {
    let descriptor = &DESCRIPTORS[receiver].0;
    descriptor[usize::from(vector / 64)].fetch_or(1 << (vector % 64), AcqRel);
    if descriptor[FLAGS].fetch_or(OUTSTANDING, AcqRel) & OUTSTANDING == 0 {
        apic::send(receiver, Message::Interrupt(NOTIFICATION));
    }
}

fn take_part(index: u64) -> u64 {
    let (_, program, host) = CASES[index as usize];
    let mut traffic = Traffic::new(&HANDLED, post);
    let mut vm = nested_guest(program);
    let (mut is_over, mut defect) = (false, 0);
    READY.join();
    while !SENT.is_complete() {
        traffic.send();
        if !is_over && (defect != 0 || traffic.is_over()) {
            is_over = true;
            SENT.arrive();
        }
        if defect == 0 {
            if host == Host::Takes {
                take_notification();
            }
            defect = round(&mut vm).err().unwrap_or(0);
        }
    }
    fill_idt(&GUEST_IDT, nested_handlers(), 8);
    let sent_to_itself = vm.registers.rbx;
    let handled = HANDLED.by(number(), TO_ITSELF);
    // The last interrupt may be counted as handled before it is counted as sent.
    let is_right = handled.wrapping_sub(sent_to_itself) <= 1 && (sent_to_itself > 0 || program == Program::Halts);
    if defect == 0 && !is_right { 1 } else { defect }
}

/// Takes pending interrupts, and sends a notification that the nested guest did not get again.
fn take_notification() {
    let taken = TAKEN.by(number(), NOTIFICATION);
    let _ = take_interrupt();
    let is_outstanding = DESCRIPTORS[number()].0[FLAGS].load(Acquire) & OUTSTANDING != 0;
    if TAKEN.by(number(), NOTIFICATION) != taken && is_outstanding {
        apic::interrupt_self(NOTIFICATION);
    }
}

fn nested_guest(program: Program) -> Vm {
    let mut vm = Vm::new(match program {
        Program::Busy => code!(
            "2: cli",
            "mov ecx, 7",
            "3: loop 3b",
            "sti",
            "mov ecx, 5",
            "4: loop 4b",
            "mov ecx, 0x83f",
            "mov eax, 0xd3",
            "xor edx, edx",
            "wrmsr",
            "inc rbx",
            "cpuid",
            "jmp 2b"
        ),
        Program::Halts => code!("2: sti", "hlt", "jmp 2b"),
    });
    vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING | Pin::PROCESS_POSTED_INTERRUPTS);
    vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
    let secondary = Secondary::VIRTUALIZE_X2APIC_MODE
        | Secondary::APIC_REGISTER_VIRTUALIZATION
        | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
    vm.or(SECONDARY_CONTROLS, secondary);
    vm.or(EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT);
    let descriptor = &DESCRIPTORS[number()];
    vm.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, (&raw const *descriptor).addr() as u64);
    vm.set(POSTED_INTERRUPT_NOTIFICATION_VECTOR, NOTIFICATION.into());
    (vm.registers.rbp, vm.registers.rdi) = (HANDLED.row(number()), (&raw const end_virtual).addr() as u64);
    fill_idt(&GUEST_IDT, (&raw const counting_handlers).addr() as u64, 16);
    vm
}

/// Makes one entry. The error is the reason of an exit that should not happen; a notification may cause an exit.
fn round(vm: &mut Vm) -> Result<(), u64> {
    vm.set(PREEMPTION_TIMER_VALUE, TIMER);
    let Verdict::Exited(exit) = vm.run_again() else { return Err(u64::MAX) };
    match ExitReason(exit.reason as u32) {
        ExitReason::CPUID => _ = vm.set(GUEST_RIP, exit.rip + 2),
        ExitReason::PREEMPTION_TIMER => (),
        _ => return Err(exit.reason | 1 << 32),
    }
    Ok(())
}
