//! Exits of the guest hypervisor, one family a file.

mod cpuid;
mod cr;
mod hypercall;
mod memory;
mod msr;
mod reset;
pub mod short;
mod vmx_insn;

pub use cr::masks as control_register_masks;
pub use memory::map_beyond;
pub use msr::{read_for_guest, write_for_guest};
pub use reset::{WAIT_FOR_SIPI, give_back_blocked_init, wait_for_start};

use boot::cmdline::TripleFault;
use boot::stop::StopKind;
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::outcome::Fault;

use crate::arch::on_behalf;
use crate::nested::{self, TrappedWrite};
use crate::run;
use crate::stop::{StopReason, reset_machine, stop};
use crate::vcpu::Vcpu;

/// What the run loop does after an exit was looked at. Only the run loop does it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Runs the guest again, where it is.
    Resume,
    /// Runs it after the instruction that exited.
    Advance,
    /// Gives it an exception.
    Inject(Fault),
}

/// Handles an exit of the guest hypervisor.
pub fn handle(vcpu: &mut Vcpu, reason: ExitReason) -> Action {
    if reason.is_entry_failure() {
        stop_on_failed_entry(vcpu, reason);
    }
    match reason.without_modifiers() {
        ExitReason::VMCALL if hypercall::is_meant(vcpu) => hypercall::handle(vcpu),
        ExitReason::VMREAD => vmx_insn::vmread(vcpu),
        ExitReason::VMWRITE => vmx_insn::vmwrite(vcpu),
        ExitReason::VMCLEAR
        | ExitReason::VMPTRLD
        | ExitReason::VMPTRST
        | ExitReason::VMXON
        | ExitReason::VMXOFF
        | ExitReason::VMCALL
        | ExitReason::INVEPT
        | ExitReason::INVVPID => vmx_insn::handle(vcpu, reason),
        ExitReason::VMLAUNCH | ExitReason::VMRESUME => vmx_insn::launch(vcpu, reason),
        ExitReason::CPUID => cpuid::handle(vcpu),
        ExitReason::CR_ACCESS => cr::handle(vcpu),
        ExitReason::RDMSR => msr::rdmsr(vcpu),
        ExitReason::WRMSR => msr::wrmsr(vcpu),
        ExitReason::XSETBV => xsetbv(vcpu),
        ExitReason::EPT_VIOLATION => memory::ept_violation(vcpu),
        // Neither is offered; on a processor without them both are #UD.
        ExitReason::GETSEC | ExitReason::VMFUNC => Action::Inject(Fault::InvalidOpcode),
        ExitReason::INVD => invd(),
        ExitReason::INIT => reset::init(vcpu),
        ExitReason::SIPI => reset::startup(vcpu),
        ExitReason::MONITOR_TRAP_FLAG => run::retry_nmi(vcpu),
        ExitReason::MOV_DR => nested::spring(vcpu, TrappedWrite::Registers),
        ExitReason::GDTR_IDTR_ACCESS | ExitReason::LDTR_TR_ACCESS => nested::spring(vcpu, TrappedWrite::Tables),
        ExitReason::TRIPLE_FAULT => triple_fault(vcpu),
        _ => stop_on_unexpected(vcpu, reason),
    }
}

/// XSETBV exits whatever the controls say. The host uses no extended state, so the guest hypervisor's XCR0 is the machine's.
fn xsetbv(vcpu: &mut Vcpu) -> Action {
    match on_behalf::xsetbv(vcpu.ecx(), vcpu.edx_eax()) {
        Ok(()) => Action::Advance,
        Err(_) => Action::Inject(Fault::GeneralProtection),
    }
}

/// INVD exits whatever the controls say. DEVIATION: caches are written back, not dropped, as every hypervisor does: dropping would lose
/// the host's own data too.
fn invd() -> Action {
    on_behalf::write_back_caches();
    Action::Advance
}

/// The processor is in shutdown state, of which the chipset makes a reset.
fn triple_fault(vcpu: &mut Vcpu) -> ! {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (rip, cs, cr3) = (vmcs01.read(GUEST_RIP), vmcs01.read(GUEST_CS_SELECTOR), vmcs01.read(GUEST_CR3));
    let message =
        format_args!("the guest hypervisor triple-faulted at {cs:#x}:{rip:#x} (CR3 {cr3:#x}): look there for its bug");
    if vcpu.on_triple_fault == TripleFault::Reset {
        log::info!("the guest hypervisor triple-faulted at {cs:#x}:{rip:#x} (CR3 {cr3:#x}): the machine is reset");
        reset_machine();
    }
    stop(StopReason::new(StopKind::TripleFault, message))
}

fn stop_on_failed_entry(vcpu: &mut Vcpu, reason: ExitReason) -> ! {
    let qualification = vcpu.vmcs.vmcs01().read(EXIT_QUALIFICATION);
    crate::stop::stop_internal!("VM entry of the guest hypervisor: {reason:?}, qualification {qualification:#x}")
}

fn stop_on_unexpected(vcpu: &mut Vcpu, reason: ExitReason) -> ! {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (rip, qualification) = (vmcs01.read(GUEST_RIP), vmcs01.read(EXIT_QUALIFICATION));
    crate::stop::stop_internal!(
        "the guest hypervisor exited for {reason:?} at {rip:#x}, qualification {qualification:#x}, which nothing asked for"
    )
}
