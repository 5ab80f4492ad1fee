//! The MADT: ACPI's list of interrupt controllers, and so of processors.

use super::{Processors, TableError, add, read_u8};
use crate::phys::{OutOfRange, PhysMemory};

/// Offset of the length in any table's header.
const TABLE_LENGTH: u64 = 4;
/// Size of any table's header.
const TABLE_HEADER_BYTES: u64 = 36;
/// The longest plausible table: a greater length is damaged.
const MAX_TABLE_BYTES: u32 = 1 << 20;

/// Offset of the MADT's first entry.
const ENTRIES: u64 = 44;
const FLAG_ENABLED: u8 = 0b01;

/// Finds the MADT by way of the root pointer at `rsdp`.
///
/// # Errors
///
/// A table lies where there is no memory.
pub fn find(memory: &impl PhysMemory, rsdp: u64) -> Result<Option<u64>, OutOfRange> {
    const REVISION: u64 = 15;
    const RSDT: u64 = 16;
    const XSDT: u64 = 24;
    let has_xsdt = read_u8(memory, rsdp + REVISION)? >= 2;
    let xsdt = if has_xsdt { memory.read_u64(rsdp + XSDT)? } else { 0 };
    let (root, pointer_bytes) = if xsdt != 0 { (xsdt, 8) } else { (u64::from(memory.read_u32(rsdp + RSDT)?), 4) };
    let length = u64::from(table_length(memory, root)?);
    for at in (TABLE_HEADER_BYTES..length).step_by(pointer_bytes) {
        let slot = root.saturating_add(at);
        let table = if pointer_bytes == 8 { memory.read_u64(slot)? } else { u64::from(memory.read_u32(slot)?) };
        let mut signature = [0; 4];
        memory.read(table, &mut signature)?;
        if signature == *b"APIC" {
            return Ok(Some(table));
        }
    }
    Ok(None)
}

fn table_length(memory: &impl PhysMemory, table: u64) -> Result<u32, OutOfRange> {
    let length = memory.read_u32(table.saturating_add(TABLE_LENGTH))?;
    if length > MAX_TABLE_BYTES {
        return Err(OutOfRange { address: table, length: u64::from(length) });
    }
    Ok(length)
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
