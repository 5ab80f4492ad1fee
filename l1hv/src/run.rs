//! The run loop: enters a guest, handles its exit, and acts as the handler says.

use shadow::event::inject_fault;
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::{self, Action, VmcsPair, instructions};
use shadow::outcome::Fault;

use crate::arch::cpu;
use crate::arch::on_behalf::{NotEntered, run_guest, set_cr2};
use crate::exit;
use crate::hw::Vcpu;
use crate::processor::{self, Requests};

/// Runs a processor's guest, for ever.
pub fn run(vcpu: &mut Vcpu) -> ! {
    loop {
        step(vcpu);
    }
}

/// One entry, and the handling of its exit.
#[inline]
fn step(vcpu: &mut Vcpu) {
    if vcpu.running.is_nested() { step_nested_guest(vcpu) } else { step_guest_hypervisor(vcpu) }
}

#[inline(always)]
fn step_guest_hypervisor(vcpu: &mut Vcpu) {
    vcpu.vmcs.make_vmcs01_current();
    if let Err(why) = run_guest(&mut vcpu.registers, &vcpu.vmcs) {
        return not_entered(vcpu, why);
    }
    vcpu.vmcs.note_entry_of_vmcs01();
    let reason = ExitReason(vcpu.vmcs.current().read(EXIT_REASON));
    vcpu.machine.processor.stats.guest_hypervisor_exit(reason);
    if nested::handle_quickly(vcpu, reason) {
        return;
    }
    let action = match reason {
        ExitReason::VMLAUNCH | ExitReason::VMRESUME => instructions::launch(vcpu, reason),
        _ => exit::handle(vcpu, reason),
    };
    match action {
        Action::Resume => (),
        Action::Advance => vcpu.advance(),
        Action::Inject(fault) => inject(vcpu, fault),
    }
}

#[inline(always)]
fn step_nested_guest(vcpu: &mut Vcpu) {
    vcpu.vmcs.make_vmcs02_current();
    if let Err(why) = run_guest(&mut vcpu.registers, &vcpu.vmcs) {
        return not_entered(vcpu, why);
    }
    let reason = ExitReason(vcpu.vmcs.current().read(EXIT_REASON));
    vcpu.machine.processor.stats.nested_exit(reason);
    nested::handle(vcpu, reason);
}

/// Injects a fault into the guest hypervisor, at the instruction that exited.
fn inject(vcpu: &mut Vcpu, fault: Fault) {
    if let Fault::Page { address, .. } = fault {
        set_cr2(address);
    }
    inject_fault(vcpu.vmcs.vmcs01(), fault);
}

#[cold]
fn not_entered(vcpu: &mut Vcpu, why: NotEntered) {
    if why.is_requested() { attend(vcpu) } else { handle_vmfail(vcpu) }
}

/// Carries out the requests to this processor.
fn attend(vcpu: &mut Vcpu) {
    let requests = vcpu.machine.processor.take_requests();
    if requests.contains(Requests::STOP) {
        cpu::halt_forever();
    }
    if requests.contains(Requests::FLUSH) {
        nested::drop_what_ept01_forbids(vcpu, processor::last_flush());
    }
    if requests.contains(Requests::NMI) {
        nested::nmi::pass_on(vcpu);
    }
}

#[cold]
fn handle_vmfail(vcpu: &mut Vcpu) {
    if vcpu.running.is_nested() {
        return nested::handle_failed_entry(vcpu);
    }
    let error = vcpu.vmcs.vmcs01().read(VM_INSTRUCTION_ERROR);
    let fault = exit::refused(vcpu, format_args!("VM-instruction error {error}"));
    inject(vcpu, fault);
}
