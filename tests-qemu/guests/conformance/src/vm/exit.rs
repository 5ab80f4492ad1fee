//! The result of a VM entry, as text without the fields that are 0.

use core::fmt;

use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::cpu::vmread;
use crate::fault::Outcome;
use crate::memory::{STACKS, guest_stack};

/// How an entry ended.
pub enum Verdict {
    /// The instruction failed.
    NotEntered(Outcome),
    /// A VM exit, or an entry failure with an exit reason.
    Exited(Exit),
}

/// Exit information and the guest state that exits change most.
pub struct Exit {
    entry_point: u64,
    /// The exit-reason field.
    pub reason: u64,
    /// The exit qualification.
    pub qualification: u64,
    /// RIP.
    pub rip: u64,
}

/// Guest state, and controls that an exit changes.
const STATE: [(&str, FieldId); 6] = [
    ("act", GUEST_ACTIVITY_STATE.id()),
    ("block", GUEST_INTERRUPTIBILITY.id()),
    ("pend", GUEST_PENDING_DEBUG.id()),
    ("inj", ENTRY_INTERRUPTION_INFO.id()),
    ("error", VM_INSTRUCTION_ERROR.id()),
    ("flags", GUEST_RFLAGS.id()),
];

fn read(id: FieldId) -> u64 {
    vmread(id.encoding().0.into()).unwrap_or(0)
}

impl Exit {
    /// Reads the exit from the current VMCS, for a guest that began at `entry_point`.
    pub fn read(entry_point: u64) -> Self {
        Self {
            entry_point,
            reason: read(EXIT_REASON.id()),
            qualification: read(EXIT_QUALIFICATION.id()),
            rip: read(GUEST_RIP.id()),
        }
    }

    /// Whether VM entry failed after its checks of controls and host state.
    pub fn is_entry_failure(&self) -> bool {
        self.reason >> 31 & 1 != 0
    }
}

impl Exit {
    /// The number of quadwords on the nested guest's stack, at most six: an exception's frame with its error code.
    pub fn pushed_words(&self) -> usize {
        let depth = guest_stack().wrapping_sub(read(GUEST_RSP.id()));
        if depth <= 48 { depth as usize / 8 } else { 0 }
    }

    /// The topmost six quadwords of the nested guest's stack.
    pub fn pushed(&self) -> [u64; 6] {
        let first = (guest_stack() as usize - STACKS.address() as usize) / 8 - self.pushed_words();
        core::array::from_fn(|index| STACKS.get(first + index))
    }
}

impl Verdict {
    /// Whether this is an exit for this reason.
    pub fn is(&self, reason: ExitReason) -> bool {
        matches!(self, Self::Exited(exit) if exit.reason == u64::from(reason.0))
    }

    /// Whether this is an exit for the monitor trap flag.
    pub fn is_monitor_trap_flag(&self) -> bool {
        self.is(ExitReason::MONITOR_TRAP_FLAG)
    }

    /// Whether this is an exit for the VMX-preemption timer.
    pub fn is_preemption_timer(&self) -> bool {
        self.is(ExitReason::PREEMPTION_TIMER)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEntered(outcome) => write!(f, "{outcome}"),
            Self::Exited(exit) => write!(f, "{exit}"),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit={:#x}", self.reason)?;
        if self.qualification != 0 {
            write!(f, " q={:#x}", self.qualification)?;
        }
        match self.rip.wrapping_sub(self.entry_point) {
            0 => (),
            distance @ ..0x1000 => write!(f, " rip=+{distance:#x}")?,
            _ => write!(f, " rip={:#x}", self.rip)?,
        }
        let depth = guest_stack().wrapping_sub(read(GUEST_RSP.id()));
        if depth != 0 {
            write!(f, " sp=-{depth:#x}")?;
        }
        self.information(f)?;
        for (name, id) in STATE {
            let value = read(id);
            if value != 0 && (id, value) != (GUEST_RFLAGS.id(), 2) {
                write!(f, " {name}={value:#x}")?;
            }
        }
        Ok(())
    }
}

impl Exit {
    /// The exit-information fields that the SDM defines for this exit (28.2); the rest may be anything.
    fn information(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LMSW: u64 = 3;
        if self.is_entry_failure() {
            return Ok(());
        }
        let basic = ExitReason(self.reason as u32).without_modifiers();
        let event = [read(EXIT_INTERRUPTION_INFO.id()), read(IDT_VECTORING_INFO.id())].map(|info| Info(info as u32));
        let show = |f: &mut fmt::Formatter<'_>, name, id| write!(f, " {name}={:#x}", read(id));
        if is_instruction(basic) || event.iter().any(|info| info.is_software()) {
            show(f, "len", EXIT_INSTRUCTION_LENGTH.id())?;
        }
        if has_instruction_information(basic) {
            show(f, "info", EXIT_INSTRUCTION_INFO.id())?;
        }
        let errors = [("int", "err", EXIT_INTERRUPTION_ERROR_CODE), ("vec", "vecerr", IDT_VECTORING_ERROR_CODE)];
        for (info, (name, error_name, error)) in event.into_iter().zip(errors) {
            if info.is_valid() {
                write!(f, " {name}={:#x}", info.0)?;
            }
            if info.is_valid() && info.has_error_code() {
                show(f, error_name, error.id())?;
            }
        }
        let lmsw =
            basic == ExitReason::CR_ACCESS && self.qualification >> 4 & 3 == LMSW && self.qualification >> 6 & 1 != 0;
        let linear = basic == ExitReason::EPT_VIOLATION && self.qualification >> 7 & 1 != 0;
        if lmsw || linear || is_string_io(basic, self.qualification) {
            show(f, "lin", GUEST_LINEAR_ADDRESS.id())?;
        }
        if matches!(basic, ExitReason::EPT_VIOLATION | ExitReason::EPT_MISCONFIGURATION) {
            show(f, "phys", GUEST_PHYSICAL_ADDRESS.id())?;
        }
        Ok(())
    }
}

/// Interruption or IDT-vectoring information.
struct Info(u32);

impl Info {
    fn is_valid(&self) -> bool {
        self.0 >> 31 != 0
    }

    fn has_error_code(&self) -> bool {
        self.0 >> 11 & 1 != 0
    }

    /// Whether it is a software interrupt, privileged software exception or software exception.
    fn is_software(&self) -> bool {
        self.is_valid() && matches!(self.0 >> 8 & 7, 4..=6)
    }
}

fn is_string_io(basic: ExitReason, qualification: u64) -> bool {
    basic == ExitReason::IO_INSTRUCTION && qualification >> 4 & 1 != 0
}

/// Exits due to the execution of an instruction, task switches among them.
fn is_instruction(basic: ExitReason) -> bool {
    matches!(basic.0, 9..=32 | 36 | 39 | 40 | 46 | 47 | 50 | 51 | 53..=55 | 57..=61 | 63..=65 | 67..=70)
        && basic.0 != 17
}

/// Exits with the VM-exit instruction-information field (SDM 28.2.5).
fn has_instruction_information(basic: ExitReason) -> bool {
    matches!(basic.0, 19 | 21..=23 | 25 | 27 | 46 | 47 | 50 | 53 | 57 | 58 | 61 | 63 | 64 | 69)
}
