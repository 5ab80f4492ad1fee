//! INIT and SIPI from another processor: outside VMX operation, in VMX root operation, where VMX blocks INIT, and in
//! VMX non-root operation, where both are VM exits (SDM 10.4 "Multiple-Processor (MP) Initialization", 24.8
//! "Restrictions on VMX Operation", 26.2 "Other Causes of VM Exits", 28.2.1 "Basic VM-Exit Information").

use core::fmt;

use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::apic::{self, Message};
use crate::code;
use crate::cpu::vmxoff;
use crate::fault::take_interrupt;
use crate::memory::Table;
use crate::output::Suite;
use crate::smp::{Processors, TAKEN, enter_vmx, leave_vmx, settle, wait_until};
use crate::vm::{Verdict, Vm};

/// INITs to a processor that enters and exits in a loop.
const STORM: u64 = 5000;
/// Starts of one processor, one after the other.
const RESTARTS: u32 = 50;
const NMI: u8 = 2;
const VECTOR: u8 = 0x61;

const HLT: u32 = 1;
const SHUTDOWN: u32 = 2;
const WAIT_FOR_SIPI: u32 = 3;

/// Messages between the tested processor and the first one.
#[unsafe(link_section = ".shared")]
static TOLD: Table<3> = Table::new();
/// The word that the processor increments as long as it runs.
const HEARTBEAT: usize = 0;
/// Not 0: the processor is ready for the message.
const READY: usize = 1;
/// Not 0: the processor shall continue with the next step.
const GO_ON: usize = 2;

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    for number in processors.others() {
        outside(suite, processors, number);
        in_root_operation(suite, processors, number);
        in_nested_guests(suite, processors, number);
        waiting_for_sipi(suite, processors, number);
        storm(suite, processors, number);
        restarts(suite, processors, number);
    }
}

/// Lets a processor begin work that lasts until the first processor ends it.
fn begin(processors: &Processors, number: usize, work: fn(u64) -> u64, argument: u64) {
    TOLD.fill(0);
    processors.begin(number, work, argument);
    assert!(wait_until(|| TOLD.get(READY) != 0), "processor {number} is not ready");
    settle();
}

/// Whether the processor still runs.
struct Runs(bool);

impl Runs {
    fn now() -> Self {
        settle();
        let before = TOLD.get(HEARTBEAT);
        settle();
        Self(TOLD.get(HEARTBEAT) != before)
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 { "runs" } else { "is stopped" })
    }
}

/// Runs until a message stops the processor or the first processor says so.
fn beat() {
    TOLD.set(READY, 1);
    while TOLD.get(GO_ON) == 0 {
        TOLD.set(HEARTBEAT, TOLD.get(HEARTBEAT) + 1);
    }
    TOLD.set(GO_ON, 0);
}

/// Work: leaves VMX operation, and runs.
fn run_outside(_: u64) -> u64 {
    let _ = vmxoff();
    beat();
    0
}

/// Work: runs in VMX root operation, then for ever outside VMX operation.
fn run_in_root_operation(_: u64) -> u64 {
    beat();
    let _ = vmxoff();
    beat();
    0
}

fn outside(suite: &mut Suite, processors: &Processors, number: usize) {
    let mut step = |name, processors: &Processors| {
        let starts = processors.starts(number);
        suite.case(format_args!("{number}-outside-{name}"), format_args!("{} starts={starts}", Runs::now()));
    };
    begin(processors, number, run_outside, 0);
    step("running", processors);
    processors.send_start_up(number);
    step("sipi-while-running", processors);
    apic::send(number, Message::Init);
    step("init", processors);
    apic::send(number, Message::Init);
    step("init-while-waiting", processors);
    apic::send(number, Message::Nmi);
    apic::send(number, Message::Interrupt(VECTOR));
    step("nmi-and-interrupt-while-waiting", processors);
    processors.start_stopped(number);
    step("sipi", processors);
    processors.send_start_up(number);
    step("second-sipi", processors);
    let state = processors.run_on(number, enter_vmx, 0);
    suite.case(format_args!("{number}-outside-vmxon-after-init"), state);
}

fn in_root_operation(suite: &mut Suite, processors: &Processors, number: usize) {
    let mut step = |name| suite.case(format_args!("{number}-root-{name}"), Runs::now());
    begin(processors, number, run_in_root_operation, 0);
    step("running");
    processors.send_start_up(number);
    step("sipi");
    apic::send(number, Message::Init);
    step("init");
    processors.send_start_up(number);
    step("sipi-after-init");
    TOLD.set(GO_ON, 1);
    step("vmxoff");
    processors.start_stopped(number);
    let state = processors.run_on(number, enter_vmx, 0);
    suite.case(format_args!("{number}-root-vmxon-after-init"), state);
}

/// The activity states in which the message meets a nested guest.
const STATES: [(&str, u32); 3] = [("active", 0), ("hlt", HLT), ("shutdown", SHUTDOWN)];

/// Work: runs a nested guest in this activity state until an exit. Returns the reason, activity state and
/// qualification.
fn nested_guest(activity: u64) -> u64 {
    let mut vm = Vm::new(code!("2: inc qword ptr [rbp]", "jmp 2b"));
    vm.registers.rbp = TOLD.address() + HEARTBEAT as u64 * 8;
    vm.set(GUEST_ACTIVITY_STATE, activity as u32);
    TOLD.set(READY, 1);
    let verdict = vm.run();
    // Takes an interrupt that the exit left pending.
    let _ = take_interrupt();
    summary(&vm, verdict)
}

fn summary(vm: &Vm, verdict: Verdict) -> u64 {
    let Verdict::Exited(exit) = verdict else { return u64::MAX };
    u64::from(exit.reason as u16) | u64::from(vm.get(GUEST_ACTIVITY_STATE)) << 16 | exit.qualification << 32
}

/// A [`summary`].
struct Summary(u64);

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == u64::MAX {
            return f.write_str("no entry");
        }
        write!(f, "exit={:#x} activity={} q={:#x}", self.0 as u16, self.0 >> 16 & 0xffff, self.0 >> 32)
    }
}

fn in_nested_guests(suite: &mut Suite, processors: &Processors, number: usize) {
    for (name, activity) in STATES {
        begin(processors, number, nested_guest, activity.into());
        // The first entry may take long.
        let has_begun = activity != 0 || wait_until(|| TOLD.get(HEARTBEAT) != 0);
        assert!(has_begun, "the nested guest does not run");
        processors.send_start_up(number);
        let runs = Runs::now();
        suite.case(format_args!("{number}-nested-{name}-sipi"), format_args!("{runs}"));
        apic::send(number, Message::Init);
        suite.case(format_args!("{number}-nested-{name}-init"), Summary(processors.finish(number)));
    }
    // An INIT that VMX root operation has blocked: the next entry exits at once, and the one after it does not.
    begin(processors, number, enter_after_beat, 0);
    apic::send(number, Message::Init);
    settle();
    TOLD.set(GO_ON, 1);
    suite.case(format_args!("{number}-nested-blocked-init"), Summary(processors.finish(number)));
    suite.case(format_args!("{number}-nested-after-init"), Summary(processors.run_on(number, enter_once, 0)));
}

/// Work: runs in VMX root operation, then enters.
fn enter_after_beat(_: u64) -> u64 {
    beat();
    enter_once(0)
}

/// Work: enters a nested guest that exits by itself.
fn enter_once(_: u64) -> u64 {
    let mut vm = Vm::new(code!("nop"));
    let verdict = vm.run();
    summary(&vm, verdict)
}

/// The messages before the SIPI.
const MESSAGES: [(&str, &[Message]); 5] = [
    ("at-once", &[]),
    ("init", &[Message::Init]),
    ("nmi", &[Message::Nmi]),
    ("interrupt", &[Message::Interrupt(VECTOR)]),
    ("both", &[Message::Nmi, Message::Interrupt(VECTOR)]),
];

fn waiting_for_sipi(suite: &mut Suite, processors: &Processors, number: usize) {
    for (name, messages) in MESSAGES {
        for page in [0, 0x9a, 0xff] {
            begin(processors, number, nested_guest, WAIT_FOR_SIPI.into());
            let taken = || [NMI, VECTOR].map(|vector| TAKEN.by(number, vector));
            let before = taken();
            for &message in messages {
                apic::send(number, message);
            }
            let runs = Runs::now();
            let while_waiting = taken() != before;
            apic::send(number, Message::StartUp(page));
            let summary = Summary(processors.finish(number));
            let [nmis, interrupts] = taken();
            suite.case(
                format_args!("{number}-wait-for-sipi-{name}-{page:#x}"),
                format_args!(
                    "{runs}, early={while_waiting} {summary} then nmis={} interrupts={}",
                    nmis - before[0],
                    interrupts - before[1]
                ),
            );
            // The INIT was blocked by the wait-for-SIPI state, or is still pending: the next entry shows which.
            if !messages.is_empty() {
                let next = Summary(processors.run_on(number, enter_once, 0));
                suite.case(format_args!("{number}-wait-for-sipi-{name}-{page:#x}-next-entry"), next);
            }
        }
    }
}

/// Each INIT causes one exit, wherever it meets the processor: in the nested guest, during an exit, or in the host.
fn storm(suite: &mut Suite, processors: &Processors, number: usize) {
    begin(processors, number, count_inits, 0);
    let mut answered = 0;
    for sent in 1..=STORM {
        apic::send(number, Message::Init);
        if !wait_until(|| TOLD.get(HEARTBEAT) >= sent) {
            break;
        }
        answered = sent;
        for _ in 0..sent % 11 {
            core::hint::spin_loop();
        }
    }
    TOLD.set(GO_ON, 1);
    let other_exits = processors.finish(number);
    let counted = TOLD.get(HEARTBEAT);
    let verdict = if (answered, counted, other_exits) == (STORM, STORM, 0) { "" } else { "wrong: " };
    suite.case(format_args!("{number}-storm"), format_args!("{verdict}{answered} sent, {counted} exits"));
}

/// Work: counts the exits of a nested guest for INIT. Returns the number of other exits than those for CPUID.
fn count_inits(_: u64) -> u64 {
    let mut vm = Vm::new(code!("2: mov ecx, 5", "3: loop 3b", "cpuid", "jmp 2b"));
    let mut others = 0;
    TOLD.set(READY, 1);
    while TOLD.get(GO_ON) == 0 {
        let Verdict::Exited(exit) = vm.run_again() else { return u64::MAX };
        match ExitReason(exit.reason as u32) {
            ExitReason::INIT => TOLD.set(HEARTBEAT, TOLD.get(HEARTBEAT) + 1),
            ExitReason::CPUID => _ = vm.set(GUEST_RIP, exit.rip + 2),
            ExitReason::PREEMPTION_TIMER => _ = vm.set(PREEMPTION_TIMER_VALUE, u32::MAX),
            _ => others += 1,
        }
    }
    others
}

/// A processor that starts again and again works each time.
fn restarts(suite: &mut Suite, processors: &Processors, number: usize) {
    let before = processors.starts(number);
    let mut right = 0;
    for _ in 0..RESTARTS {
        let _ = processors.run_on(number, leave_vmx, 0);
        processors.restart(number);
        let entered = processors.run_on(number, enter_vmx, 0) == 1;
        let exit = processors.run_on(number, enter_once, 0);
        right += u32::from(entered && exit as u16 == ExitReason::VMCALL.0 as u16);
    }
    let starts = processors.starts(number) - before;
    let verdict = if (right, starts) == (RESTARTS, RESTARTS) { "" } else { "wrong: " };
    suite.case(format_args!("{number}-restarts"), format_args!("{verdict}{starts} starts, {right} right"));
}
