//! Exits of the guest hypervisor, one file for each family.

mod cpuid;
mod hypercall;
mod memory;
mod reset;

pub use reset::{start_in_real_mode, wait_for_start};

use core::fmt;

use boot::cmdline::TripleFault;
use boot::stop::StopKind;
use shadow::exit::{ExitReason, Fills};
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::task_switch::{self, Impossible};
use shadow::nested::write_traps::{self, TrappedWrite};
use shadow::nested::{Action, VmcsPair, control_registers, guest_msr, instructions, nmi, ports};
use shadow::outcome::Fault;

use crate::arch::on_behalf;
use crate::bios;
use crate::hw::Vcpu;
use crate::stop::{StopReason, reset_machine, stop};

/// Handles an exit of the guest hypervisor. A function of its own, as the run loop's registers serve the short way.
#[inline(never)]
pub fn handle(vcpu: &mut Vcpu, reason: ExitReason) -> Action {
    if reason.is_entry_failure() {
        return entry_failed_late(vcpu, reason);
    }
    match reason.without_modifiers() {
        ExitReason::VMCALL if hypercall::is_meant(vcpu) => hypercall::handle(vcpu),
        ExitReason::VMCALL if bios::is_without_boot_sector(vcpu) => bios::stop_without_boot_sector(vcpu),
        ExitReason::VMREAD
        | ExitReason::VMWRITE
        | ExitReason::VMCLEAR
        | ExitReason::VMPTRLD
        | ExitReason::VMPTRST
        | ExitReason::VMXON
        | ExitReason::VMCALL
        | ExitReason::INVEPT
        | ExitReason::INVVPID => instructions::handle(vcpu, reason),
        ExitReason::VMXOFF => vmxoff(vcpu),
        ExitReason::CPUID => cpuid::handle(vcpu),
        ExitReason::CR_ACCESS => control_registers::handle(vcpu).unwrap_or_else(|| unexpected_exit(vcpu, reason)),
        ExitReason::RDMSR => guest_msr::rdmsr(vcpu),
        ExitReason::WRMSR => guest_msr::wrmsr(vcpu),
        ExitReason::XSETBV => xsetbv(vcpu),
        ExitReason::IO_INSTRUCTION => ports::of_guest_hypervisor(vcpu),
        ExitReason::EPT_VIOLATION => memory::ept_violation(vcpu),
        // Neither instruction is offered; on a processor without them both cause #UD.
        ExitReason::GETSEC | ExitReason::VMFUNC => Action::Inject(Fault::InvalidOpcode),
        ExitReason::INVD => invd(),
        ExitReason::INIT => reset::init(vcpu),
        ExitReason::SIPI => reset::startup(vcpu),
        ExitReason::MONITOR_TRAP_FLAG => {
            nmi::retry(vcpu);
            Action::Resume
        }
        ExitReason::MOV_DR => write_traps::spring(vcpu, TrappedWrite::Registers),
        ExitReason::GDTR_IDTR_ACCESS | ExitReason::LDTR_TR_ACCESS => write_traps::spring(vcpu, TrappedWrite::Tables),
        ExitReason::TRIPLE_FAULT => triple_fault(vcpu),
        ExitReason::TASK_SWITCH => switch_tasks(vcpu),
        ExitReason::EPT_MISCONFIGURATION => stop_on_misconfiguration(vcpu),
        _ => unexpected_exit(vcpu, reason),
    }
}

/// VMXOFF, after which an INIT that VMX operation has blocked takes effect.
fn vmxoff(vcpu: &mut Vcpu) -> Action {
    let action = instructions::handle(vcpu, ExitReason::VMXOFF);
    reset::deliver_blocked_init(vcpu);
    action
}

/// XSETBV exits whatever the controls say. The host uses no extended state, so the guest hypervisor's XCR0 is the
/// machine's. At a privilege level other than 0 it faults before it exits (SDM 26.1.1 "Relative Priority of Faults and
/// VM Exits"), but not in every emulation of a processor.
fn xsetbv(vcpu: &mut Vcpu) -> Action {
    if vcpu.cpl() != 0 {
        return Action::Inject(Fault::GeneralProtection);
    }
    match on_behalf::xsetbv(vcpu.ecx(), vcpu.edx_eax()) {
        Ok(()) => Action::Advance,
        Err(_) => Action::Inject(Fault::GeneralProtection),
    }
}

/// INVD exits whatever the controls say. DEVIATION: caches are written back, not dropped, as every hypervisor does:
/// dropping would lose the host's own data too.
fn invd() -> Action {
    on_behalf::write_back_caches();
    Action::Advance
}

#[cold]
fn triple_fault(vcpu: &mut Vcpu) -> ! {
    shut_down(vcpu, format_args!("triple-faulted"), "look there for its bug")
}

#[cold]
fn switch_tasks(vcpu: &mut Vcpu) -> Action {
    match task_switch::handle(vcpu) {
        Ok(action) => action,
        Err(Impossible::TripleFault) => triple_fault(vcpu),
        Err(Impossible::ShadowStacks) => {
            let why = format_args!("switched between tasks with shadow stacks, which l1hv does not do,");
            shut_down(vcpu, why, "run it without shadow stacks or without 32-bit tasks")
        }
    }
}

/// The guest's processor is in shutdown state, which the chipset turns into a reset.
#[cold]
fn shut_down(vcpu: &mut Vcpu, why: fmt::Arguments<'_>, advice: &str) -> ! {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (rip, cs, cr3) = (vmcs01.read(GUEST_RIP), vmcs01.read(GUEST_CS_SELECTOR), vmcs01.read(GUEST_CR3));
    if vcpu.machine.on_triple_fault == TripleFault::Reset {
        log::info!("the guest hypervisor {why} at {cs:#x}:{rip:#x} (CR3 {cr3:#x}): the machine is reset");
        reset_machine();
    }
    let message = format_args!("the guest hypervisor {why} at {cs:#x}:{rip:#x} (CR3 {cr3:#x}): {advice}");
    stop(StopReason::new(StopKind::TripleFault, message))
}

/// VM entry of vmcs01 failed after its checks of controls and host state.
#[cold]
fn entry_failed_late(vcpu: &mut Vcpu, reason: ExitReason) -> Action {
    let qualification = vcpu.vmcs.vmcs01().read(EXIT_QUALIFICATION);
    Action::Inject(refused(vcpu, format_args!("{reason:?}, qualification {qualification:#x}")))
}

/// The processor refuses to enter vmcs01. If the host has just emulated an access to a control register, that access is
/// at fault, and the processor itself would have refused it: the access is undone, and its fault is returned. Otherwise
/// the processor shuts down, as if an event could not be delivered.
#[cold]
pub fn refused(vcpu: &mut Vcpu, why: fmt::Arguments<'_>) -> Fault {
    if control_registers::undo(vcpu) {
        crate::log::warn_of_repeatable(format_args!(
            "the processor refuses the guest hypervisor's control registers ({why}): #GP"
        ));
        return Fault::GeneralProtection;
    }
    shut_down(vcpu, format_args!("has a state that the processor refuses ({why})"), "look there for what led to it")
}

/// An exit that no control asks for and that no processor with known features causes. An instruction that exits so is
/// undefined for the guest; an event is ignored.
#[cold]
fn unexpected_exit(vcpu: &mut Vcpu, reason: ExitReason) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (rip, qualification) = (vmcs01.read(GUEST_RIP), vmcs01.read(EXIT_QUALIFICATION));
    let is_instruction = reason.info().is_none_or(|info| info.fills.contains(Fills::LENGTH));
    let answer = if is_instruction { "#UD" } else { "nothing" };
    crate::log::warn_of_repeatable(format_args!(
        "the guest hypervisor exited for {reason:?} at {rip:#x}, qualification {qualification:#x}, which no control asks for: {answer}"
    ));
    if is_instruction { Action::Inject(Fault::InvalidOpcode) } else { Action::Resume }
}

fn stop_on_misconfiguration(vcpu: &mut Vcpu) -> ! {
    let address = vcpu.vmcs.vmcs01().read(GUEST_PHYSICAL_ADDRESS);
    crate::stop::stop_internal!("EPT01 is misconfigured at {address:#x}")
}
