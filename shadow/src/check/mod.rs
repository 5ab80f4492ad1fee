//! The checks of VM entry on VMCS12 (SDM 27.2 and 27.3).
//!
//! This module checks controls and host state in full, because vmcs02 has other controls and another host state. Guest
//! state goes to vmcs02 unchanged: the processor checks it there, and the guest hypervisor gets the processor's
//! verdict. This module checks only the guest state that the processor cannot see.

mod controls;
mod guest_state;
mod host_state;

pub use controls::{controls, controls_of_vmcs12, eptp_is_valid};
pub use guest_state::{GuestStateError, guest_state, load_pdptes, read_pdptes};
pub use host_state::{HOST_BASES, HostMode, host_bases, host_state, is_fixed};

use core::fmt;

use crate::controls::Dependency;

/// The name of a check that failed, for the log. The guest hypervisor gets the SDM's number for the group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation(pub &'static str);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl core::error::Error for Violation {}

impl From<&'static Dependency> for Violation {
    fn from(dependency: &'static Dependency) -> Self {
        Self(dependency.rule)
    }
}

type Check = Result<(), Violation>;

fn require(condition: bool, name: &'static str) -> Check {
    if condition { Ok(()) } else { Err(Violation(name)) }
}

/// Whether every byte of a PAT is a memory type (SDM Volume 3A, 12.12.2 "IA32_PAT MSR").
fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes().iter().all(|&kind| matches!(kind, 0 | 1 | 4..=7))
}
