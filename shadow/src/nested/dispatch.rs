//! Exits of nested guests.

use core::fmt;

use crate::controls::{Primary, Secondary};
use crate::exit::ExitReason;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::outcome::{Fault, InsnError, rflags_fail_valid};
use crate::policy::{Route, route};
use crate::vmcs12::Vmcs12;

use super::fault::raise;
use super::guest_msr::{read_for_guest, write_for_guest};
use super::machine::{Machine, VmcsPair};
use super::reflect::{
    Reflected, complete_instruction, reflect, reflect_failed_entry, tpr_below_threshold, triple_fault,
};
use super::vcpu::{Running, Vcpu};
use super::{nested_ept, nested_shadowing, nmi, ports, vm_function};
use crate::registers::RCX;

/// Handles an exit that the short way does not take. A function of its own, as the run loop's registers serve the short
/// way.
#[inline(never)]
pub fn handle_at_length<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    if reason.is_entry_failure() {
        return entry_failed_late(vcpu, reason);
    }
    let basic = reason.without_modifiers();
    vcpu.vmcs.note_entry_of_vmcs02();
    if vcpu.running == Running::Entering {
        vcpu.entry_accepted();
        if !vcpu.nested.areas.has_only_own() {
            // The MSRs are loaded once; a later entry after an exit that the host handles must not load them again.
            vcpu.nested.areas.put_own_behind(0);
            vcpu.vmcs.vmcs02().write(ENTRY_MSR_LOAD_COUNT, vcpu.nested.areas.entry_load_count);
        }
    }
    if vcpu.nested.nmi_waits {
        nmi::retry_after_nested_exit(vcpu);
        let trap12 = vcpu.vmx.vmcs12.get(PRIMARY_CONTROLS).contains(Primary::MONITOR_TRAP_FLAG);
        if basic == ExitReason::MONITOR_TRAP_FLAG && !trap12 {
            return;
        }
    }
    match route(basic, vcpu.registers[RCX], &vcpu.vmx.vmcs12, &vcpu.memory) {
        Route::Reflect => reflect(vcpu, Reflected::AsTaken(reason)),
        Route::NestedPaging => nested_ept::handle(vcpu),
        Route::HostMsr => host_msr(vcpu, basic),
        Route::Port => ports::of_nested_guest(vcpu),
        Route::VmFunction => vm_function::handle(vcpu),
        Route::ShadowedField => nested_shadowing::handle(vcpu, basic),
        Route::Undefined => raise(vcpu, Fault::InvalidOpcode),
        Route::Init if vcpu.machine.take_kick() => (),
        Route::Init => reflect(vcpu, Reflected::AsTaken(reason)),
    }
}

/// RDMSR or WRMSR of an MSR that the host intercepts and the guest hypervisor does not. A function of its own, as the
/// run loop's registers serve reflected exits.
#[inline(never)]
fn host_msr<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    let outcome = if reason == ExitReason::RDMSR {
        read_for_guest(&vcpu.machine, &vcpu.offered, vcpu.ecx()).map(|value| vcpu.set_edx_eax(value))
    } else {
        write_for_guest(vcpu, vcpu.ecx(), vcpu.edx_eax())
    };
    match outcome {
        Ok(()) => complete_instruction(vcpu),
        Err(fault) => raise(vcpu, fault),
    }
}

/// VM entry of vmcs02 failed after its checks of controls and host state. If the guest hypervisor has just asked for
/// this entry, it gets the failure as its own.
#[cold]
fn entry_failed_late<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    let qualification = vcpu.vmcs.vmcs02().read(EXIT_QUALIFICATION);
    if vcpu.running == Running::Entering {
        nmi::entry_failed(vcpu);
        reflect_failed_entry(vcpu, reason.without_modifiers(), qualification);
    } else {
        lose(vcpu, format_args!("{reason:?}, qualification {qualification:#x}"));
    }
}

/// The processor refused vmcs02 with VMfail. If the guest hypervisor asked for this entry, it gets the error: the
/// processor makes control checks that the host leaves to it. If the nested guest has run already, only VTPR, which is
/// in memory, can have changed.
#[cold]
pub fn handle_failed_entry<M: Machine>(vcpu: &mut Vcpu<M>) {
    let error = InsnError(vcpu.vmcs.vmcs02().read(VM_INSTRUCTION_ERROR));
    if vcpu.running != Running::Entering {
        return match error {
            InsnError::ENTRY_INVALID_CONTROL if entry_depends_on_vtpr(&vcpu.vmx.vmcs12) => tpr_below_threshold(vcpu),
            _ => lose(vcpu, format_args!("VM-instruction error {}", error.0)),
        };
    }
    let told = match error {
        InsnError::ENTRY_INVALID_CONTROL => {
            log::debug!("VM entry refused by the processor, error {}", error.0);
            error
        }
        _ => {
            vcpu.machine.warn(format_args!(
                "VM entry refused by the processor, error {}, not because of the guest hypervisor's VMCS: it gets the error of a bad control",
                error.0
            ));
            InsnError::ENTRY_INVALID_CONTROL
        }
    };
    nmi::entry_failed(vcpu);
    vcpu.leave_to_hypervisor();
    vcpu.vmx.vmcs12.settle();
    vcpu.vmx.vmcs12.dirty = vcpu.offered_fields.minus(&vcpu.vmx.vmcs12.stale);
    vcpu.vmx.vmcs12.set(VM_INSTRUCTION_ERROR, told.0);
    let vmcs01 = vcpu.vmcs.vmcs01();
    let rflags = vmcs01.read(GUEST_RFLAGS);
    vmcs01.write(GUEST_RFLAGS, rflags_fail_valid(rflags));
    vcpu.advance();
}

/// The processor refuses to enter a nested guest again after an exit that the host handled, for no known reason. Its
/// hypervisor gets a triple fault, which every hypervisor handles.
fn lose<M: Machine>(vcpu: &mut Vcpu<M>, why: fmt::Arguments<'_>) {
    vcpu.machine.warn(format_args!(
        "the processor refuses a nested guest that has run ({why}): its hypervisor gets a triple fault"
    ));
    triple_fault(vcpu);
}

/// Whether VM entry compares VTPR with the TPR threshold (SDM 27.2.1.1 "VM-Execution Control Fields").
fn entry_depends_on_vtpr(vmcs12: &Vmcs12) -> bool {
    let elsewhere = Secondary::VIRTUALIZE_APIC_ACCESSES | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
    let uses_tpr_shadow = vmcs12.get(PRIMARY_CONTROLS).contains(Primary::USE_TPR_SHADOW);
    uses_tpr_shadow && !vmcs12.secondary().intersects(elsewhere)
}
