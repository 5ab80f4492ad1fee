//! The short way: an exit and the VMRESUME after it, when neither VMCS12 nor a merged bitmap has changed since the last
//! full merge.
//!
//! Such an exit only sets `exit_is_unsettled` in VMCS12. Code that reads VMCS12 calls `settle()` first. As long as the
//! flag is set, the last merge is valid.

use crate::Vmcs12;
use crate::controls::{Pin, Secondary};
use crate::fields::*;
use crate::host_load::is_self_contained;

use super::machine::{Machine, VmcsPair};
use super::vcpu::{Shortcut, Vcpu};
use super::write_traps;

impl Shortcut {
    /// The shortcut for a VMCS12 that has just been merged. `entries_load` says whether its entries load or copy
    /// something besides fields of vmcs02.
    pub fn after(vmcs12: &Vmcs12, entries_load: bool) -> Self {
        // Without VPIDs each transition drops translations; with VMCS shadowing the linked region may change, and the
        // host may have to handle an exit.
        let either = vmcs12.has_secondary(Secondary::ENABLE_VPID) && !vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
        // Without VMCS shadowing for the guest hypervisor an exit saves state in VMCS12. Without virtual NMIs the guest
        // hypervisor inherits the blocking.
        let exit = !vmcs12.live.is_empty()
            && is_self_contained(vmcs12)
            && vmcs12.get(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS)
            && vmcs12.get(EXIT_MSR_STORE_COUNT) == 0
            && vmcs12.get(EXIT_MSR_LOAD_COUNT) == 0;
        let entry = !entries_load && vmcs12.get(VMCS_LINK_POINTER) == u64::MAX;
        Self { entry: either && entry, exit: either && exit }
    }
}

/// Gives the guest hypervisor an exit whose information is in vmcs02 already. To be called if [`Shortcut::exit`] is
/// true, no injection is displaced and no NMI is blocked.
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
