//! VMLAUNCH and VMRESUME of the guest hypervisor (SDM 27 "VM Entries").

use ept::{Eptp, Gpa};
use shadow::check::{self, HostMode, Violation};
use shadow::controls::{EntryControls, Primary, Secondary};
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::{GuestMemory, VmcsAccess};
use shadow::merge::{self, Inherited};
use shadow::msr::{Access, BITMAP_BYTES, HOST_INTERCEPTS};
use shadow::outcome::{Failure, InsnError};
use shadow::vmcs12::LaunchState;

use super::paging;
use super::reflect::reflect_failed_entry;
use crate::arch::vmx::{Invvpid, invvpid};
use crate::vcpu::{Level, VPID01, VPID02, Vcpu};

/// Enters, or fails as the instruction does. After an entry failure of the late kind the guest hypervisor runs again, at its exit handler.
pub fn enter(vcpu: &mut Vcpu, wanted: LaunchState) -> Result<(), Failure> {
    let interruptibility = vcpu.vmcs.vmcs01().read(GUEST_INTERRUPTIBILITY);
    vcpu.vmx.check_launch(wanted, interruptibility)?;
    let mode = if vcpu.in_ia32e_mode() { HostMode::Ia32e } else { HostMode::Legacy };
    let vmcs12 = &vcpu.vmx.vmcs12;
    check::controls(vmcs12, &vcpu.offered, &vcpu.memory)
        .map_err(|violation| refused(violation, InsnError::ENTRY_INVALID_CONTROL))?;
    check::host_state(vmcs12, &vcpu.offered, mode)
        .map_err(|violation| refused(violation, InsnError::ENTRY_INVALID_HOST_STATE))?;
    let pdptes = check::guest_state(vmcs12, &vcpu.offered, &vcpu.memory).and_then(|()| pdptes_from_memory(vcpu));
    let pdptes = match pdptes {
        Ok(pdptes) => pdptes,
        Err(error) => {
            reflect_failed_entry(vcpu, ExitReason::ENTRY_FAILURE_GUEST_STATE, error.0);
            return Ok(());
        }
    };
    merge(vcpu, pdptes);
    vcpu.level = Level::Nested;
    vcpu.nested.entering = true;
    Ok(())
}

#[cold]
fn refused(violation: Violation, error: InsnError) -> Failure {
    log::debug!("VM entry refused, error {}: {}", error.0, violation.0);
    error.into()
}

/// Without EPT12 a PAE guest's PDPTEs come from memory at every entry.
fn pdptes_from_memory(vcpu: &Vcpu) -> Result<Option<[u64; 4]>, check::GuestStateError> {
    let vmcs12 = &vcpu.vmx.vmcs12;
    if vmcs12.has_secondary(Secondary::ENABLE_EPT) {
        return Ok(None);
    }
    let ia32e = vmcs12.get(ENTRY_CONTROLS) & EntryControls::IA32E_MODE_GUEST.bits() != 0;
    let (cr0, cr3, cr4) = (vmcs12.get(GUEST_CR0), vmcs12.get(GUEST_CR3), vmcs12.get(GUEST_CR4));
    check::load_pdptes(&vcpu.memory, &vcpu.offered, cr0, cr3, cr4, ia32e)
}

fn merge(vcpu: &mut Vcpu, pdptes: Option<[u64; 4]>) {
    let inherited = Inherited::read(&vcpu.vmcs.vmcs01(), &vcpu.vmx.vmcs12);
    if vcpu.vmx.vmcs12.get(PRIMARY_CONTROLS) & Primary::USE_MSR_BITMAPS.bits() != 0 {
        merge_msr_bitmap(vcpu);
    }
    let areas = AreaCounts::of(vcpu);
    if areas.any() {
        copy_msr_areas(vcpu, areas);
    }
    let eptp02 = paging::eptp02(vcpu);
    let mut vmcs02 = vcpu.vmcs.vmcs02();
    let vmcs12 = &mut vcpu.vmx.vmcs12;
    let areas_changed = vmcs12.dirty.contains(ENTRY_MSR_LOAD_COUNT.id()) || vmcs12.dirty.contains(EXIT_MSR_STORE_COUNT.id());
    merge::prepare(&mut vmcs02, vmcs12, &vcpu.caps, &vcpu.memory, &inherited, pdptes);
    if areas_changed || areas.any() {
        vmcs02.write(ENTRY_MSR_LOAD_COUNT, vcpu.nested.entry_load_count);
        vmcs02.write(EXIT_MSR_STORE_COUNT, vcpu.nested.exit_store.unwrap_or(0));
    }
    if eptp02 != vcpu.nested.eptp02 {
        vmcs02.write(EPT_POINTER, eptp02.0);
        vcpu.nested.eptp02 = eptp02;
    }
    switch_vpid(vcpu);
}

/// VPID02 has the translations of one VPID12. A nested guest without a VPID shares VPID 0 with its hypervisor as far as that can see, so
/// that entry and exit drop the translations of both (SDM 29.4.3.1).
fn switch_vpid(vcpu: &mut Vcpu) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let vpid12 = if vmcs12.has_secondary(Secondary::ENABLE_VPID) { vmcs12.get(VPID) } else { 0 };
    if vpid12 == 0 {
        invvpid(Invvpid::Single(VPID01));
    }
    if vpid12 == 0 || vpid12 != vcpu.nested.vpid12 {
        invvpid(Invvpid::Single(VPID02));
        vcpu.nested.vpid12 = vpid12;
    }
}

/// msr_bitmap02: what either of the two wants to see.
fn merge_msr_bitmap(vcpu: &mut Vcpu) {
    const WORD: usize = size_of::<u64>();
    let source = Gpa(vcpu.vmx.vmcs12.get(MSR_BITMAP));
    let target = &mut *vcpu.nested.msr_bitmap02;
    vcpu.memory.read(source, target);
    let (words, _) = target.as_chunks_mut::<WORD>();
    for &(index, intercepts) in HOST_WORDS {
        let merged = u64::from_le_bytes(words[index]) | intercepts;
        words[index] = merged.to_le_bytes();
    }
}

/// The few words of the MSR bitmaps in which the host has an intercept.
const HOST_WORDS: &[(usize, u64)] = &host_words::<{ count_host_words() }>();

const fn host_word(index: usize) -> u64 {
    let mut word = 0;
    let mut byte = 0;
    while byte < 8 {
        word |= (HOST_INTERCEPTS[index * 8 + byte] as u64) << (8 * byte);
        byte += 1;
    }
    word
}

const fn count_host_words() -> usize {
    let mut count = 0;
    let mut index = 0;
    while index < BITMAP_BYTES / 8 {
        count += (host_word(index) != 0) as usize;
        index += 1;
    }
    count
}

const fn host_words<const COUNT: usize>() -> [(usize, u64); COUNT] {
    let mut words = [(0, 0); COUNT];
    let (mut index, mut used) = (0, 0);
    while index < BITMAP_BYTES / 8 {
        if host_word(index) != 0 {
            words[used] = (index, host_word(index));
            used += 1;
        }
        index += 1;
    }
    words
}

/// Entries of VMCS12's MSR areas that vmcs02 has to do with.
#[derive(Clone, Copy)]
struct AreaCounts {
    entry_load: u32,
    exit_store: u32,
}

impl AreaCounts {
    fn of(vcpu: &Vcpu) -> Self {
        let vmcs12 = &vcpu.vmx.vmcs12;
        Self { entry_load: vmcs12.get(ENTRY_MSR_LOAD_COUNT), exit_store: vmcs12.get(EXIT_MSR_STORE_COUNT) }
    }

    const fn any(self) -> bool {
        self.entry_load | self.exit_store != 0
    }
}

/// Copies the areas. An entry that only the host could process makes the processor fail at its place: as the processor does not know
/// that, its index is replaced by one that no processor loads.
fn copy_msr_areas(vcpu: &mut Vcpu, counts: AreaCounts) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let load = Gpa(vmcs12.get(ENTRY_MSR_LOAD_ADDRESS));
    let store = Gpa(vmcs12.get(EXIT_MSR_STORE_ADDRESS));
    let nested = &mut vcpu.nested;
    nested.entry_load_count = match merge::copy_in(&vcpu.memory, load, counts.entry_load, Access::Write, nested.entry_load.entries) {
        Ok(()) => counts.entry_load,
        Err(merge::AreaError(number)) => {
            merge::poison(nested.entry_load.entries, number);
            number.min(merge::MSR_AREA_ENTRIES as u64) as u32
        }
    };
    nested.exit_store = merge::copy_in(&vcpu.memory, store, counts.exit_store, Access::Read, nested.exit_store_area.entries)
        .map(|()| counts.exit_store);
}

/// The EPTP of vmcs02 for a nested guest without EPT12: EPT01's.
pub const fn eptp01(vcpu: &Vcpu) -> Eptp {
    Eptp::new(vcpu.ept01.0, false)
}
