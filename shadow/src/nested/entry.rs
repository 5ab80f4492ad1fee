//! VMLAUNCH and VMRESUME of the guest hypervisor (SDM 27 "VM Entries").

use crate::check::{self, Violation};
use crate::controls::{EntryControls, Secondary};
use crate::fields::*;
use crate::host_load::HostImage;
use crate::hw::VmcsAccess;
use crate::merge::{self, Inherited, Surroundings};
use crate::outcome::{Failure, InsnError};
use crate::passing;
use crate::sync::{save_stale, save_stale_controls};
use crate::vmcs12::LaunchState;
use crate::{FieldSet, Vmcs12};
use ept::{Gpa, PageSize};

use super::machine::{Invvpid, Machine, VmcsPair, WatchedMemory};
use super::vcpu::{SHARED_VPID02, Shortcut, VPID01, Vcpu, vpid02};
use super::{msr_bitmap, nested_ept, nested_shadowing, ports};
use crate::watch::{MergedAs, ProcessorWritten};

/// Prepares the entry, or fails as the instruction does. After an entry failure of the late kind the guest hypervisor
/// runs again, at its exit handler.
pub fn enter<M: Machine>(vcpu: &mut Vcpu<M>, wanted: LaunchState) -> Result<(), Failure> {
    let interruptibility = vcpu.vmcs.vmcs01().read(GUEST_INTERRUPTIBILITY);
    vcpu.vmx.check_launch(wanted, interruptibility)?;
    vcpu.nested.kept.interruptibility = interruptibility;
    vcpu.nested.kept.stack_rights = vcpu.vmcs.vmcs01().read(GUEST_SS_ACCESS_RIGHTS);
    vcpu.vmx.vmcs12.settle();
    // A page that changed before now either belongs to this VMCS12, and `is_merged` below notices, or to another
    // VMCS12, which will notice at its own entry.
    vcpu.memory.watches(MergedAs::MsrBitmap).begin_merge();
    let unchanged = vcpu.nested.shortcut.entry && vcpu.vmx.vmcs12.is_unchanged();
    if unchanged && msr_bitmap::is_merged(vcpu) {
        if vcpu.nested.ept.violation.is_some() {
            nested_ept::fill_after_reflected_violation(vcpu);
        }
        merge::prepare_unchanged(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12);
    } else {
        check_and_merge(vcpu)?;
    }
    if vcpu.init_blocked {
        // In VMX non-root operation an INIT causes an exit. The processor itself orders it among the other events that
        // follow an entry.
        vcpu.init_blocked = !vcpu.machine.send_init_to_self();
    }
    vcpu.begin_entry();
    Ok(())
}

/// Makes all checks that the processor cannot make, and the whole merge.
fn check_and_merge<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    let inherited = Inherited::read(vcpu.vmcs.vmcs01(), &vcpu.vmx.vmcs12);
    save_stale_controls(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12);
    let vmcs12 = &vcpu.vmx.vmcs12;
    if vmcs12.dirty.intersects(&merge::CHECKED_CONTROLS) {
        check::controls_of_vmcs12(vmcs12, &vcpu.offered)
            .map_err(|violation| refused(violation, InsnError::ENTRY_INVALID_CONTROL))?;
    }
    if vmcs12.dirty.intersects(&merge::CHECKED_HOST_STATE) {
        const OTHERS: FieldSet = merge::CHECKED_HOST_STATE.minus(&check::HOST_BASES);
        let checked = match vmcs12.dirty.intersects(&OTHERS) {
            true => check::host_state(vmcs12, &vcpu.offered, vcpu.mode),
            false => check::host_bases(vmcs12, &vcpu.offered),
        };
        if let Err(violation) = checked {
            return Err(refused_with_host_state(vcpu, violation));
        }
        let vmcs12 = &vcpu.vmx.vmcs12;
        if vmcs12.dirty.intersects(&HostImage::SOURCE) {
            vcpu.nested.host_image.update(vmcs12, &mut vcpu.nested.kept);
        }
    }
    let pdptes = pdptes_from_memory(vcpu);
    merge(vcpu, inherited, pdptes);
    Ok(())
}

/// A processor may check controls and host state in any order (SDM 27.2 "Checks on VMX Controls and Host-State Area").
/// So that a guest hypervisor sees one order, controls come first, those among them that vmcs02 has to show the
/// processor.
#[cold]
fn refused_with_host_state<M: Machine>(vcpu: &mut Vcpu<M>, violation: Violation) -> Failure {
    save_stale(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12);
    match check::controls(&vcpu.vmx.vmcs12, &vcpu.offered, &vcpu.memory) {
        Err(violation) => refused(violation, InsnError::ENTRY_INVALID_CONTROL),
        Ok(()) => refused(violation, InsnError::ENTRY_INVALID_HOST_STATE),
    }
}

#[cold]
fn refused(violation: Violation, error: InsnError) -> Failure {
    log::debug!("VM entry refused, error {}: {}", error.0, violation.0);
    error.into()
}

/// Whether vmcs02 has the PDPTEs, or needs none: the nested guest has an EPT12, or is in IA-32e mode.
#[inline]
fn pdptes_are_in_vmcs02(vmcs12: &Vmcs12) -> bool {
    vmcs12.has_secondary(Secondary::ENABLE_EPT) || vmcs12.get(ENTRY_CONTROLS).contains(EntryControls::IA32E_MODE_GUEST)
}

/// Without EPT12 a PAE guest's PDPTEs come from memory at every entry. The processor checks them, after the rest of the
/// guest state.
fn pdptes_from_memory<M: Machine>(vcpu: &mut Vcpu<M>) -> Option<[u64; 4]> {
    let vmcs12 = &vcpu.vmx.vmcs12;
    if pdptes_are_in_vmcs02(vmcs12) {
        return None;
    }
    let cr0 = vcpu.vmcs12_field(GUEST_CR0);
    let (cr3, cr4) = (vcpu.vmcs12_field(GUEST_CR3), vcpu.vmcs12_field(GUEST_CR4));
    check::read_pdptes(&vcpu.memory, cr0, cr3, cr4, false)
}

/// What of VMCS12 gives the processor a page to write to, past every EPT.
const PROCESSOR_WRITES: [Field<u64>; ProcessorWritten::PAGES] =
    [VIRTUAL_APIC_ADDRESS, POSTED_INTERRUPT_DESCRIPTOR_ADDRESS];

/// A bitmap in such a page changes unseen: it is merged at every entry.
fn leave_unwatched<M: Machine>(vcpu: &Vcpu<M>) {
    const FIELDS: FieldSet = FieldSet::of(&[PROCESSOR_WRITES[0].id(), PROCESSOR_WRITES[1].id()]);
    let vmcs12 = &vcpu.vmx.vmcs12;
    if vmcs12.dirty.intersects(&FIELDS) {
        let page = |field| Gpa(vmcs12.get(field)).align_down(PageSize::Size4K);
        vcpu.memory.leave_unwatched(PROCESSOR_WRITES.map(page));
    }
}

fn merge<M: Machine>(vcpu: &mut Vcpu<M>, inherited: Inherited, pdptes: Option<[u64; 4]>) {
    leave_unwatched(vcpu);
    let bitmap_changes = !msr_bitmap::is_merged(vcpu);
    if bitmap_changes {
        msr_bitmap::merge(vcpu);
    }
    nested_shadowing::prepare(vcpu);
    let io_bitmaps = ports::merge(vcpu);
    let inherits = passing::inherits(&vcpu.vmx.vmcs12);
    if inherits {
        inherit_registers(vcpu);
    }
    let load_count = vcpu.vmx.vmcs12.get(ENTRY_MSR_LOAD_COUNT);
    let loads_msrs = load_count != 0;
    let area_changes = loads_msrs || vcpu.vmx.vmcs12.dirty.contains(ENTRY_MSR_LOAD_COUNT.id());
    if area_changes {
        copy_entry_load_area(vcpu, load_count);
    }
    if !vcpu.vmx.vmcs12.has_secondary(Secondary::ENABLE_VPID) {
        nested_ept::drop_ept02_without_vpid(vcpu);
    }
    let eptp02 = nested_ept::eptp02(vcpu);
    if vcpu.nested.ept.violation.is_some() {
        nested_ept::fill_after_reflected_violation(vcpu);
    }
    let vmcs02 = vcpu.vmcs.vmcs02();
    let vmcs12 = &mut vcpu.vmx.vmcs12;
    let (caps, sets, memory) = (&vcpu.caps, &vcpu.sync_sets, &vcpu.memory);
    let entries_load = loads_msrs || !inherited.is_empty() || inherits || !pdptes_are_in_vmcs02(vmcs12);
    let shortcut = Shortcut::after(vmcs12, entries_load, io_bitmaps);
    merge::prepare(vmcs02, vmcs12, &Surroundings { caps, sets, memory, inherited, pdptes });
    if area_changes {
        vmcs02.write(ENTRY_MSR_LOAD_COUNT, vcpu.nested.areas.entry_load_count);
    }
    if bitmap_changes {
        vmcs02.write(MSR_BITMAP, vcpu.nested.msr_bitmaps[vcpu.nested.msr_bitmap_slot].address.0);
    }
    if let Some(bitmaps) = io_bitmaps {
        bitmaps.write(vmcs02);
    }
    if eptp02 != vcpu.nested.ept.eptp02 {
        vmcs02.write(EPT_POINTER, eptp02.bits());
        vcpu.nested.ept.eptp02 = eptp02;
    }
    vcpu.nested.shortcut = shortcut;
    switch_vpid(vcpu);
}

/// For registers of [`passing`] that exits of the nested guest load and its entries do not: the nested guest begins
/// with the guest hypervisor's values, and after an exit that the host handles goes on with its own.
#[cold]
fn inherit_registers<M: Machine>(vcpu: &mut Vcpu<M>) {
    let values = passing::read_inherited(vcpu.vmcs.vmcs01(), &vcpu.vmx.vmcs12);
    let vmcs02 = vcpu.vmcs.vmcs02();
    vcpu.nested.displaced_registers = values.iter().map(|&(id, _)| (id, vmcs02.read_raw(id))).collect();
    passing::write(vmcs02, &values);
}

/// Each VPID12 has a VPID02, whose translations stay until INVVPID. The shared VPID02 is emptied whenever its VPID12
/// changes. For the guest hypervisor, a nested guest without a VPID shares VPID 0 with it, so that entry and exit drop
/// the translations of both (SDM 29.4.3.1).
fn switch_vpid<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let vpid12 = if vmcs12.has_secondary(Secondary::ENABLE_VPID) { vmcs12.get(VPID) } else { 0 };
    if vpid12 == 0 {
        vcpu.machine.invvpid(Invvpid::Single(VPID01));
    }
    if vpid12 == 0 || vpid12 != vcpu.nested.vpid12 {
        let vpid02 = vpid02(vpid12);
        if vpid02 == SHARED_VPID02 {
            vcpu.machine.invvpid(Invvpid::Single(SHARED_VPID02));
        }
        vcpu.vmcs.vmcs02().write(VPID, vpid02);
        vcpu.nested.vpid12 = vpid12;
    }
}

/// Copies the VM-entry load area. An entry that only the host could process makes the processor fail at its place: as
/// the processor does not know that, its index is replaced by one that no processor loads.
fn copy_entry_load_area<M: Machine>(vcpu: &mut Vcpu<M>, count: u32) {
    let address = Gpa(vcpu.vmx.vmcs12.get(ENTRY_MSR_LOAD_ADDRESS));
    let areas = &mut vcpu.nested.areas;
    let copied = merge::copy_in(&vcpu.memory, address, count, merge::is_loadable, areas.entry_load.entries);
    match copied {
        Ok(()) => areas.put_own_behind(count),
        Err(merge::AreaError(number)) => {
            merge::poison(areas.entry_load.entries, number);
            areas.entry_load_count = number as u32;
        }
    }
}
