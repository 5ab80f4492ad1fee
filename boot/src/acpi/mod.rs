//! The firmware's lists of processors, and how to leave only the boot processor in them.
//!
//! The host runs one processor so far. A guest that starts the others would run them outside the host, so the lists that it learns
//! of them from are patched: the ACPI table MADT (ACPI 6.5, 5.2.12) and the older MP configuration table (MultiProcessor
//! Specification 1.4, 4 "MP Configuration Table"). A processor that is neither enabled nor online-capable is ignored by the guest.

mod madt;
mod mp_table;

use core::fmt;

use arrayvec::ArrayVec;

use crate::phys::{OutOfRange, PhysMemory};

pub use madt::{disable_other_processors as disable_in_madt, find_madt};
pub use mp_table::disable_other_processors as disable_in_mp_table;

/// The most bytes that change in one table: two for each of 256 local APICs, five for each of 100 local x2APICs, the checksum.
pub const MAX_PATCHES: usize = 256 * 2 + 100 * 5 + 1;

/// A byte to change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patch {
    /// Its physical address.
    pub address: u64,
    /// Its new value.
    pub value: u8,
}

/// Why a table cannot be patched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableError {
    /// It claims to lie where there is no memory.
    OutOfRange(OutOfRange),
    /// An entry is too short, or reaches beyond the table.
    BadEntry(u64),
    /// The boot processor is not in it.
    NoBootProcessor,
    /// It has too many processors.
    TooManyProcessors,
}

impl From<OutOfRange> for TableError {
    fn from(error: OutOfRange) -> Self {
        Self::OutOfRange(error)
    }
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange(error) => write!(f, "{error}"),
            Self::BadEntry(address) => write!(f, "the entry at {address:#x} is damaged"),
            Self::NoBootProcessor => f.write_str("the boot processor is not in it"),
            Self::TooManyProcessors => f.write_str("it has too many processors"),
        }
    }
}

/// What one table says, and the changes that leave only the boot processor.
#[derive(Debug, Default)]
pub struct OneProcessor {
    /// Processors that are enabled in it.
    pub processors: usize,
    /// The changes; the table's checksum last.
    pub patches: ArrayVec<Patch, MAX_PATCHES>,
    /// The sum of all changes so far, which the checksum takes back.
    delta: u8,
}

impl OneProcessor {
    /// Changes the byte at `address`, if it is not as it should be already.
    fn change(
        &mut self,
        memory: &impl PhysMemory,
        address: u64,
        change: impl FnOnce(u8) -> u8,
    ) -> Result<(), TableError> {
        let old = read_u8(memory, address)?;
        let value = change(old);
        if value != old {
            self.delta = self.delta.wrapping_add(value.wrapping_sub(old));
            self.push(Patch { address, value })?;
        }
        Ok(())
    }

    /// Corrects the checksum at `address`, so that the sum of the table stays what it was.
    fn fix_checksum(&mut self, memory: &impl PhysMemory, address: u64) -> Result<(), TableError> {
        if self.delta != 0 {
            let value = read_u8(memory, address)?.wrapping_sub(self.delta);
            self.push(Patch { address, value })?;
        }
        Ok(())
    }

    fn push(&mut self, patch: Patch) -> Result<(), TableError> {
        self.patches.try_push(patch).map_err(|_| TableError::TooManyProcessors)
    }
}

fn read_u8(memory: &impl PhysMemory, address: u64) -> Result<u8, OutOfRange> {
    let mut byte = [0];
    memory.read(address, &mut byte)?;
    Ok(byte[0])
}

fn read_u16(memory: &impl PhysMemory, address: u64) -> Result<u16, OutOfRange> {
    let mut bytes = [0; 2];
    memory.read(address, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// Whether the `length` bytes at `address` add up to zero.
fn sums_to_zero(memory: &impl PhysMemory, address: u64, length: u64) -> bool {
    (address..address.saturating_add(length))
        .try_fold(0u8, |sum, at| read_u8(memory, at).map(|byte| sum.wrapping_add(byte)))
        .is_ok_and(|sum| sum == 0)
}

/// Where firmware leaves its entry points: the extended BIOS data area's first KiB and the BIOS's ROM.
fn search_areas(memory: &impl PhysMemory, rom_start: u64) -> [core::ops::Range<u64>; 2] {
    const EBDA_SEGMENT: u64 = 0x40e;
    const ROM_END: u64 = 0x10_0000;
    const KIB: u64 = 1024;
    // Absent in a machine without a BIOS; then the word is usually zero, and address 0 holds nothing of interest.
    let ebda = u64::from(read_u16(memory, EBDA_SEGMENT).unwrap_or(0)) << 4;
    [ebda..ebda + KIB, rom_start..ROM_END]
}

/// Finds the structure that starts with `signature` on a multiple of 16 and whose first `length` bytes add up to zero.
fn find_structure(
    memory: &impl PhysMemory,
    areas: impl IntoIterator<Item = core::ops::Range<u64>>,
    signature: &[u8],
    length: u64,
) -> Option<u64> {
    let matches = |address: u64| {
        let mut start = [0; 8];
        let start = &mut start[..signature.len()];
        memory.read(address, start).is_ok() && start == signature && sums_to_zero(memory, address, length)
    };
    areas.into_iter().flat_map(|area| area.step_by(16)).find(|&address| matches(address))
}

/// Finds ACPI's root pointer (RSDP): ACPI 6.5, 5.2.5.1 "Finding the RSDP on IA-PC Systems".
pub fn find_rsdp(memory: &impl PhysMemory) -> Option<u64> {
    const ROM_START: u64 = 0xe_0000;
    const LENGTH_WITH_CHECKSUM: u64 = 20;
    find_structure(memory, search_areas(memory, ROM_START), b"RSD PTR ", LENGTH_WITH_CHECKSUM)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
