//! MSR areas (SDM 27.4 "Loading MSRs", 28.4 "Saving MSRs").
//!
//! Load areas are copied once, then left to the processor: vmcs02 points to the copy of the VM-entry load area, and
//! vmcs01's VM-entry load area is the copy of the VM-exit load area. The processor applies every restriction of the SDM
//! to the copy, and the guest hypervisor cannot change it any more.
//!
//! The host does what a VM-exit store area asks for. The nested guest may change the area, and its entries count as
//! they are at the exit; and an MSR that cannot be stored is a VMX abort, which must not be the host's own.

use core::fmt;

use crate::hw::GuestMemory;
use crate::msr::{Access, IA32_XSS, host_owns, is_outside_ranges, xss_may_be};
use ept::Gpa;

/// Entries that a copy has room for: the maximum that IA32_VMX_MISC\[27:25\] = 0 recommends.
pub const MSR_AREA_ENTRIES: usize = 512;

/// Entries of a copy with one of the host's own: what the processor is to do after all that VMCS12 asks for.
pub const MSR_AREA_ROOM: usize = MSR_AREA_ENTRIES + 1;

/// An entry of an MSR area (SDM Table 25-15).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C, align(16))]
pub struct MsrEntry {
    /// MSR index.
    pub index: u32,
    /// Reserved; must be 0.
    pub reserved: u32,
    /// MSR data.
    pub value: u64,
}

const ENTRY_BYTES: u64 = 16;

impl MsrEntry {
    fn read(memory: &impl GuestMemory, at: Gpa) -> Self {
        let mut bytes = [0; ENTRY_BYTES as usize];
        memory.read(at, &mut bytes);
        let words = u128::from_le_bytes(bytes);
        Self { index: words as u32, reserved: (words >> 32) as u32, value: (words >> 64) as u64 }
    }
}

/// An entry that cannot be processed: its number, from 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AreaError(pub u64);

impl fmt::Display for AreaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry {} of an MSR area cannot be processed", self.0)
    }
}

impl core::error::Error for AreaError {}

/// Copies an area from the guest hypervisor's memory. An entry that `accept` refuses, or one beyond the room, is an
/// error; the entries before it have been copied.
///
/// # Errors
///
/// The number of the first entry that was not copied.
pub fn copy_in(
    memory: &impl GuestMemory,
    address: Gpa,
    count: u32,
    accept: impl Fn(&MsrEntry) -> bool,
    copy: &mut [MsrEntry; MSR_AREA_ROOM],
) -> Result<(), AreaError> {
    for number in 0..u64::from(count) {
        let entry = MsrEntry::read(memory, address + number * ENTRY_BYTES);
        let slot = copy[..MSR_AREA_ENTRIES].get_mut(number as usize).filter(|_| accept(&entry));
        *slot.ok_or(AreaError(number + 1))? = entry;
    }
    Ok(())
}

/// Makes the processor fail at entry `number` (from 1), which only the host could have processed: IA32_FS_BASE is never
/// loaded from an area (SDM 27.4).
pub fn poison(copy: &mut [MsrEntry; MSR_AREA_ROOM], number: u64) {
    let slot = (number as usize).clamp(1, MSR_AREA_ROOM) - 1;
    copy[slot] = MsrEntry { index: crate::msr::IA32_FS_BASE, ..MsrEntry::default() };
}

/// Whether the processor may load an MSR from a copy: the host keeps its own from being written, and those of a
/// hypervisor below. A processor may refuse an MSR for reasons of its model (SDM 27.4); here IA32_APIC_BASE is one.
pub const fn is_loadable(entry: &MsrEntry) -> bool {
    let passes = entry.index == IA32_XSS && xss_may_be(entry.value);
    (passes || !host_owns(entry.index, Access::Write)) && !is_outside_ranges(entry.index)
}

/// Whether an MSR may be in a VM-exit store area: not an APIC register of x2APIC mode (SDM 28.4).
const fn is_storable(entry: &MsrEntry) -> bool {
    entry.reserved == 0 && entry.index >> 8 != 8
}

/// Does what the processor does at a VM exit with the VM-exit store area in the guest hypervisor's memory: reads its
/// entries and stores what `read` finds in the MSRs (SDM 28.4 "Saving MSRs").
///
/// # Errors
///
/// The number of the first entry that cannot be stored.
pub fn store(
    memory: &impl GuestMemory,
    address: Gpa,
    count: u32,
    read: impl Fn(u32) -> Option<u64>,
) -> Result<(), AreaError> {
    const VALUE_OFFSET: u64 = 8;
    for number in 0..count as usize {
        let error = AreaError(number as u64 + 1);
        if number == MSR_AREA_ENTRIES {
            return Err(error);
        }
        let at = address + number as u64 * ENTRY_BYTES;
        let entry = MsrEntry::read(memory, at);
        let value = is_storable(&entry).then(|| read(entry.index)).flatten();
        memory.write_u64(at + VALUE_OFFSET, value.ok_or(error)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeMemory;
    use crate::msr::IA32_VMX_BASIC;

    const AREA: Gpa = Gpa(0x1000);

    fn put(memory: &FakeMemory, number: u64, index: u32, value: u64) {
        memory.write_u32(AREA + number * 16, index);
        memory.write_u64(AREA + number * 16 + 8, value);
    }

    #[test]
    fn a_load_area_is_copied() {
        let (memory, mut copy) = (FakeMemory::new(0x4000), [MsrEntry::default(); MSR_AREA_ROOM]);
        put(&memory, 0, 0xc000_0081, 7);
        put(&memory, 1, 0xc000_0082, 8);
        copy_in(&memory, AREA, 2, is_loadable, &mut copy).unwrap();
        assert_eq!(copy[1], MsrEntry { index: 0xc000_0082, reserved: 0, value: 8 });
    }

    #[test]
    fn a_store_area_gets_values_up_to_the_first_entry_that_cannot_be_stored() {
        let memory = FakeMemory::new(0x4000);
        let read = |msr| (msr != IA32_VMX_BASIC).then_some(u64::from(msr));
        for (number, index) in [0xc000_0084, IA32_VMX_BASIC, 0xc000_0086].into_iter().enumerate() {
            put(&memory, number as u64, index, 0);
        }
        assert_eq!(store(&memory, AREA, 3, read), Err(AreaError(2)));
        assert_eq!([8, 40].map(|at| memory.read_u64(AREA + at)), [0xc000_0084, 0]);
        put(&memory, 1, 0xc000_0085, 0);
        assert_eq!(store(&memory, AREA, 3, read), Ok(()));
        assert_eq!([8, 24, 40].map(|at| memory.read_u64(AREA + at)), [0xc000_0084, 0xc000_0085, 0xc000_0086]);
        for index in [0x800, 0x802, 0x8ff] {
            put(&memory, 2, index, 0);
            assert_eq!(store(&memory, AREA, 3, read), Err(AreaError(3)), "{index:#x}");
        }
        memory.write_u32(AREA + 4, 1);
        assert_eq!(store(&memory, AREA, 3, read), Err(AreaError(1)));
    }

    #[test]
    fn an_area_may_load_components_of_extended_state_that_hold_no_msr_of_the_host() {
        let entry = |value| MsrEntry { index: IA32_XSS, reserved: 0, value };
        assert!(is_loadable(&entry(1 << 11)) && !is_loadable(&entry(1 << 8)));
    }

    #[test]
    fn an_msr_of_the_host_and_an_entry_too_many_are_refused_by_number() {
        let (memory, mut copy) = (FakeMemory::new(0x4000), [MsrEntry::default(); MSR_AREA_ROOM]);
        put(&memory, 1, IA32_VMX_BASIC, 0);
        assert_eq!(copy_in(&memory, AREA, 2, is_loadable, &mut copy), Err(AreaError(2)));
        put(&memory, 1, 0x4b56_4d01, 0);
        assert_eq!(
            copy_in(&memory, AREA, 2, is_loadable, &mut copy),
            Err(AreaError(2)),
            "a hypervisor below would do it"
        );
        put(&memory, 1, 0, 0);
        assert_eq!(copy_in(&memory, AREA, 513, is_loadable, &mut copy), Err(AreaError(513)));
    }
}
