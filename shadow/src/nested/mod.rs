//! Nesting: entering a nested guest for its hypervisor, and giving that hypervisor the exits that are its own.
//!
//! ```text
//!   VMLAUNCH/VMRESUME -> entry:    check -> merge into vmcs02 -> VM entry
//!   exit of vmcs02    -> dispatch: route -> the host repairs and resumes, or
//!                        reflect:  sync to VMCS12 -> VMCS12's host state into vmcs01
//! ```
//!
//! A processor is in one of four states ([`Running`]); these are all transitions:
//!
//! ```text
//!            VMLAUNCH, VMRESUME                      vmcs02 exits
//!           +------ begin_entry ------>  Entering  -- entry_accepted --+
//!           |                               |                          v
//!   GuestHypervisor <- leave_to_hypervisor -+-----------------  NestedGuest <-+
//!           ^    |       VMfail, entry failure, reflected exit         |      |
//!           |    | VMCS12 loads MSRs on exits                          +------+
//!   vmcs01 exits v                                              the host repairs and resumes
//!   GuestHypervisorLoadingMsrs
//! ```
//!
//! Everything here is generic over a [`Machine`]: l1hv has the real one, the tests a model of a processor.

pub mod control_registers;
mod dispatch;
mod entry;
pub mod guest_msr;
mod injection;
pub mod instructions;
mod machine;
mod msr_bitmap;
mod nested_ept;
mod nested_shadowing;
mod page_log;
pub mod quick_access;
mod reflect;
mod shortcut;
mod vcpu;
mod virtualization_exception;
mod vm_function;
mod vmcs_shadowing;
mod watching;
pub mod write_traps;

use crate::outcome::Fault;

pub use dispatch::{handle, handle_failed_entry};
pub use injection::Displaced;
pub use machine::{Invept, Invvpid, Machine, Protection, Stop, VmcsPair, WatchedMemory};
pub use nested_ept::map_beyond;
pub use nested_shadowing::NestedShadowing;
pub use reflect::{abort, nmi};
pub use shortcut::{Shortcut, resume};
pub use vcpu::{MergedBitmap, MsrArea, MsrAreas, Nested, NestedEpt, Running, SHARED_VPID02, VPID01, Vcpu};
pub use watching::drop_what_ept01_forbids;

/// What the run loop does after it has looked at an exit of the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Runs the guest again, where it is.
    Resume,
    /// Runs it after the instruction that exited.
    Advance,
    /// Gives it an exception.
    Inject(Fault),
}
