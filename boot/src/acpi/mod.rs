//! What the firmware says of the machine: how it sleeps, the units that remap its devices' memory accesses, and its lists
//! of processors, the ACPI table MADT (ACPI 6.5, 5.2.12 "Multiple APIC Description Table") and the older MP configuration
//! table (MultiProcessor Specification 1.4, 4 "MP Configuration Table").

pub mod dmar;
mod madt;
mod mp_table;
pub mod sleep;
mod tables;

pub use tables::hide;

use core::fmt;

use arrayvec::ArrayVec;

use crate::phys::{OutOfRange, PhysMemory};

/// The most processors of a machine.
pub const MAX_PROCESSORS: usize = 256;

/// The local APIC ids of the enabled processors, in the table's order.
pub type Processors = ArrayVec<u32, MAX_PROCESSORS>;

/// Why a table is unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableError {
    /// The table claims to lie where there is no memory.
    OutOfRange(OutOfRange),
    /// An entry is too short, or reaches beyond the table.
    BadEntry(u64),
    /// The table has too many processors.
    TooManyProcessors,
    /// The table's bytes do not add up to zero.
    BadChecksum(u64),
    /// The table has too many entries of a kind, which this names.
    TooMany(&'static str),
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
            Self::TooManyProcessors => write!(f, "there are more than {MAX_PROCESSORS} processors"),
            Self::BadChecksum(address) => write!(f, "the checksum of the table at {address:#x} is wrong"),
            Self::TooMany(what) => write!(f, "there are too many {what}"),
        }
    }
}

impl core::error::Error for TableError {}

/// The machine's enabled processors, from the MADT or else from the MP table; `None` if there is neither.
///
/// # Errors
///
/// The table is damaged.
pub fn processors(memory: &impl PhysMemory, rsdp: Option<u64>) -> Result<Option<Processors>, TableError> {
    let madt = match rsdp {
        Some(rsdp) => madt::find(memory, rsdp)?,
        None => None,
    };
    match madt {
        Some(madt) => madt::processors(memory, madt).map(Some),
        None => mp_table::processors(memory),
    }
}

/// All processors that there may be: the one that asks, those of the firmware's list, and those that have answered. None
/// of them twice.
///
/// # Errors
///
/// There are too many.
pub fn union(own: u32, listed: &[u32], answered: impl IntoIterator<Item = u32>) -> Result<Processors, TableError> {
    let mut all = Processors::new();
    let mut ids = core::iter::once(own).chain(listed.iter().copied()).chain(answered);
    ids.try_for_each(|id| add(&mut all, id))?;
    Ok(all)
}

/// Adds a processor, if it is not in the list yet: one with a small id may have an entry of either kind.
fn add(processors: &mut Processors, apic_id: u32) -> Result<(), TableError> {
    if processors.contains(&apic_id) {
        return Ok(());
    }
    processors.try_push(apic_id).map_err(|_| TableError::TooManyProcessors)
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

/// The areas in which firmware leaves its entry points: the first KiB of the extended BIOS data area, and the BIOS's
/// ROM.
fn search_areas(memory: &impl PhysMemory, rom_start: u64) -> [core::ops::Range<u64>; 2] {
    const EBDA_SEGMENT: u64 = 0x40e;
    const ROM_END: u64 = 0x10_0000;
    const KIB: u64 = 1024;
    // A machine without a BIOS has no such area. Then the word is usually zero, and a search at address 0 finds
    // nothing.
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
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
