//! Faults of a nested guest that the host found when it emulated an instruction.

use super::injection;
use super::machine::{Machine, VmcsPair};
use super::reflect::reflect_fault;
use super::vcpu::Vcpu;
use crate::fields::EXCEPTION_BITMAP;
use crate::injection::GuestMode;
use crate::outcome::Fault;

/// Raises a fault: as an exit to the guest hypervisor if its exception bitmap asks for one.
pub fn raise<M: Machine>(vcpu: &mut Vcpu<M>, fault: Fault) {
    let (info, error_code) = fault.interruption(GuestMode::of(vcpu.vmcs.vmcs02()));
    if vcpu.vmcs12_field(EXCEPTION_BITMAP) >> info.vector() & 1 != 0 {
        reflect_fault(vcpu, info, error_code);
        return;
    }
    injection::inject_fault(vcpu, fault);
}
