//! The MP configuration table, which a guest reads where it finds no ACPI.

use super::{OneProcessor, TableError, find_structure, read_u8, read_u16, search_areas};
use crate::phys::PhysMemory;

/// The end of base memory, where old firmware has the floating pointer instead of the extended BIOS data area.
const BASE_MEMORY_LAST_KIB: core::ops::Range<u64> = 0x9_fc00..0xa_0000;

/// Offsets within the table.
const BASE_LENGTH: u64 = 4;
const CHECKSUM: u64 = 7;
const ENTRY_COUNT: u64 = 34;
const ENTRIES: u64 = 44;

const PROCESSOR: u8 = 0;
const PROCESSOR_BYTES: u64 = 20;
const OTHER_BYTES: u64 = 8;
const FLAG_ENABLED: u8 = 1 << 0;
const FLAG_BOOT_PROCESSOR: u8 = 1 << 1;

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

/// Plans the changes to the MP configuration table that leave only the boot processor; `None` if there is no such table.
///
/// # Errors
///
/// The table is damaged, or the boot processor is not in it; then it must not be changed at all.
pub fn disable_other_processors(memory: &impl PhysMemory) -> Result<Option<OneProcessor>, TableError> {
    let Some(table) = find(memory) else { return Ok(None) };
    let end = table + u64::from(read_u16(memory, table + BASE_LENGTH)?);
    let mut plan = OneProcessor::default();
    let mut boot_processor_seen = false;
    let mut entry = table + ENTRIES;
    for _ in 0..read_u16(memory, table + ENTRY_COUNT)? {
        let is_processor = read_u8(memory, entry)? == PROCESSOR;
        let next = entry + if is_processor { PROCESSOR_BYTES } else { OTHER_BYTES };
        if next > end {
            return Err(TableError::BadEntry(entry));
        }
        if is_processor {
            let flags = entry + 3;
            let value = read_u8(memory, flags)?;
            plan.processors += usize::from(value & FLAG_ENABLED != 0);
            if value & FLAG_BOOT_PROCESSOR != 0 {
                boot_processor_seen = true;
            } else {
                plan.change(memory, flags, |flags| flags & !FLAG_ENABLED)?;
            }
        }
        entry = next;
    }
    if !boot_processor_seen {
        return Err(TableError::NoBootProcessor);
    }
    plan.fix_checksum(memory, table + CHECKSUM)?;
    Ok(Some(plan))
}
