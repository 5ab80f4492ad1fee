//! MSR areas (SDM 27.4 "Loading MSRs", 28.4 "Saving MSRs"): copied once, then left to the processor.
//!
//! A copy in the host's memory is what vmcs02 (for the VM-entry load and VM-exit store areas) or vmcs01 (for the
//! VM-exit load area, which becomes its VM-entry load area) points to. The processor applies every restriction of the
//! SDM to it; the guest hypervisor cannot change it any more. A VM-exit store area is one that its nested guest may
//! change: its entries count as they are at the exit.

use core::fmt;

use crate::hw::GuestMemory;
use crate::msr::{Access, host_owns, is_outside_ranges};
use ept::Gpa;

/// Entries that a copy has room for: the maximum that IA32_VMX_MISC\[27:25\] = 0 recommends.
pub const MSR_AREA_ENTRIES: usize = 512;

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
    copy: &mut [MsrEntry; MSR_AREA_ENTRIES],
) -> Result<(), AreaError> {
    for number in 0..count as usize {
        let entry = MsrEntry::read(memory, address + number as u64 * ENTRY_BYTES);
        let slot = copy.get_mut(number).ok_or(AreaError(number as u64 + 1))?;
        if !accept(&entry) {
            return Err(AreaError(number as u64 + 1));
        }
        *slot = entry;
    }
    Ok(())
}

/// Makes the processor fail at entry `number` (from 1), which only the host could have processed: IA32_FS_BASE is never
/// loaded from an area (SDM 27.4). One beyond the room fails at the last place.
pub fn poison(copy: &mut [MsrEntry; MSR_AREA_ENTRIES], number: u64) {
    let slot = (number as usize).clamp(1, MSR_AREA_ENTRIES) - 1;
    copy[slot] = MsrEntry { index: crate::msr::IA32_FS_BASE, ..MsrEntry::default() };
}

/// Whether the processor may load an MSR from a copy: the host keeps its own from being written, and those of a
/// hypervisor below.
pub const fn is_loadable(entry: &MsrEntry) -> bool {
    !host_owns(entry.index, Access::Write) && !is_outside_ranges(entry.index)
}

/// Does what the processor does at a VM exit with the VM-exit store area in the guest hypervisor's memory: reads its
/// entries (SDM 28.4 "Saving MSRs") and stores. An entry that is still what was copied gets what the processor put in
/// the copy, one of `stored`; the nested guest may have changed others since, and they get what `read` finds, as do
/// those of MSRs that the host emulates.
///
/// # Errors
///
/// The number of the first entry that cannot be stored.
pub fn store(
    memory: &impl GuestMemory,
    address: Gpa,
    count: u32,
    stored: &[MsrEntry],
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
        let value = match stored.get(number) {
            _ if entry.reserved != 0 => None,
            Some(copy) if copy.index == entry.index && !host_owns(entry.index, Access::Read) => Some(copy.value),
            _ => read(entry.index),
        };
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
    fn an_area_is_copied_and_stored_values_go_back() {
        let (memory, mut copy) = (FakeMemory::new(0x4000), [MsrEntry::default(); MSR_AREA_ENTRIES]);
        put(&memory, 0, 0xc000_0081, 7);
        put(&memory, 1, 0xc000_0082, 8);
        copy_in(&memory, AREA, 2, is_loadable, &mut copy).unwrap();
        assert_eq!(copy[1], MsrEntry { index: 0xc000_0082, reserved: 0, value: 8 });
        copy[1].value = 9;
        store(&memory, AREA, 2, &copy[..2], |_| unreachable!()).unwrap();
        assert_eq!(memory.read_u64(AREA + 24), 9);
        assert_eq!(memory.read_u32(AREA + 16), 0xc000_0082);
    }

    #[test]
    fn a_store_area_counts_as_it_is_at_the_exit() {
        let (memory, mut copy) = (FakeMemory::new(0x4000), [MsrEntry::default(); MSR_AREA_ENTRIES]);
        for number in 0..3 {
            put(&memory, number, 0xc000_0081, 0);
        }
        copy_in(&memory, AREA, 3, is_loadable, &mut copy).unwrap();
        put(&memory, 0, 0xc000_0084, 0);
        put(&memory, 1, IA32_VMX_BASIC, 0);
        copy[2].value = 9;
        let read = |msr| (msr != IA32_VMX_BASIC).then_some(u64::from(msr));
        assert_eq!(store(&memory, AREA, 3, &copy[..3], read), Err(AreaError(2)));
        put(&memory, 1, 0xc000_0085, 0);
        assert_eq!(store(&memory, AREA, 3, &copy[..3], read), Ok(()));
        assert_eq!([8, 24, 40].map(|at| memory.read_u64(AREA + at)), [0xc000_0084, 0xc000_0085, 9]);
        memory.write_u32(AREA + 4, 1);
        assert_eq!(store(&memory, AREA, 3, &copy[..3], read), Err(AreaError(1)));
    }

    #[test]
    fn an_msr_of_the_host_and_an_entry_too_many_are_refused_by_number() {
        let (memory, mut copy) = (FakeMemory::new(0x4000), [MsrEntry::default(); MSR_AREA_ENTRIES]);
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
