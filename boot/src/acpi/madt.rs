//! The MADT, ACPI's list of interrupt controllers and with them of processors.

use super::{OneProcessor, TableError, read_u8};
use crate::phys::{OutOfRange, PhysMemory};

/// Offset of the length in any table's header.
const TABLE_LENGTH: u64 = 4;
/// Offset of the checksum in any table's header.
const TABLE_CHECKSUM: u64 = 9;
/// Size of any table's header.
const TABLE_HEADER_BYTES: u64 = 36;
/// No sane table is longer; damaged lengths are.
const MAX_TABLE_BYTES: u32 = 1 << 20;

/// Offset of the MADT's first entry.
const ENTRIES: u64 = 44;
/// Enabled, and online-capable.
const FLAGS_USABLE: u8 = 0b11;
const FLAG_ENABLED: u8 = 0b01;

/// Finds the MADT by way of the root pointer at `rsdp`.
///
/// # Errors
///
/// A table lies where there is no memory.
pub fn find_madt(memory: &impl PhysMemory, rsdp: u64) -> Result<Option<u64>, OutOfRange> {
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

/// A processor's entry.
struct Processor {
    apic_id: u32,
    /// Address and size of the APIC id.
    id_field: (u64, u64),
    /// Address of the flags' low byte.
    flags: u64,
}

impl Processor {
    /// Reads the entry at `entry`; `None` if it is about something else.
    fn read(memory: &impl PhysMemory, entry: u64, kind: u8, length: u8) -> Result<Option<Self>, TableError> {
        const LOCAL_APIC: u8 = 0;
        const LOCAL_X2APIC: u8 = 9;
        match (kind, length) {
            (LOCAL_APIC, 8..) => {
                let apic_id = u32::from(read_u8(memory, entry + 3)?);
                Ok(Some(Self { apic_id, id_field: (entry + 3, 1), flags: entry + 4 }))
            }
            (LOCAL_X2APIC, 16..) => {
                let apic_id = memory.read_u32(entry + 4)?;
                Ok(Some(Self { apic_id, id_field: (entry + 4, 4), flags: entry + 8 }))
            }
            (LOCAL_APIC | LOCAL_X2APIC, _) => Err(TableError::BadEntry(entry)),
            _ => Ok(None),
        }
    }

    /// Makes the entry one that no guest uses: disabled, and with the id that no processor has. Linux takes a merely disabled
    /// entry for a processor that may be plugged in later.
    fn disable(&self, memory: &impl PhysMemory, plan: &mut OneProcessor) -> Result<(), TableError> {
        let (start, bytes) = self.id_field;
        for address in start..start + bytes {
            plan.change(memory, address, |_| 0xff)?;
        }
        plan.change(memory, self.flags, |flags| flags & !FLAGS_USABLE)
    }
}

/// Plans the changes to the MADT at `madt` that leave only the processor with `boot_apic_id`.
///
/// # Errors
///
/// The table is damaged, or the boot processor is not in it; then it must not be changed at all.
pub fn disable_other_processors(
    memory: &impl PhysMemory,
    madt: u64,
    boot_apic_id: u32,
) -> Result<OneProcessor, TableError> {
    let end = madt.saturating_add(u64::from(table_length(memory, madt)?));
    let mut plan = OneProcessor::default();
    let mut boot_processor_seen = false;
    let mut entry = madt + ENTRIES;
    while entry < end {
        let (kind, length) = (read_u8(memory, entry)?, read_u8(memory, entry + 1)?);
        if length < 2 || entry + u64::from(length) > end {
            return Err(TableError::BadEntry(entry));
        }
        if let Some(processor) = Processor::read(memory, entry, kind, length)? {
            let enabled = read_u8(memory, processor.flags)? & FLAG_ENABLED != 0;
            plan.processors += usize::from(enabled);
            if enabled && processor.apic_id == boot_apic_id {
                boot_processor_seen = true;
            } else {
                processor.disable(memory, &mut plan)?;
            }
        }
        entry += u64::from(length);
    }
    if !boot_processor_seen {
        return Err(TableError::NoBootProcessor);
    }
    plan.fix_checksum(memory, madt + TABLE_CHECKSUM)?;
    Ok(plan)
}
