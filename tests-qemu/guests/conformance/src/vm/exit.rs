//! What a VM entry led to, as text: fields that are 0 are left out.

use core::fmt;

use shadow::fields::*;

use crate::cpu::vmread;
use crate::fault::Outcome;

/// How an entry ended.
pub enum Verdict {
    /// The instruction failed.
    NotEntered(Outcome),
    /// There was a VM exit, or an entry failure that looks like one.
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

const FIELDS: [(&str, FieldId); 14] = [
    ("len", EXIT_INSTRUCTION_LENGTH.id()),
    ("info", EXIT_INSTRUCTION_INFO.id()),
    ("int", EXIT_INTERRUPTION_INFO.id()),
    ("err", EXIT_INTERRUPTION_ERROR_CODE.id()),
    ("vec", IDT_VECTORING_INFO.id()),
    ("vecerr", IDT_VECTORING_ERROR_CODE.id()),
    ("lin", GUEST_LINEAR_ADDRESS.id()),
    ("phys", GUEST_PHYSICAL_ADDRESS.id()),
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
    /// From the current VMCS, for a guest that began at `entry_point`.
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
        for (name, id) in FIELDS {
            let value = read(id);
            if value != 0 && (id, value) != (GUEST_RFLAGS.id(), 2) {
                write!(f, " {name}={value:#x}")?;
            }
        }
        Ok(())
    }
}
