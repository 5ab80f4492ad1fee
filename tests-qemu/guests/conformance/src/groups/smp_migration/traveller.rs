//! A nested guest that goes round the processors: VMCLEAR on one, VMPTRLD and VMLAUNCH on the next.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Release};

use shadow::FieldId;
use shadow::controls::Secondary;
use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::code;
use crate::cpu::{vmclear, vmptrld, vmptrst, vmread, vmwrite};
use crate::fault::Outcome;
use crate::memory::{Page, Table};
use crate::output::Suite;
use crate::smp::{Processors, count, number, wait_until};
use crate::vm::{Registers, Verdict, Vm, load_fresh};

/// Exits on each processor.
const STOPS: u64 = 3;

#[unsafe(link_section = ".shared")]
static REGION: Page = Page::new();

/// The nested guest's own memory, in which it counts too.
#[unsafe(link_section = ".shared")]
static LUGGAGE: Page = Page::new();

/// The nested guest's registers between two processors: RAX, and RBP, which points to [`LUGGAGE`].
#[unsafe(link_section = ".shared")]
static REGISTERS: Table<2> = Table::new();

/// The next hop.
#[unsafe(link_section = ".shared")]
static HOP: AtomicU64 = AtomicU64::new(0);

/// The value that a processor has read from each field.
#[unsafe(link_section = ".shared")]
static FOUND: Table<FIELD_COUNT> = Table::new();

/// Whether translations of the nested guest carry a VPID.
#[derive(Clone, Copy)]
enum Tag {
    None,
    Vpid(u16),
}

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    for (name, tag, hops) in [("round", Tag::None, 240), ("round-with-vpid", Tag::Vpid(5), 6000)] {
        depart(tag);
        let right: u64 = processors.run_on_all(go_round, hops).iter().sum();
        let counted = LUGGAGE.get(0);
        if right == hops && counted == hops * STOPS {
            suite.case(name, format_args!("{right} hops, {counted} exits"));
        } else {
            suite.case(name, format_args!("wrong: {right} hops, {counted} exits"));
        }
    }
    for number in processors.others() {
        depart(Tag::None);
        for (step, name) in (0..).zip(LAUNCH_STATE) {
            let outcome = Printed(processors.run_on(number, launch_state, step));
            suite.case(format_args!("launch-state-{number}-{name}"), outcome);
        }
        let is_right = processors.run_on(number, current, 0) == 1;
        suite.case(format_args!("current-{number}"), is_right);
        fields(suite, processors, number);
    }
}

/// Builds the nested guest on the first processor, and clears its VMCS.
fn depart(tag: Tag) {
    LUGGAGE.fill(0);
    HOP.store(0, Release);
    let mut vm = Vm::at(&REGION, code!("2: inc rax", "mov [rbp], rax", "cpuid", "jmp 2b"));
    match tag {
        Tag::None => _ = vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VPID),
        Tag::Vpid(vpid) => _ = vm.set(VPID, vpid),
    }
    REGISTERS.set(0, 0);
    REGISTERS.set(1, LUGGAGE.address());
    let _ = vmclear(REGION.address());
}

/// Makes the hops that fall to this processor. Returns how many went well.
fn go_round(hops: u64) -> u64 {
    let mut right = 0;
    for hop in (number() as u64..hops).step_by(count()) {
        if !wait_until(|| HOP.load(Acquire) == hop) {
            break;
        }
        right += u64::from(host_the_guest(hop));
        HOP.store(hop + 1, Release);
    }
    right
}

/// Lets the nested guest run for some exits. Returns whether it continued where it was.
fn host_the_guest(hop: u64) -> bool {
    let registers = Registers { rax: REGISTERS.get(0), rbp: REGISTERS.get(1), ..Registers::default() };
    let mut vm = Vm::moved_here(&REGION, registers);
    let mut is_right = true;
    for stop in 1..=STOPS {
        is_right &= vm.run_again().is(ExitReason::CPUID);
        let counted = hop * STOPS + stop;
        is_right &= (vm.registers.rax, LUGGAGE.get(0)) == (counted, counted);
        vm.set(GUEST_RIP, vm.get(GUEST_RIP) + 2);
    }
    REGISTERS.set(0, vm.registers.rax);
    is_right & (vmclear(REGION.address()) == Outcome::Success)
}

/// An outcome that is passed between processors: a VM-instruction error, or another number with a text.
struct Printed(u64);

const ENTERED: u64 = 1 << 32;
const OTHER: u64 = 2 << 32;

impl core::fmt::Display for Printed {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            value if value & ENTERED != 0 => write!(f, "exit={:#x}", value as u32),
            OTHER => f.write_str("wrong: neither entered nor VMfailValid"),
            error => write!(f, "fail-{error}"),
        }
    }
}

const LAUNCH_STATE: [&str; 6] =
    ["resume-clear", "launch", "launch-again", "resume", "resume-after-vmclear", "launch-after-vmclear"];

/// Steps of one program: VMLAUNCH needs a clear VMCS, VMRESUME a launched one, whichever processor launched it.
fn launch_state(step: u64) -> u64 {
    let mut vm = Vm::moved_here(&REGION, Registers { rbp: LUGGAGE.address(), ..Registers::default() });
    if step == 4 {
        let _ = vmclear(REGION.address());
        let _ = vmptrld(REGION.address());
    }
    let verdict = match step {
        0 | 3 | 4 => vm.launched().run(),
        _ => vm.run(),
    };
    match verdict {
        Verdict::Exited(exit) => ENTERED | exit.reason,
        Verdict::NotEntered(Outcome::FailValid(error)) => error,
        Verdict::NotEntered(_) => OTHER,
    }
}

/// Each processor has a current VMCS of its own.
fn current(_: u64) -> u64 {
    let _ = vmclear(REGION.address());
    let none = vmptrst().1;
    let _ = vmptrld(REGION.address());
    let own = vmptrst().1;
    let _ = vmclear(REGION.address());
    u64::from((none, own) == (u64::MAX, REGION.address()))
}

/// Every field keeps its value: it is written on one processor and read on another.
fn fields(suite: &mut Suite, processors: &Processors, number: usize) {
    load_fresh(&REGION);
    let _ = write_fields(1);
    let lost_there = processors.run_on(number, read_fields, 0);
    let _ = processors.run_on(number, write_fields, 2);
    let lost_here = read_fields(0);
    let verdict = if lost_there + lost_here == 0 { "kept" } else { "wrong: lost" };
    suite.case(format_args!("fields-{number}"), verdict);
}

/// The value of every field; all ones if the field does not exist.
fn contents() -> impl Iterator<Item = (usize, u64)> {
    FieldId::all().enumerate().map(|(index, id)| (index, vmread(id.encoding().0.into()).unwrap_or(u64::MAX)))
}

/// Writes a value into every field, and notes the value that the field then holds.
fn write_fields(salt: u64) -> u64 {
    let _ = vmptrld(REGION.address());
    for (index, id) in (1..).zip(FieldId::all()) {
        let _ = vmwrite(id.encoding().0.into(), (salt * index).wrapping_mul(0x0107_0305_0b0d_1113));
    }
    contents().for_each(|(index, value)| FOUND.set(index, value));
    let _ = vmclear(REGION.address());
    0
}

/// The number of fields that do not hold the noted value.
fn read_fields(_: u64) -> u64 {
    let _ = vmptrld(REGION.address());
    let lost = contents().filter(|&(index, value)| value != FOUND.get(index)).count();
    let _ = vmclear(REGION.address());
    lost as u64
}
