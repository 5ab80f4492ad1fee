//! The MADT: ACPI's list of interrupt controllers, and so of processors.

use super::tables::{first, table_length};
use super::{Processors, TableError, add, read_u8};
use crate::phys::{OutOfRange, PhysMemory};

/// Offset of the MADT's first entry.
const ENTRIES: u64 = 44;
const FLAG_ENABLED: u8 = 0b01;

/// Finds the MADT by way of the root pointer at `rsdp`.
///
/// # Errors
///
/// A table lies where there is no memory.
pub fn find(memory: &impl PhysMemory, rsdp: u64) -> Result<Option<u64>, OutOfRange> {
    first(memory, rsdp, *b"APIC")
}

/// The processor that the entry at `entry` describes, if it describes an enabled one.
fn processor(memory: &impl PhysMemory, entry: u64, kind: u8, length: u8) -> Result<Option<u32>, TableError> {
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    let (apic_id, flags) = match (kind, length) {
        (LOCAL_APIC, 8..) => (u32::from(read_u8(memory, entry + 3)?), entry + 4),
        (LOCAL_X2APIC, 16..) => (memory.read_u32(entry + 4)?, entry + 8),
        (LOCAL_APIC | LOCAL_X2APIC, _) => return Err(TableError::BadEntry(entry)),
        _ => return Ok(None),
    };
    let is_enabled = read_u8(memory, flags)? & FLAG_ENABLED != 0;
    Ok(is_enabled.then_some(apic_id))
}

/// The enabled processors in the MADT at `madt`.
///
/// # Errors
///
/// The table is damaged.
pub fn processors(memory: &impl PhysMemory, madt: u64) -> Result<Processors, TableError> {
    let end = madt.saturating_add(u64::from(table_length(memory, madt)?));
    let mut found = Processors::new();
    let mut entry = madt + ENTRIES;
    while entry < end {
        let (kind, length) = (read_u8(memory, entry)?, read_u8(memory, entry + 1)?);
        if length < 2 || entry + u64::from(length) > end {
            return Err(TableError::BadEntry(entry));
        }
        if let Some(apic_id) = processor(memory, entry, kind, length)? {
            add(&mut found, apic_id)?;
        }
        entry += u64::from(length);
    }
    Ok(found)
}
