//! Time on several processors: one TSC, seen by guest hypervisors and nested guests; the TSC-deadline and the
//! preemption timer of each (SDM 12.5.4.1 "TSC-Deadline Mode", 19.17 "Time-Stamp Counter", 26.5.1 "VMX-Preemption
//! Timer", 26.3 "Changes to Instruction Behavior in VMX Non-Root Operation"). No result depends on speed: a value lies
//! between two others, or it does not.

mod timers;

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Release};

use shadow::controls::{Primary, Secondary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::code;
use crate::cpu::{rdmsr, wrmsr};
use crate::memory::Table;
use crate::output::Suite;
use crate::smp::{Processors, Work, count, number, wait_until};
use crate::vm::Vm;

/// Moves of the token from one processor to the next, in each case.
const HOPS: u64 = 1000;
const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;

/// Whose turn it is.
#[unsafe(link_section = ".shared")]
static HOP: AtomicU64 = AtomicU64::new(0);
/// The last value that a host has read.
#[unsafe(link_section = ".shared")]
static LAST: Table<1> = Table::new();

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    clocks(suite, processors);
    timers::run(suite, processors);
    // The timers' interrupts and exits must have no effect on the clock.
    clock(suite, processors, "after-load", 0, 0);
    writes(suite, processors);
}

/// How a nested guest's TSC differs from its hypervisor's: "use TSC offsetting", "use TSC scaling".
const CLOCKS: [(&str, u64, Option<u64>); 6] = [
    ("same", 0, None),
    ("ahead", 1 << 50, None),
    ("behind", (1_u64 << 20).wrapping_neg(), None),
    ("half", 0, Some(1 << 47)),
    ("five-thirds-ahead", 1 << 40, Some((1 << 48) / 3 * 5)),
    ("tenth-behind", (1_u64 << 10).wrapping_neg(), Some((1 << 48) / 10)),
];

/// The ways to read the TSC: into EDX:EAX, followed by VMCALL.
fn reads() -> [(&'static str, u64); 3] {
    [("rdtsc", code!("rdtsc")), ("rdtscp", code!("rdtscp")), ("rdmsr", code!("mov ecx, 0x10", "rdmsr"))]
}

fn clocks(suite: &mut Suite, processors: &Processors) {
    for (index, (name, ..)) in CLOCKS.iter().enumerate() {
        for (way, (instruction, _)) in reads().iter().enumerate() {
            clock(suite, processors, format_args!("{name}-{instruction}"), index, way);
        }
    }
}

/// Passes the token round. The processor that has it reads the TSC as host, as nested guest, and as host again.
fn clock(suite: &mut Suite, processors: &Processors, name: impl core::fmt::Display, clock: usize, way: usize) {
    LAST.set(0, 0);
    HOP.store(0, Release);
    let right: u64 = processors.run_on_all(go_round, (clock * 10 + way) as u64).iter().sum();
    let verdict = if right == HOPS { "" } else { "wrong: " };
    suite.case(name, format_args!("{verdict}{right} in order"));
}

/// Makes the hops that fall to this processor. Returns how many found the values in order.
fn go_round(case: u64) -> u64 {
    let (_, offset, multiplier) = CLOCKS[case as usize / 10];
    let (_, code) = reads()[case as usize % 10];
    let mut vm = Vm::new(code);
    if offset != 0 || multiplier.is_some() {
        vm.or(PRIMARY_CONTROLS, Primary::USE_TSC_OFFSETTING).set(TSC_OFFSET, offset);
    }
    if let Some(multiplier) = multiplier {
        vm.or(SECONDARY_CONTROLS, Secondary::USE_TSC_SCALING).set(TSC_MULTIPLIER, multiplier);
    }
    let nested = |tsc: u64| {
        let scaled = (u128::from(tsc) * u128::from(multiplier.unwrap_or(1 << 48))) >> 48;
        (scaled as u64).wrapping_add(offset)
    };
    let mut right = 0;
    for hop in (number() as u64..HOPS).step_by(count()) {
        if !wait_until(|| HOP.load(Acquire) == hop) {
            break;
        }
        let before = tsc();
        let has_exited = vm.rerun().is(ExitReason::VMCALL);
        let after = tsc();
        let read = vm.registers.rdx << 32 | vm.registers.rax & 0xffff_ffff;
        // The nested guest's value may have wrapped; the differences have not.
        let is_between = read.wrapping_sub(nested(before)) <= nested(after).wrapping_sub(nested(before));
        right += u64::from(has_exited && before >= LAST.get(0) && is_between);
        LAST.set(0, after);
        HOP.store(hop + 1, Release);
    }
    right
}

fn tsc() -> u64 {
    // SAFETY: RDTSC has no effect but the read.
    unsafe { _rdtsc() }
}

/// A write of IA32_TSC or IA32_TSC_ADJUST changes the TSC of one processor, and of its nested guests.
fn writes(suite: &mut Suite, processors: &Processors) {
    for number in processors.others() {
        for (name, work) in [("tsc", write_tsc as Work), ("tsc-adjust", write_adjust)] {
            let shifted =
                [processors.run_on(number, work, SHIFT), nested_tsc(0), processors.run_on(number, nested_tsc, 0)];
            let shifted = shifted.map(|tsc| tsc >= SHIFT);
            let restored = processors.run_on(number, write_adjust, 0) < SHIFT;
            suite.case(format_args!("write-{number}-{name}"), format_args!("shifted={shifted:?} restored={restored}"));
        }
    }
    clock(suite, processors, "after-writes", 0, 0);
}

/// More ticks than any run takes.
const SHIFT: u64 = 1 << 52;

/// Work: the TSC after a write of `shift` to it.
fn write_tsc(shift: u64) -> u64 {
    let _ = wrmsr(IA32_TSC, shift);
    tsc()
}

/// Work: the TSC after a write of `shift` to IA32_TSC_ADJUST.
fn write_adjust(shift: u64) -> u64 {
    let _ = wrmsr(IA32_TSC_ADJUST, shift);
    rdmsr(IA32_TSC).unwrap_or(0)
}

/// Work: the TSC that a nested guest reads.
fn nested_tsc(_: u64) -> u64 {
    let mut vm = Vm::new(code!("rdtsc"));
    let _ = vm.run();
    vm.registers.rdx << 32 | vm.registers.rax & 0xffff_ffff
}
