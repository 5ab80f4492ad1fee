//! NMIs: each processor sends them to the next one. It sends an NMI only when the last one has been counted, as NMIs
//! merge (SDM 7.7 "Nonmaskable Interrupt (NMI)", 26.2 "Other Causes of VM Exits", 27.7.6 "NMI-Window Exiting").

use shadow::controls::{Pin, Primary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use super::{HANDLED, READY, SENT, counting_handlers, end_injected};
use crate::apic::{self, Message};
use crate::code;
use crate::fault::{fill_idt, unblock_nmis};
use crate::memory::{GUEST_IDT, nested_handlers};
use crate::output::Suite;
use crate::smp::{Counters, Processors, TAKEN, count, number};
use crate::vm::{Verdict, Vm};

/// The vector of NMIs.
const NMI: u8 = 2;
/// The number of NMIs that each processor sends.
const QUOTA: u64 = 5000;
/// Rounds without an answer after which an NMI counts as lost.
const PATIENCE: u64 = 2_000_000;
/// A halted nested guest notices the end of the case at the next exit for the timer.
const TIMER: u32 = 20_000;
const BLOCKED_BY_NMI: u32 = 8;
const BLOCKED_BY_STI_OR_MOV_SS: u32 = 3;
const INJECTED_NMI: u32 = 0x8000_0202;
/// The interruption information of an exit caused by an NMI, without "NMI unblocking due to IRET".
const EXIT_BY_NMI: u32 = 0x8000_0202;

/// What happens to an NMI.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// There is no nested guest.
    Host,
    /// The nested guest takes it if it runs, else the host.
    Delivered,
    /// It causes an exit, and the host counts it.
    Exits,
    /// It causes an exit and is injected; the nested guest counts all NMIs.
    Virtual,
}

struct Case {
    name: &'static str,
    way: Way,
    program: Program,
}

/// The nested guest's program.
#[derive(Clone, Copy)]
enum Program {
    Busy,
    Halts,
    /// It exits at every instruction.
    Exits,
}

const CASES: &[Case] = &[
    Case { name: "nmi-host", way: Way::Host, program: Program::Busy },
    Case { name: "nmi-delivered", way: Way::Delivered, program: Program::Busy },
    Case { name: "nmi-delivered-halted", way: Way::Delivered, program: Program::Halts },
    Case { name: "nmi-delivered-storm", way: Way::Delivered, program: Program::Exits },
    Case { name: "nmi-exits", way: Way::Exits, program: Program::Busy },
    Case { name: "nmi-exits-halted", way: Way::Exits, program: Program::Halts },
    Case { name: "nmi-exits-storm", way: Way::Exits, program: Program::Exits },
    Case { name: "nmi-virtual", way: Way::Virtual, program: Program::Busy },
    Case { name: "nmi-virtual-halted", way: Way::Virtual, program: Program::Halts },
    Case { name: "nmi-virtual-storm", way: Way::Virtual, program: Program::Exits },
];

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors, is_wanted: impl Fn(&str) -> bool) {
    for (index, case) in CASES.iter().enumerate().filter(|(_, case)| is_wanted(case.name)) {
        TAKEN.forget(NMI);
        HANDLED.forget(NMI);
        READY.clear();
        SENT.clear();
        let defects = processors.run_on_all(take_part, index as u64);
        let counted: [u64; 2] = [&TAKEN, &HANDLED].map(|counters| (0..count()).map(|n| counters.by(n, NMI)).sum());
        let is_right = (0..count()).all(|receiver| answered(case.way, receiver) == QUOTA);
        if is_right && defects.iter().all(|&defect| defect == 0) {
            let total = QUOTA * count() as u64;
            suite.case(case.name, format_args!("{total} sent, {total} counted"));
        } else {
            suite.case(case.name, format_args!("wrong: {counted:?} counted, defects {defects:x?}"));
        }
    }
}

/// The number of NMIs that a processor has handled completely.
fn answered(way: Way, receiver: usize) -> u64 {
    let by = |counters: &Counters| counters.by(receiver, NMI);
    match way {
        Way::Host | Way::Exits => by(&TAKEN),
        Way::Delivered => by(&TAKEN) + by(&HANDLED),
        Way::Virtual => by(&HANDLED),
    }
}

/// Sends to the next processor, and receives from the one before.
fn take_part(index: u64) -> u64 {
    let case = &CASES[index as usize];
    let mut nested = (case.way != Way::Host).then(|| NestedGuest::new(case));
    let next = (number() + 1) % count();
    let (mut sent, mut waited, mut is_over, mut defect) = (0, 0, false, 0);
    READY.join();
    while !SENT.is_complete() {
        waited += 1;
        if !is_over && answered(case.way, next) == sent {
            is_over = sent == QUOTA;
            if is_over {
                SENT.arrive();
            } else {
                apic::send(next, Message::Nmi);
                (sent, waited) = (sent + 1, 0);
            }
        } else if !is_over && (waited > PATIENCE || defect != 0) {
            is_over = true;
            SENT.arrive();
        }
        match &mut nested {
            Some(nested) if defect == 0 => defect = nested.round().err().unwrap_or(0),
            _ => _ = core::arch::x86_64::__cpuid(0),
        }
        // A delay that varies, so that NMIs arrive at different places of the receiver's loop.
        for _ in 0..sent % 7 {
            core::hint::spin_loop();
        }
    }
    fill_idt(&GUEST_IDT, nested_handlers(), 8);
    defect
}

/// A nested guest, and the NMIs that must still be injected into it.
struct NestedGuest {
    vm: Vm,
    way: Way,
    injected: u64,
}

impl NestedGuest {
    fn new(case: &Case) -> Self {
        let mut vm = Vm::new(match case.program {
            Program::Busy => code!("2: mov ecx, 23", "3: loop 3b", "cpuid", "jmp 2b"),
            Program::Halts => code!("2: hlt", "jmp 2b"),
            Program::Exits => code!("2: cpuid", "jmp 2b"),
        });
        match case.way {
            Way::Host | Way::Delivered => _ = vm.physical_nmis(),
            Way::Exits => _ = vm.clear(PIN_CONTROLS, Pin::VIRTUAL_NMIS),
            Way::Virtual => (),
        }
        (vm.registers.rbp, vm.registers.rdi) = (HANDLED.row(number()), (&raw const end_injected).addr() as u64);
        fill_idt(&GUEST_IDT, (&raw const counting_handlers).addr() as u64, 16);
        Self { vm, way: case.way, injected: 0 }
    }

    /// Makes one entry. The error is the reason of an exit that should not happen.
    fn round(&mut self) -> Result<(), u64> {
        if self.way == Way::Virtual && TAKEN.by(number(), NMI) != self.injected {
            self.inject();
        }
        self.vm.set(PREEMPTION_TIMER_VALUE, TIMER);
        let Verdict::Exited(exit) = self.vm.run_again() else { return Err(u64::MAX) };
        match ExitReason(exit.reason as u32) {
            ExitReason::CPUID => _ = self.vm.set(GUEST_RIP, exit.rip + 2),
            ExitReason::PREEMPTION_TIMER => (),
            ExitReason::NMI_WINDOW => _ = self.vm.clear(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING),
            ExitReason::EXCEPTION_OR_NMI if self.vm.get(EXIT_INTERRUPTION_INFO) == EXIT_BY_NMI => {
                TAKEN.count(NMI);
                unblock_nmis();
            }
            _ => return Err(exit.reason | 1 << 32),
        }
        Ok(())
    }

    /// Injects an NMI, or sets "NMI-window exiting".
    fn inject(&mut self) {
        if self.vm.get(GUEST_INTERRUPTIBILITY) & (BLOCKED_BY_NMI | BLOCKED_BY_STI_OR_MOV_SS) == 0 {
            self.vm.set(ENTRY_INTERRUPTION_INFO, INJECTED_NMI);
            self.injected += 1;
        } else {
            self.vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
        }
    }
}
