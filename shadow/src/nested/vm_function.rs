//! VMFUNC of a nested guest. vmcs02 copies the control "enable VM functions" but leaves every function disabled, so
//! each VMFUNC exits and the host emulates it. The processor must not switch EPTPs itself: VMCS12's list holds EPTP12s.

use crate::check::eptp_is_valid;
use crate::controls::VmFunctions;
use crate::exit::ExitReason;
use crate::fields::*;
use crate::hw::GuestMemory;
use ept::Gpa;

use super::machine::Machine;
use super::nested_ept;
use super::reflect::{Reflected, complete_instruction, reflect};
use super::vcpu::Vcpu;
use crate::registers::RAX;

/// Carries out EPTP switching (SDM 26.5.6.3 "EPTP Switching"), or reflects the exit.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>) {
    const EPTP_SWITCHING: u32 = 0;
    let function = vcpu.registers[RAX] as u32;
    let enabled = vcpu.vmx.vmcs12.get(VM_FUNCTION_CONTROLS);
    let eptp12 = match function {
        EPTP_SWITCHING if enabled.contains(VmFunctions::EPTP_SWITCHING) => listed_eptp(vcpu),
        _ => None,
    };
    let Some(eptp12) = eptp12 else {
        return reflect(vcpu, Reflected::AsTaken(ExitReason::VMFUNC));
    };
    vcpu.vmx.vmcs12.set_synced(EPT_POINTER.id(), eptp12);
    if vcpu.offered_fields.contains(EPTP_INDEX.id()) {
        let index = vcpu.ecx() as u16;
        vcpu.set_exit_info(EPTP_INDEX, index);
    }
    nested_ept::switch_eptp(vcpu);
    complete_instruction(vcpu);
}

/// The entry of the EPTP list that ECX selects, read once, if it is one that VM entry would accept.
fn listed_eptp<M: Machine>(vcpu: &Vcpu<M>) -> Option<u64> {
    const ENTRIES: u32 = 512;
    let list = Gpa(vcpu.vmx.vmcs12.get(EPTP_LIST_ADDRESS));
    let eptp12 = (vcpu.ecx() < ENTRIES).then(|| vcpu.memory.read_u64(list + u64::from(vcpu.ecx()) * 8))?;
    eptp_is_valid(&vcpu.offered, eptp12).then_some(eptp12)
}
