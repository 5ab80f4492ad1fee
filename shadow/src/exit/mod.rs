//! The information that a VM exit reports (SDM 25.9 "VM-Exit Information Fields").
//!
//! Every word that a processor or a hypervisor supplies has an open newtype: any value is representable, and taking it
//! apart never panics.

mod instruction;
mod interruption;
mod qualification;
mod reason;

pub use ept::violation::EptViolation;
pub use instruction::{AddressSize, DescriptorTableInsn, Gpr, InsnInfo, OperandSize, SegmentTableInsn};
pub use interruption::{InterruptionInfo, interruption_type};
pub use qualification::{
    ApicAccess, ApicAccessKind, CrAccess, CrAccessKind, DebugConditions, DrAccess, InstructionTimeout, IoAccess,
    Qualification, TaskSwitch, TaskSwitchSource, entry_failure_qualification,
};
pub use reason::{Cause, ExitReason, Fills, InsnLayout, QualificationKind, ReasonInfo};
