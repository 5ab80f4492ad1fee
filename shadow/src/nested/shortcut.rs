//! The short way: an exit and the VMRESUME after it, when neither VMCS12 nor a merged bitmap has changed since the last
//! full merge.
//!
//! Such an exit only sets `exit_is_unsettled` in VMCS12. Code that reads VMCS12 calls `settle()` first. As long as the
//! flag is set, the last merge is valid.

use crate::Vmcs12;
use crate::controls::{Pin, Secondary};
use crate::fields::*;
use crate::host_load::is_self_contained;

use super::held_ports::Bitmaps02;
use super::machine::{Machine, VmcsPair};
use super::vcpu::{Shortcut, Vcpu};
use super::write_traps;
use crate::policy::IoExits;

impl Shortcut {
    /// For a VMCS12 that has just been merged; `entries_load` if its entries load or copy something that is no field of
    /// vmcs02. `bitmaps02` is of the I/O bitmaps.
    pub fn after(vmcs12: &Vmcs12, entries_load: bool, bitmaps02: Option<Bitmaps02>) -> Self {
        // Without VPIDs each transition drops translations; with VMCS shadowing the linked region may change, and an
        // exit may be the host's.
        let either = vmcs12.has_secondary(Secondary::ENABLE_VPID) && !vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
        // Without VMCS shadowing for the guest hypervisor an exit saves state in VMCS12. Without virtual NMIs the guest
        // hypervisor inherits the blocking.
        let exit = !vmcs12.live.is_empty()
            && is_self_contained(vmcs12)
            && vmcs12.get(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS)
            && vmcs12.get(EXIT_MSR_STORE_COUNT) == 0
            && vmcs12.get(EXIT_MSR_LOAD_COUNT) == 0;
        // Only the long way looks whether merged I/O bitmaps have changed.
        let merges_io = bitmaps02.is_some_and(|bitmaps| bitmaps.are_merged);
        let entry = !entries_load && !merges_io && vmcs12.get(VMCS_LINK_POINTER) == u64::MAX;
        let io = if bitmaps02.is_some() { IoExits::HostsToo } else { IoExits::GuestHypervisors };
        Self { entry: either && entry, exit: either && exit, io }
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
