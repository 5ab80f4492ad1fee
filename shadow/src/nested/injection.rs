//! The VM-entry injection fields of vmcs02. They hold VMCS12's values, also while the guest hypervisor runs. To inject
//! an event of its own, the host borrows the fields until the next reflected exit.

use crate::event;
use crate::exit::InterruptionInfo;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::injection::Injection;
use crate::outcome::Fault;

use super::machine::{Machine, VmcsPair};
use super::vcpu::{Displaced, Vcpu};

/// Injects again the event whose delivery the last exit of the nested guest interrupted, if any.
pub fn redeliver<M: Machine>(vcpu: &mut Vcpu<M>) {
    if InterruptionInfo(vcpu.vmcs.vmcs02().read(IDT_VECTORING_INFO)).is_valid() {
        borrow(vcpu);
        if let Err(reported) = event::redeliver(vcpu.vmcs.vmcs02(), &vcpu.caps) {
            vcpu.machine
                .warn(format_args!("an exit of a nested guest interrupted {reported:x?}, which is not a valid event"));
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

/// Saves VMCS12's values of the fields, unless they are saved already: the host is about to write its own.
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

/// Writes VMCS12's values back to the fields.
#[inline]
pub fn give_back<M: Machine>(vcpu: &mut Vcpu<M>) {
    if let Some(displaced) = vcpu.nested.displaced.take() {
        let vmcs02 = vcpu.vmcs.vmcs02();
        vmcs02.write(ENTRY_INTERRUPTION_INFO, displaced.info);
        vmcs02.write(ENTRY_EXCEPTION_ERROR_CODE, displaced.error_code);
        vmcs02.write(ENTRY_INSTRUCTION_LENGTH, displaced.instruction_length);
    }
}
