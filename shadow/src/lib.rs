//! Nested VMX as logic: the VMCS fields, the checks, the merge of VMCS12 into VMCS02, and the decision who handles an exit.
//!
//! ```text
//!   guest hypervisor  --VMWRITE-->  vmcs12 --check--> --merge--> vmcs02 --VM entry--> nested guest
//!                     <--VMREAD---  vmcs12 <------- sync ------- vmcs02 <--VM exit--
//! ```
//!
//! Nothing here executes a privileged instruction: the processor's VMCS is behind [`hw::VmcsAccess`] and the guest hypervisor's
//! memory behind [`hw::GuestMemory`], so that everything runs and is tested on the host.
//!
//! Invariants:
//! * One table, [`fields`], says everything that is known of a VMCS field. No other list of fields exists.
//! * A value that the guest hypervisor supplies is read once; what was checked is what is used.
//! * Everything that can fail happens before the first write to vmcs02 or to guest state.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, Volume 3C, edition 085 (October 2024).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod caps;
pub mod check;
pub mod controls;
pub mod encoding;
pub mod event;
pub mod exit;
#[cfg(test)]
pub(crate) mod fake;
pub mod fields;
pub mod host_load;
pub mod hw;
pub mod index;
pub mod insn;
pub mod linear;
pub mod merge;
pub mod msr;
pub mod operand;
pub mod outcome;
pub mod permission;
pub mod policy;
pub mod registers;
pub mod sync;
pub mod vmcs12;

pub use caps::VmxCaps;
pub use fields::{Field, FieldId};
pub use index::FieldSet;
pub use outcome::{Fault, InsnError, VmFail};
pub use vmcs12::Vmcs12;
