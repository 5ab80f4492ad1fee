//! Nesting: entering a nested guest for its hypervisor, and reflecting the exits to which that hypervisor is entitled.
//!
//! ```text
//!   VMLAUNCH/VMRESUME -> entry:    check -> merge into vmcs02 -> VM entry
//!   exit of vmcs02    -> dispatch: route -> the host repairs and resumes, or
//!                        reflect:  sync to VMCS12 -> VMCS12's host state into vmcs01
//! ```
//!
//! A processor is in one of four states ([`Running`]); these are all transitions:
//!
//! ```text
//!            VMLAUNCH, VMRESUME                      vmcs02 exits
//!           +------ begin_entry ------>  Entering  -- entry_accepted --+
//!           |                               |                          v
//!   GuestHypervisor <- leave_to_hypervisor -+-----------------  NestedGuest <-+
//!           ^    |       VMfail, entry failure, reflected exit         |      |
//!           |    | VMCS12 loads MSRs on exits                          +------+
//!   vmcs01 exits v                                              the host repairs and resumes
//!   GuestHypervisorLoadingMsrs
//! ```
//!
//! Everything here is generic over a [`Machine`]: l1hv has the real one, the tests a model of a processor.

mod beyond;
pub mod control_registers;
mod dispatch;
mod entry;
mod ept12_memory;
mod fault;
pub mod guest_msr;
pub mod held_ports;
mod injection;
pub mod instructions;
mod machine;
mod msr_bitmap;
mod nested_ept;
mod nested_shadowing;
pub mod nmi;
mod page_log;
pub mod ports;
mod quick_access;
mod reflect;
mod shortcut;
pub mod task_switch;
#[cfg(test)]
mod tests;
mod vcpu;
mod virtualization_exception;
mod vm_function;
mod vmcs_shadowing;
mod watching;
pub mod write_traps;

use crate::event::{BLOCKING_BY_MOV_SS, privilege_level};
use crate::exit::ExitReason;
use crate::fields::{ENTRY_MSR_LOAD_COUNT, GUEST_INTERRUPTIBILITY, GUEST_SS_ACCESS_RIGHTS};
use crate::host_load::VmxAbort;
use crate::hw::VmcsAccess;
use crate::merge;
use crate::policy::is_always_reflected;
use crate::registers::RCX;
use crate::vmcs12::LaunchState;
use crate::watch::MergedAs;

pub use beyond::fault as fault_beyond_width;
pub use dispatch::handle_failed_entry;
pub use machine::{Invept, Invvpid, Machine, Protection, Stop, VmcsPair, WatchedMemory};
pub use nested_ept::map_beyond;
use reflect::abort;
pub use vcpu::{
    Action, Displaced, MsrArea, MsrAreas, Nested, NestedEpt, NestedShadowing, Running, SHARED_VPID02, Shortcut, Undo,
    VPID01, Vcpu,
};
pub use watching::drop_what_ept01_forbids;

/// Handles an exit of vmcs02. Nearly always the guest hypervisor gets it by the short way.
#[inline(always)]
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    let Shortcut { exit, io, .. } = vcpu.nested.shortcut;
    if exit && vcpu.nested.displaced.is_none() && is_always_reflected(reason, vcpu.registers[RCX], io) {
        vcpu.vmcs.note_entry_of_vmcs02();
        vcpu.vmx.vmcs12.launch_state = LaunchState::Launched;
        vcpu.machine.count_reflected(reason);
        shortcut::leave(vcpu);
    } else {
        dispatch::handle_at_length(vcpu, reason);
    }
}

/// Completes the last transition to vmcs01, and carries out an instruction of the guest hypervisor by the short way if
/// possible. Returns whether the instruction was carried out; if not, the caller must handle the exit.
#[inline(always)]
pub fn handle_quickly<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) -> bool {
    if reason == ExitReason::VMRESUME && resume(vcpu) {
        return true;
    }
    if vcpu.running == Running::GuestHypervisorLoadingMsrs {
        end_of_host_msr_load(vcpu, reason);
    }
    match reason {
        ExitReason::VMREAD => quick_access::vmread(vcpu),
        ExitReason::VMWRITE => quick_access::vmwrite(vcpu),
        _ => false,
    }
}

/// VMRESUME by the short way. Returns whether it was carried out; if not, the caller must take the long way.
#[inline(always)]
fn resume<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
    if !vcpu.vmx.vmcs12.exit_is_unsettled
        || !vcpu.nested.shortcut.entry
        || vcpu.memory.watches(MergedAs::MsrBitmap).have_changed()
    {
        return false;
    }
    let vmcs01 = vcpu.vmcs.vmcs01();
    let stack_rights = vmcs01.read(GUEST_SS_ACCESS_RIGHTS);
    let interruptibility = vmcs01.read(GUEST_INTERRUPTIBILITY);
    if privilege_level(stack_rights) != 0 || interruptibility & BLOCKING_BY_MOV_SS != 0 {
        return false;
    }
    vcpu.nested.kept.stack_rights = stack_rights;
    vcpu.nested.kept.interruptibility = interruptibility;
    if vcpu.nested.ept.violation.is_some() {
        nested_ept::fill_after_reflected_violation(vcpu);
    }
    merge::rewrite(vcpu.vmcs.vmcs02(), &vcpu.vmx.vmcs12);
    vcpu.begin_entry();
    true
}

/// Completes an entry of vmcs01 that loaded the MSRs of VMCS12's VM-exit MSR-load area, or failed to.
#[cold]
fn end_of_host_msr_load<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    vcpu.leave_to_hypervisor();
    if reason == ExitReason::ENTRY_FAILURE_MSR_LOADING.of_failed_entry() {
        abort(vcpu, VmxAbort::LoadingHostMsrs);
    }
    vcpu.vmcs.vmcs01().write(ENTRY_MSR_LOAD_COUNT, 0);
}
