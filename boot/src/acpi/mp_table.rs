//! The MP configuration table, which a guest reads if it finds no ACPI tables.

use super::{Processors, TableError, add, find_structure, read_u8, read_u16, search_areas};
use crate::phys::PhysMemory;

/// The end of base memory. Old firmware puts the floating pointer there instead of in the extended BIOS data area.
const BASE_MEMORY_LAST_KIB: core::ops::Range<u64> = 0x9_fc00..0xa_0000;

/// Offsets within the table.
const BASE_LENGTH: u64 = 4;
const ENTRY_COUNT: u64 = 34;
const ENTRIES: u64 = 44;

const PROCESSOR: u8 = 0;
const PROCESSOR_BYTES: u64 = 20;
const OTHER_BYTES: u64 = 8;
const FLAG_ENABLED: u8 = 1 << 0;

/// Finds the table by its floating pointer. SMP Specification 1.4, 4.1 "MP Floating Pointer Structure".
fn find(memory: &impl PhysMemory) -> Option<u64> {
    const ROM_START: u64 = 0xf_0000;
    const FLOATING_POINTER_BYTES: u64 = 16;
    let [ebda, rom] = search_areas(memory, ROM_START);
    let pointer = find_structure(memory, [ebda, BASE_MEMORY_LAST_KIB, rom], b"_MP_", FLOATING_POINTER_BYTES)?;
    let table = u64::from(memory.read_u32(pointer + 4).ok()?);
    let mut signature = [0; 4];
    memory.read(table, &mut signature).ok()?;
    (signature == *b"PCMP").then_some(table)
}

/// The enabled processors in the MP configuration table; `None` if there is no such table.
///
/// # Errors
///
/// The table is damaged.
pub fn processors(memory: &impl PhysMemory) -> Result<Option<Processors>, TableError> {
    let Some(table) = find(memory) else { return Ok(None) };
    let end = table + u64::from(read_u16(memory, table + BASE_LENGTH)?);
    let mut found = Processors::new();
    let mut entry = table + ENTRIES;
    for _ in 0..read_u16(memory, table + ENTRY_COUNT)? {
        let is_processor = read_u8(memory, entry)? == PROCESSOR;
        let next = entry + if is_processor { PROCESSOR_BYTES } else { OTHER_BYTES };
        if next > end {
            return Err(TableError::BadEntry(entry));
        }
        if is_processor && read_u8(memory, entry + 3)? & FLAG_ENABLED != 0 {
            add(&mut found, u32::from(read_u8(memory, entry + 1)?))?;
        }
        entry = next;
    }
    Ok(Some(found))
}
