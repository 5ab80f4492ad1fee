//! The VM-entry injection fields of vmcs02. They are VMCS12's, also while the guest hypervisor runs; when the host
//! injects something itself, it borrows them until the next exit that the guest hypervisor gets.

use crate::event;
use crate::exit::InterruptionInfo;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::injection::Injection;
use crate::outcome::Fault;

use super::machine::{Machine, VmcsPair};
use super::vcpu::{Displaced, Vcpu};

/// Injects again what the last exit of the nested guest interrupted, if that was an event.
pub fn redeliver<M: Machine>(vcpu: &mut Vcpu<M>) {
    if InterruptionInfo(vcpu.vmcs.vmcs02().read(IDT_VECTORING_INFO)).is_valid() {
        borrow(vcpu);
        if let Err(reported) = event::redeliver(vcpu.vmcs.vmcs02(), &vcpu.caps) {
            vcpu.machine.warn(format_args!("an exit of a nested guest interrupted {reported:x?}, which is no event"));
        }
    }
}

/// Injects a fault of an instruction that the host emulated.
pub fn inject_fault<M: Machine>(vcpu: &mut Vcpu<M>, fault: Fault) {
    borrow(vcpu);
    event::inject_fault(vcpu.vmcs.vmcs02(), fault);
    if let Fault::Page { address, .. } = fault {
        vcpu.machine.set_cr2(address);
    }
}

/// Takes back an injection that the processor has not carried out; invalid if there is none.
pub fn take_pending<M: Machine>(vcpu: &mut Vcpu<M>) -> Injection {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let info = InterruptionInfo(vmcs02.read(ENTRY_INTERRUPTION_INFO));
    vmcs02.write(ENTRY_INTERRUPTION_INFO, info.invalidated().0);
    Injection {
        info,
        error_code: vmcs02.read(ENTRY_EXCEPTION_ERROR_CODE),
        instruction_length: vmcs02.read(ENTRY_INSTRUCTION_LENGTH),
    }
}

/// Notes VMCS12's values of the fields, if vmcs02 has them: the host is about to write there.
pub fn borrow<M: Machine>(vcpu: &mut Vcpu<M>) {
    if vcpu.nested.displaced.is_none() {
        let vmcs02 = vcpu.vmcs.vmcs02();
        vcpu.nested.displaced = Some(Displaced {
            info: InterruptionInfo(vmcs02.read(ENTRY_INTERRUPTION_INFO)).invalidated().0,
            error_code: vmcs02.read(ENTRY_EXCEPTION_ERROR_CODE),
            instruction_length: vmcs02.read(ENTRY_INSTRUCTION_LENGTH),
        });
    }
}

/// Gives the fields back.
#[inline]
pub fn give_back<M: Machine>(vcpu: &mut Vcpu<M>) {
    if let Some(displaced) = vcpu.nested.displaced.take() {
        let vmcs02 = vcpu.vmcs.vmcs02();
        vmcs02.write(ENTRY_INTERRUPTION_INFO, displaced.info);
        vmcs02.write(ENTRY_EXCEPTION_ERROR_CODE, displaced.error_code);
        vmcs02.write(ENTRY_INSTRUCTION_LENGTH, displaced.instruction_length);
    }
}
