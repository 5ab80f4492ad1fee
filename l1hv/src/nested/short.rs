//! The round trip that is the product, when nothing has changed since the last one: an exit that the guest hypervisor gets, its handler,
//! its VMRESUME.
//!
//! VMCS12 is not touched at all: it keeps a note that an exit has yet to be settled, and whoever looks at it settles. As long as nobody
//! did, what the last merge found still stands.

use shadow::controls::{Pin, Secondary};
use shadow::event::{BLOCKING_BY_MOV_SS, privilege_level};
use shadow::fields::*;
use shadow::host_load::is_self_contained;
use shadow::hw::VmcsAccess;
use shadow::{Vmcs12, merge};

use super::{paging, trap};
use crate::vcpu::{Level, Vcpu};

/// Whether exits of a nested guest need no more than VMCS12's host state.
pub fn exits_are_short(vmcs12: &Vmcs12) -> bool {
    // Without virtual NMIs the guest hypervisor inherits the blocking; without VPIDs translations are dropped; with VMCS shadowing an
    // exit may be the host's.
    !vmcs12.live.is_empty()
        && is_self_contained(vmcs12)
        && vmcs12.has_secondary(Secondary::ENABLE_VPID)
        && !vmcs12.has_secondary(Secondary::VMCS_SHADOWING)
        && vmcs12.get(PIN_CONTROLS) & Pin::VIRTUAL_NMIS.bits() != 0
        && vmcs12.get(EXIT_MSR_STORE_COUNT) == 0
        && vmcs12.get(EXIT_MSR_LOAD_COUNT) == 0
}

/// VMRESUME. Returns whether it was carried out; if not, the long way has to be taken.
#[inline(always)]
pub fn resume(vcpu: &mut Vcpu) -> bool {
    if !vcpu.vmx.vmcs12.exit_is_unsettled || !vcpu.nested.short_entry || vcpu.memory.watches.have_changed() {
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
    if vcpu.nested.violation.is_some() {
        paging::anticipate(vcpu);
    }
    merge::rewrite(&mut vcpu.vmcs.vmcs02(), &vcpu.vmx.vmcs12);
    vcpu.level = Level::Nested;
    vcpu.nested.entering = true;
    true
}

/// The guest hypervisor gets an exit, whose information is in vmcs02 already. To be called if exits are short, no injection is displaced
/// and no NMI is blocked.
#[inline(always)]
pub fn leave(vcpu: &mut Vcpu) {
    vcpu.vmx.vmcs12.exit_is_unsettled = true;
    vcpu.level = Level::GuestHypervisor;
    let (image, kept) = (&vcpu.nested.host_image, &mut vcpu.nested.kept);
    let mut vmcs01 = vcpu.vmcs.vmcs01();
    image.load_changed(&mut vmcs01, kept);
    let (registers_hold, tables_hold) = (kept.registers.holds(), kept.tables.holds());
    if !(registers_hold && tables_hold) {
        trap::load(vcpu, registers_hold, tables_hold);
    }
}
