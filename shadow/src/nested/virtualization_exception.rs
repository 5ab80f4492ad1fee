//! #VE: an EPT violation that is delivered to the nested guest, not to its hypervisor (SDM 26.5.7 "Virtualization
//! Exceptions").
//!
//! In vmcs02 the control is off, because a violation of EPT02 need not be one of EPT12: the host delivers the
//! exception.

use crate::exit::{ExitReason, InterruptionInfo};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::outcome::Fault;
use crate::registers::CR0_PE;
use ept::violation::EptViolation;
use ept::{Gpa, NestedGpa};

use super::fault::raise;
use super::machine::{Machine, VmcsPair};
use super::vcpu::Vcpu;

/// Delivers a violation whose entry of EPT12 does not suppress #VE, if the other conditions hold (SDM 26.5.7.2
/// "Convertible EPT Violations that Cause Virtualization Exceptions"). Returns whether #VE was delivered.
#[cold]
pub fn convert<M: Machine>(vcpu: &mut Vcpu<M>, address: NestedGpa, qualification: EptViolation) -> bool {
    /// Offset of the word that the nested guest clears when it has read the area.
    const BUSY: u64 = 4;
    let area = Gpa(vcpu.vmx.vmcs12.get(VIRTUALIZATION_EXCEPTION_INFO));
    let vmcs02 = vcpu.vmcs.vmcs02();
    let delivering = InterruptionInfo(vmcs02.read(IDT_VECTORING_INFO)).is_valid();
    if vmcs02.read(GUEST_CR0) & CR0_PE == 0 || delivering || vcpu.memory.read_u32(area + BUSY) != 0 {
        return false;
    }
    let linear = vmcs02.read(GUEST_LINEAR_ADDRESS);
    let index: u16 = vcpu.vmcs12_field(EPTP_INDEX);
    let reason_and_busy = u64::from(ExitReason::EPT_VIOLATION.0) | u64::from(u32::MAX) << 32;
    for (offset, word) in [(0, reason_and_busy), (8, qualification.0), (16, linear), (24, address.0)] {
        vcpu.memory.write(area + offset, &word.to_le_bytes());
    }
    vcpu.memory.write(area + 32, &index.to_le_bytes());
    raise(vcpu, Fault::Virtualization);
    true
}
