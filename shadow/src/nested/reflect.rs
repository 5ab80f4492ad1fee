//! Giving an exit to the guest hypervisor (SDM 28 "VM Exits").

use crate::FieldSet;
use crate::controls::{EntryControls, Pin, Primary, Secondary};
use crate::event::{BLOCKING_BY_NMI, NMI_INTERRUPTION, set_resume_flag};
use crate::exit::{ExitReason, InterruptionInfo};
use crate::fields::*;
use crate::host_load::{LeftBehind, VmxAbort, load_host_state};
use crate::hw::VmcsAccess;
use crate::merge::{self, AreaError};
use crate::msr::*;
use crate::passing;
use crate::sync::{save_exit_info, save_guest_state};
use crate::vmcs12::write_abort_indicator;
use ept::Gpa;

use super::guest_msr::read_for_guest;
use super::machine::{Invvpid, Machine, Stop, VmcsPair};
use super::vcpu::{Running, SHARED_VPID02, VPID01, Vcpu};
use super::{injection, shortcut};

/// How the exit that vmcs02 took appears to the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reflected {
    /// With all exit information of vmcs02.
    AsTaken(ExitReason),
    /// With another reason and qualification.
    Changed {
        /// The reason.
        reason: ExitReason,
        /// The qualification.
        qualification: u64,
    },
}

/// Reflects the exit that vmcs02 just took.
pub fn reflect<M: Machine>(vcpu: &mut Vcpu<M>, exit: Reflected) {
    if vcpu.vmx.vmcs12.live.is_empty() {
        save_exit_info(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12, &vcpu.sync_sets);
    }
    match exit {
        Reflected::AsTaken(reason) => leave(vcpu, reason),
        Reflected::Changed { reason, qualification } => {
            vcpu.set_exit_info(EXIT_REASON, reason.0);
            vcpu.set_exit_info(EXIT_QUALIFICATION, qualification);
            leave(vcpu, reason);
        }
    }
}

/// Reflects a fault that an instruction raised which the host emulated. RFLAGS.RF is saved as delivering the fault
/// would have saved it (SDM 28.3.3 "Saving RIP, RSP, RFLAGS, and SSP").
pub fn reflect_fault<M: Machine>(
    vcpu: &mut Vcpu<M>,
    info: InterruptionInfo,
    error_code: Option<u32>,
    qualification: u64,
) {
    set_resume_flag(vcpu.vmcs.vmcs02());
    reflect_without_exit(vcpu, ExitReason::EXCEPTION_OR_NMI, qualification, info, error_code);
}

/// The host has executed an instruction of the nested guest. With the monitor trap flag the nested guest exits after it
/// (SDM 26.5.2 "Monitor Trap Flag"): for the processor it has not executed any instruction yet.
pub fn complete_instruction<M: Machine>(vcpu: &mut Vcpu<M>) {
    vcpu.advance();
    if vcpu.vmx.vmcs12.get(PRIMARY_CONTROLS).contains(Primary::MONITOR_TRAP_FLAG) {
        reflect_without_exit(vcpu, ExitReason::MONITOR_TRAP_FLAG, 0, InterruptionInfo(0), None);
    }
}

/// Reflects an NMI that arrived while the host ran, after the nested guest did.
pub fn nmi<M: Machine>(vcpu: &mut Vcpu<M>) {
    reflect_without_exit(vcpu, ExitReason::EXCEPTION_OR_NMI, 0, NMI_INTERRUPTION, None);
}

/// Reflects that the nested guest cannot go on after an exit that the host handled, because another processor has
/// lowered VTPR below the TPR threshold meanwhile. The nested guest exits as it would at its next access to TPR (SDM
/// 30.1.2 "TPR Virtualization").
pub fn tpr_below_threshold<M: Machine>(vcpu: &mut Vcpu<M>) {
    reflect_without_exit(vcpu, ExitReason::TPR_BELOW_THRESHOLD, 0, InterruptionInfo(0), None);
}

/// Reflects that the nested guest cannot go on at all. An exit by a triple fault interrupts the delivery of no event
/// (SDM 28.2.4 "Information for VM Exits During Event Delivery").
pub fn triple_fault<M: Machine>(vcpu: &mut Vcpu<M>) {
    let _ = injection::take_pending(vcpu);
    reflect_without_exit(vcpu, ExitReason::TRIPLE_FAULT, 0, InterruptionInfo(0), None);
}

/// Reflects an exit that vmcs02 did not take.
fn reflect_without_exit<M: Machine>(
    vcpu: &mut Vcpu<M>,
    reason: ExitReason,
    qualification: u64,
    info: InterruptionInfo,
    error_code: Option<u32>,
) {
    // An event that was to be injected on an entry that does not come is one whose delivery this exit interrupts.
    let pending = injection::take_pending(vcpu);
    vcpu.set_exit_info(EXIT_REASON, reason.0);
    vcpu.set_exit_info(EXIT_QUALIFICATION, qualification);
    vcpu.set_exit_info(EXIT_INTERRUPTION_INFO, info.0);
    vcpu.set_exit_info(EXIT_INTERRUPTION_ERROR_CODE, error_code.unwrap_or(0));
    vcpu.set_exit_info(IDT_VECTORING_INFO, if pending.info.is_valid() { pending.info.0 } else { 0 });
    if pending.info.has_error_code() {
        vcpu.set_exit_info(IDT_VECTORING_ERROR_CODE, pending.error_code);
    }
    if pending.info.needs_instruction_length() {
        vcpu.set_exit_info(EXIT_INSTRUCTION_LENGTH, pending.instruction_length);
    }
    leave(vcpu, reason);
}

/// Leaves a nested guest that ran. Its state goes to VMCS12, and the guest hypervisor continues at its exit handler.
fn leave<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    vcpu.machine.count_reflected(reason);
    let by_nmi =
        reason == ExitReason::EXCEPTION_OR_NMI && InterruptionInfo(vcpu.vmcs12_field(EXIT_INTERRUPTION_INFO)).is_nmi();
    if vcpu.nested.shortcut.exit && vcpu.nested.displaced.is_none() && !by_nmi {
        return shortcut::leave(vcpu);
    }
    injection::give_back(vcpu);
    save_guest_state(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12, &vcpu.sync_sets);
    let virtual_nmis = vcpu.vmx.vmcs12.get(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS);
    let was_blocked = !virtual_nmis && vcpu.vmcs12_field(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0;
    let vmcs12 = &vcpu.vmx.vmcs12;
    let left = LeftBehind::read(vcpu.vmcs.vmcs02(), vmcs12, by_nmi || was_blocked);
    if vmcs12.get(EXIT_MSR_STORE_COUNT) != 0 && store_msrs(vcpu).is_err() {
        abort(vcpu, VmxAbort::SavingGuestMsrs);
    }
    resume_guest_hypervisor(vcpu, left);
}

/// Fills the VM-exit MSR-store area, with the nested guest's values: what the exit has not saved in vmcs02 it has not
/// changed in the processor.
fn store_msrs<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), AreaError> {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let vmcs12 = &vcpu.vmx.vmcs12;
    let (area, count) = (Gpa(vmcs12.get(EXIT_MSR_STORE_ADDRESS)), vmcs12.get(EXIT_MSR_STORE_COUNT));
    let saved =
        |msr| saved_msr(vmcs02, msr).or_else(|| saved_passing_msr(&vcpu.machine, vmcs02, &vcpu.offered_fields, msr));
    let read = |msr| saved(msr).or_else(|| read_for_guest(&vcpu.machine, &vcpu.offered, msr).ok());
    merge::store(&vcpu.memory, area, count, read)
}

/// An MSR of the nested guest that its exit has saved in vmcs02, because the processor now holds the host's value.
fn saved_msr(vmcs02: &impl VmcsAccess, msr: u32) -> Option<u64> {
    Some(match msr {
        IA32_SYSENTER_CS => u64::from(vmcs02.read(GUEST_SYSENTER_CS)),
        IA32_SYSENTER_ESP => vmcs02.read(GUEST_SYSENTER_ESP),
        IA32_SYSENTER_EIP => vmcs02.read(GUEST_SYSENTER_EIP),
        IA32_DEBUGCTL => vmcs02.read(GUEST_DEBUGCTL),
        IA32_PAT => vmcs02.read(GUEST_PAT),
        IA32_EFER => vmcs02.read(GUEST_EFER),
        IA32_FS_BASE => vmcs02.read(GUEST_FS_BASE),
        IA32_GS_BASE => vmcs02.read(GUEST_GS_BASE),
        _ => return None,
    })
}

/// An MSR of the nested guest into which its exit may have loaded the guest hypervisor's value.
fn saved_passing_msr(machine: &impl Machine, vmcs02: &impl VmcsAccess, fields: &FieldSet, msr: u32) -> Option<u64> {
    let saved = |field: Field<u64>| fields.contains(field.id()).then(|| vmcs02.read(field));
    match msr {
        IA32_S_CET => saved(GUEST_S_CET),
        IA32_INTERRUPT_SSP_TABLE_ADDR => saved(GUEST_SSP_TABLE),
        IA32_PKRS => saved(GUEST_PKRS),
        IA32_UINTR_MISC if fields.contains(GUEST_UINV.id()) => {
            // UINV is in bits 39:32; the VMCS does not hold the rest.
            let rest = machine.read_msr(msr)? & !(0xff << 32);
            Some(rest | u64::from(vmcs02.read(GUEST_UINV)) << 32)
        }
        _ => None,
    }
}

/// Reflects an entry failure of the late kind (SDM 27.8): only exit reason and qualification are written, and guest
/// state is not saved.
pub fn reflect_failed_entry<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason, qualification: u64) {
    let reason = reason.of_failed_entry();
    log::debug!("{reason:?}, qualification {qualification:#x}");
    vcpu.machine.count_reflected(reason);
    vcpu.leave_to_hypervisor();
    if passing::inherits(&vcpu.vmx.vmcs12) {
        passing::write(vcpu.vmcs.vmcs02(), &vcpu.nested.displaced_registers);
    }
    let left = left_by_failed_entry(vcpu, reason, qualification);
    vcpu.set_exit_info(EXIT_REASON, reason.0);
    vcpu.set_exit_info(EXIT_QUALIFICATION, qualification);
    resume_guest_hypervisor(vcpu, left);
}

/// Registers as a failed entry leaves them for a VM exit that does not load them. An entry that fails while it loads MSRs
/// has loaded PAT and EFER of the guest-state area before, and the MSRs of the entries before the one at fault (SDM
/// 27.8 "VM-Entry Failures During or After Loading Guest State").
fn left_by_failed_entry<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason, qualification: u64) -> LeftBehind {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let nmi_blocked = vmcs01.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0;
    let mut left = LeftBehind { pat: vmcs01.read(GUEST_PAT), efer: vmcs01.read(GUEST_EFER), nmi_blocked };
    if reason.without_modifiers() != ExitReason::ENTRY_FAILURE_MSR_LOADING {
        return left;
    }
    let entry = vcpu.vmx.vmcs12.get(ENTRY_CONTROLS);
    if entry.contains(EntryControls::LOAD_PAT) {
        left.pat = vcpu.vmcs12_field(GUEST_PAT);
    }
    if entry.contains(EntryControls::LOAD_EFER) {
        left.efer = vcpu.vmcs12_field(GUEST_EFER);
    }
    let loaded = vcpu.nested.areas.entry_load.entries.iter().take((qualification as usize).saturating_sub(1));
    for msr in loaded {
        match msr.index {
            IA32_PAT => left.pat = msr.value,
            IA32_EFER => left.efer = msr.value,
            _ => (),
        }
    }
    left
}

fn resume_guest_hypervisor<M: Machine>(vcpu: &mut Vcpu<M>, left: LeftBehind) {
    if !vcpu.vmx.vmcs12.has_secondary(Secondary::ENABLE_VPID) {
        vcpu.machine.invvpid(Invvpid::Single(VPID01));
        vcpu.machine.invvpid(Invvpid::Single(SHARED_VPID02));
    }
    vcpu.leave_to_hypervisor();
    let loaded = {
        let vmcs01 = vcpu.vmcs.vmcs01();
        let (vmcs12, image) = (&vcpu.vmx.vmcs12, &vcpu.nested.host_image);
        load_host_state(vmcs01, vmcs12, image, &vcpu.offered, &vcpu.memory, &left)
    };
    // VMCS12's controls may keep registers of the nested guest, or load registers from its MSR area.
    vcpu.nested.kept.forget();
    let loaded = loaded.and_then(|()| load_host_msrs(vcpu));
    if let Err(reason) = loaded {
        abort(vcpu, reason);
    }
}

/// VMCS12's VM-exit MSR-load area becomes vmcs01's VM-entry MSR-load area, for one entry.
fn load_host_msrs<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), VmxAbort> {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let count = vmcs12.get(EXIT_MSR_LOAD_COUNT);
    if count == 0 {
        return Ok(());
    }
    let area = Gpa(vmcs12.get(EXIT_MSR_LOAD_ADDRESS));
    merge::copy_in(&vcpu.memory, area, count, merge::is_loadable, vcpu.nested.areas.host_load.entries)
        .map_err(|_| VmxAbort::LoadingHostMsrs)?;
    vcpu.vmcs.vmcs01().write(ENTRY_MSR_LOAD_COUNT, count);
    vcpu.running = Running::GuestHypervisorLoadingMsrs;
    Ok(())
}

/// A VMX abort: the processor is in shutdown state (SDM 28.7 "VMX Aborts"), and the machine stops with the reason.
/// DEVIATION: the other processors of a bare machine may run on until the chipset turns the shutdown into a reset.
#[cold]
pub fn abort<M: Machine>(vcpu: &mut Vcpu<M>, reason: VmxAbort) -> ! {
    write_abort_indicator(&vcpu.memory, vcpu.vmx.vmcs12.pointer, reason as u32);
    vcpu.machine.stop(Stop::VmxAbort(reason))
}
