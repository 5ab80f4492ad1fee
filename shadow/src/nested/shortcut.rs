//! The round trip that is the product, when nothing has changed since the last one: an exit that the guest hypervisor gets, its handler,
//! its VMRESUME.
//!
//! VMCS12 is not touched at all: it keeps a note that an exit has yet to be settled, and whoever looks at it settles. As long as nobody
//! did, what the last merge found still stands.

use crate::controls::{Pin, Secondary};
use crate::event::{BLOCKING_BY_MOV_SS, privilege_level};
use crate::fields::*;
use crate::host_load::is_self_contained;
use crate::hw::VmcsAccess;
use crate::{Vmcs12, merge};

use super::machine::{Machine, VmcsPair, WatchedMemory};
use super::vcpu::Vcpu;
use super::{nested_ept, write_traps};
use crate::watch::MergedAs;

/// What a transition may leave out, as the last full merge found. Both stand as long as VMCS12 is unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shortcut {
    /// Entries need no more than [`merge::rewrite`].
    pub entry: bool,
    /// Exits need no more than VMCS12's host state, and leave all else where it is.
    pub exit: bool,
}

impl Shortcut {
    /// For a VMCS12 that has just been merged; `entries_load` if its entries load or copy something that is no field of vmcs02.
    pub fn after(vmcs12: &Vmcs12, entries_load: bool) -> Self {
        // Without VPIDs each transition drops translations; with VMCS shadowing the linked region may change, and an exit may be the host's.
        let either = vmcs12.has_secondary(Secondary::ENABLE_VPID) && !vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
        // Without VMCS shadowing for the guest hypervisor an exit saves state in VMCS12. Without virtual NMIs the guest hypervisor inherits the
        // blocking.
        let exit = !vmcs12.live.is_empty()
            && is_self_contained(vmcs12)
            && vmcs12.get(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS)
            && vmcs12.get(EXIT_MSR_STORE_COUNT) == 0
            && vmcs12.get(EXIT_MSR_LOAD_COUNT) == 0;
        let entry = !entries_load && vmcs12.get(VMCS_LINK_POINTER) == u64::MAX;
        Self { entry: either && entry, exit: either && exit }
    }
}

/// VMRESUME. Returns whether it was carried out; if not, the long way has to be taken.
#[inline(always)]
pub fn resume<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
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
        nested_ept::anticipate(vcpu);
    }
    merge::rewrite(vcpu.vmcs.vmcs02(), &vcpu.vmx.vmcs12);
    vcpu.begin_entry();
    true
}

/// The guest hypervisor gets an exit, whose information is in vmcs02 already. To be called if exits are short, no injection is displaced
/// and no NMI is blocked.
#[inline(always)]
pub fn leave<M: Machine>(vcpu: &mut Vcpu<M>) {
    vcpu.vmx.vmcs12.exit_is_unsettled = true;
    vcpu.leave_to_hypervisor();
    let (image, kept) = (&vcpu.nested.host_image, &mut vcpu.nested.kept);
    let vmcs01 = vcpu.vmcs.vmcs01();
    image.load_changed(vmcs01, kept);
    let (registers_hold, tables_hold) = (kept.registers.holds(), kept.tables.holds());
    if !(registers_hold && tables_hold) {
        write_traps::load(vcpu, registers_hold, tables_hold);
    }
}
