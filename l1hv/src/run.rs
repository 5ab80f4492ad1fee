//! The loop: enter, look at the exit, do what its handler says.

use core::sync::atomic::Ordering;

use shadow::event::{NMI_INTERRUPTION, inject_fault};
use shadow::exit::{ExitReason, InterruptionInfo};
use shadow::fields::*;
use shadow::host_load::VmxAbort;
use shadow::hw::VmcsAccess;
use shadow::outcome::Fault;

use crate::arch::idt::PENDING_NMI;
use crate::arch::on_behalf::{run_guest, set_cr2};
use crate::boot_flow::HostSetup;
use crate::exit::{self, Action, short};
use crate::nested;
use crate::setup;
use crate::stop::stop_internal;
use crate::vcpu::{Level, Vcpu};

/// Takes over from the boot and never comes back.
pub fn launch(setup: HostSetup<'_>) -> ! {
    let vcpu = setup::build(setup);
    log::info!("the guest hypervisor starts");
    loop {
        step(vcpu);
    }
}

/// One entry and what its exit asks for.
#[inline]
fn step(vcpu: &mut Vcpu) {
    if PENDING_NMI.load(Ordering::Relaxed) != 0 {
        pass_on_nmi(vcpu);
    }
    match vcpu.level {
        Level::GuestHypervisor => step_guest_hypervisor(vcpu),
        Level::Nested => step_nested_guest(vcpu),
    }
}

#[inline(always)]
fn step_guest_hypervisor(vcpu: &mut Vcpu) {
    // Whose VMCS is current decides who runs.
    let _ = vcpu.vmcs.vmcs01();
    let Ok(reason) = run_guest(&mut vcpu.registers, &mut vcpu.vmcs) else { return handle_vmfail(vcpu) };
    vcpu.stats.exit(Level::GuestHypervisor, reason);
    if reason == ExitReason::VMRESUME && nested::resume(vcpu) {
        return;
    }
    if vcpu.nested.loading_host_msrs {
        end_of_host_msr_load(vcpu, reason);
    }
    let is_done = match reason {
        ExitReason::VMREAD => short::vmread(vcpu),
        ExitReason::VMWRITE => short::vmwrite(vcpu),
        _ => false,
    };
    if is_done {
        return;
    }
    match exit::handle(vcpu, reason) {
        Action::Resume => (),
        Action::Advance => vcpu.advance(),
        Action::Inject(fault) => inject(vcpu, fault),
    }
}

#[inline(always)]
fn step_nested_guest(vcpu: &mut Vcpu) {
    let _ = vcpu.vmcs.vmcs02();
    let Ok(reason) = run_guest(&mut vcpu.registers, &mut vcpu.vmcs) else { return handle_vmfail(vcpu) };
    vcpu.stats.exit(Level::Nested, reason);
    nested::handle(vcpu, reason);
}

/// A fault for the guest hypervisor, at the instruction that exited.
fn inject(vcpu: &mut Vcpu, fault: Fault) {
    if let Fault::Page { address, .. } = fault {
        set_cr2(address);
    }
    inject_fault(&mut vcpu.vmcs.vmcs01(), fault);
}

/// An NMI came while the host ran: it goes to whoever would have got it. If one is being injected or blocked already it stays pending.
#[cold]
fn pass_on_nmi(vcpu: &mut Vcpu) {
    const BLOCKING_BY_NMI_OR_MOV_SS: u32 = 1 << 3 | 1 << 1;
    match vcpu.level {
        Level::GuestHypervisor => {
            let mut vmcs01 = vcpu.vmcs.vmcs01();
            let injecting = InterruptionInfo(vmcs01.read(ENTRY_INTERRUPTION_INFO)).is_valid();
            let blocked = vmcs01.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI_OR_MOV_SS != 0;
            if !injecting && !blocked {
                vmcs01.write(ENTRY_INTERRUPTION_INFO, NMI_INTERRUPTION.0);
                PENDING_NMI.store(0, Ordering::Relaxed);
            }
        }
        Level::Nested => {
            PENDING_NMI.store(0, Ordering::Relaxed);
            nested::nmi(vcpu);
        }
    }
}

#[cold]
fn handle_vmfail(vcpu: &mut Vcpu) {
    match vcpu.level {
        Level::Nested => nested::handle_failed_entry(vcpu),
        Level::GuestHypervisor => {
            let error = vcpu.vmcs.vmcs01().read(VM_INSTRUCTION_ERROR);
            stop_internal!("VM entry of the guest hypervisor failed with VM-instruction error {error}")
        }
    }
}

/// vmcs01's entry has loaded the MSRs of VMCS12's VM-exit MSR-load area, or could not.
#[cold]
fn end_of_host_msr_load(vcpu: &mut Vcpu, reason: ExitReason) {
    vcpu.nested.loading_host_msrs = false;
    if reason == ExitReason::ENTRY_FAILURE_MSR_LOADING.of_failed_entry() {
        nested::abort(vcpu, VmxAbort::LoadingHostMsrs);
    }
    vcpu.vmcs.vmcs01().write(ENTRY_MSR_LOAD_COUNT, 0);
}
