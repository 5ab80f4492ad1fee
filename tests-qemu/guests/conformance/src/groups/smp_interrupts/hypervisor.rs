//! The hypervisor of a nested guest that gets interrupts, in each of the ways of VMX.

use shadow::controls::{ExitControls, Pin, Primary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::apic;
use crate::code;
use crate::fault::{fill_idt, take_interrupt};
use crate::memory::{GUEST_IDT, nested_handlers};
use crate::smp::{Counters, TAKEN, number};
use crate::vm::{Verdict, Vm};

use super::{counting_handlers, end_delivered, end_injected, traffic};

/// What happens to an interrupt while the nested guest runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It waits for an exit: RFLAGS.IF and "external-interrupt exiting" are both 0.
    Waits,
    /// The nested guest takes it from the machine's APIC.
    Delivered,
    /// It causes an exit, and is still pending afterwards.
    Exits,
    /// It causes an exit, which acknowledges it.
    ExitsAcknowledged,
}

/// The level that counts the interrupts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The guest hypervisor.
    Host,
    /// The nested guest, into which the hypervisor injects the interrupts that it took.
    NestedGuest,
}

/// The nested guest's program.
#[derive(Clone, Copy)]
pub enum Program {
    /// Switches RFLAGS.IF on and off, and executes CPUID.
    Busy,
    /// Halts.
    Halts,
}

const IF: u64 = 1 << 9;
/// Blocking by STI and by MOV SS.
const BLOCKED: u32 = 3;
const INJECTED_INTERRUPT: u32 = 1 << 31;
/// A halted nested guest notices the end of the case at the next exit for the timer.
const TIMER: u32 = 20_000;

/// A nested guest with its hypervisor on this processor.
pub struct Hypervisor {
    vm: Vm,
    way: Way,
    level: Level,
    /// Vectors that were taken and not yet injected, one bit each.
    queue: [u64; 4],
    /// The host's counters of taken interrupts at the last comparison.
    taken: [u64; 256],
    /// The first event that should not have happened.
    pub defect: Option<Defect>,
}

/// An event that should not happen.
#[derive(Clone, Copy)]
pub enum Defect {
    /// An exit with this reason.
    Exit(u64),
    /// No entry.
    NotEntered,
    /// A vector arrived that was still waiting to be injected.
    Doubled,
    /// An exit acknowledged an interrupt, but gave no vector.
    NoVector,
}

impl Defect {
    /// The defect as a result of work; 0 stands for none.
    pub fn code(self) -> u64 {
        match self {
            Self::Exit(reason) => 0x1_0000_0000 | reason,
            Self::NotEntered => 1,
            Self::Doubled => 2,
            Self::NoVector => 3,
        }
    }
}

impl Hypervisor {
    /// A nested guest that counts its interrupts.
    pub fn new(way: Way, level: Level, program: Program, handled: &'static Counters) -> Self {
        let code = match (way, program) {
            (Way::Waits, _) => code!("2: mov ecx, 9", "3: loop 3b", "cpuid", "jmp 2b"),
            (_, Program::Busy) => {
                code!("2: cli", "mov ecx, 7", "3: loop 3b", "sti", "mov ecx, 5", "4: loop 4b", "cpuid", "jmp 2b")
            }
            (_, Program::Halts) => code!("2: sti", "hlt", "jmp 2b"),
        };
        let mut vm = Vm::new(code);
        if matches!(way, Way::Exits | Way::ExitsAcknowledged) {
            vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING);
        }
        if way == Way::ExitsAcknowledged {
            vm.or(EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT);
        }
        let end = if way == Way::Delivered { &raw const end_delivered } else { &raw const end_injected };
        (vm.registers.rbp, vm.registers.rdi) = (handled.row(number()), end.addr() as u64);
        fill_idt(&GUEST_IDT, (&raw const counting_handlers).addr() as u64, 16);
        Self { vm, way, level, queue: [0; 4], taken: [0; 256], defect: None }
    }

    /// One entry and its exit.
    pub fn round(&mut self) {
        if self.way == Way::Waits {
            let _ = take_interrupt();
        }
        if self.level == Level::NestedGuest {
            self.inject();
        }
        self.vm.set(PREEMPTION_TIMER_VALUE, TIMER);
        match self.vm.run_again() {
            Verdict::Exited(exit) => self.handle(ExitReason(exit.reason as u32)),
            Verdict::NotEntered(_) => self.fail(Defect::NotEntered),
        }
    }

    /// Injects the highest vector in the queue, or sets "interrupt-window exiting".
    fn inject(&mut self) {
        let Some(word) = (0..4).rev().find(|&word| self.queue[word] != 0) else { return };
        let vector = word as u32 * 64 + self.queue[word].ilog2();
        let is_open = self.vm.get(GUEST_RFLAGS) & IF != 0 && self.vm.get(GUEST_INTERRUPTIBILITY) & BLOCKED == 0;
        if is_open {
            self.queue[word] &= !(1 << (vector % 64));
            self.vm.set(ENTRY_INTERRUPTION_INFO, INJECTED_INTERRUPT | vector);
        }
        if self.queue != [0; 4] {
            self.vm.or(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
        }
    }

    fn handle(&mut self, reason: ExitReason) {
        match reason {
            ExitReason::CPUID => {
                let length = self.vm.get(EXIT_INSTRUCTION_LENGTH);
                self.vm.set(GUEST_RIP, self.vm.get(GUEST_RIP) + u64::from(length));
            }
            ExitReason::EXTERNAL_INTERRUPT if self.way == Way::ExitsAcknowledged => self.acknowledged(),
            ExitReason::EXTERNAL_INTERRUPT if self.way == Way::Exits => {
                let _ = take_interrupt();
                if self.level == Level::NestedGuest {
                    self.look();
                }
            }
            ExitReason::INTERRUPT_WINDOW => {
                self.vm.clear(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
            }
            ExitReason::PREEMPTION_TIMER => (),
            ExitReason(reason) => self.fail(Defect::Exit(reason.into())),
        }
    }

    /// The exit has taken the interrupt from the APIC.
    fn acknowledged(&mut self) {
        let info = self.vm.get(EXIT_INTERRUPTION_INFO);
        if info >> 8 != INJECTED_INTERRUPT >> 8 {
            return self.fail(Defect::NoVector);
        }
        let vector = info as u8;
        match self.level {
            Level::Host => TAKEN.count(vector),
            Level::NestedGuest => self.enqueue(vector),
        }
        apic::end_of_interrupt();
    }

    /// Queues the interrupts that the host's handlers have counted since the last call.
    fn look(&mut self) {
        for vector in traffic::vectors() {
            let taken = TAKEN.by(number(), vector);
            if taken != core::mem::replace(&mut self.taken[usize::from(vector)], taken) {
                self.enqueue(vector);
            }
        }
    }

    fn enqueue(&mut self, vector: u8) {
        let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
        if self.queue[word] & bit != 0 {
            self.fail(Defect::Doubled);
        }
        self.queue[word] |= bit;
    }

    fn fail(&mut self, defect: Defect) {
        self.defect.get_or_insert(defect);
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        fill_idt(&GUEST_IDT, nested_handlers(), 8);
    }
}
