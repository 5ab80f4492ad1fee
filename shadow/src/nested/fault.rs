//! Faults of a nested guest that the host found when it emulated an instruction, or where the processor found none.

use super::injection;
use super::machine::{Machine, VmcsPair};
use super::reflect::reflect_fault;
use super::vcpu::Vcpu;
use crate::fields::{EXCEPTION_BITMAP, PAGE_FAULT_ERROR_CODE_MASK, PAGE_FAULT_ERROR_CODE_MATCH};
use crate::injection::GuestMode;
use crate::outcome::Fault;

/// Raises one: the guest hypervisor's exit if its exception bitmap asks for it, a page fault as the mask and the match
/// of error codes say (SDM 26.2 "Other Causes of VM Exits").
pub fn raise<M: Machine>(vcpu: &mut Vcpu<M>, fault: Fault) {
    let (info, error_code) = fault.interruption(GuestMode::of(vcpu.vmcs.vmcs02()));
    let wants_vector = vcpu.vmcs12_field(EXCEPTION_BITMAP) >> info.vector() & 1 != 0;
    let (exits, qualification) = match fault {
        Fault::Page { address, error_code } => {
            let matches = error_code & vcpu.vmcs12_field(PAGE_FAULT_ERROR_CODE_MASK)
                == vcpu.vmcs12_field(PAGE_FAULT_ERROR_CODE_MATCH);
            (wants_vector == matches, address)
        }
        _ => (wants_vector, 0),
    };
    if exits {
        return reflect_fault(vcpu, info, error_code, qualification);
    }
    injection::inject_fault(vcpu, fault);
}
