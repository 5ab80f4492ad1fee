//! The way from the root pointer to the other tables.

use super::read_u8;
use crate::phys::{OutOfRange, PhysMemory};

/// Offset of the length in any table's header.
const TABLE_LENGTH: u64 = 4;
/// Size of any table's header.
pub const TABLE_HEADER_BYTES: u64 = 36;
/// No sane table is longer; damaged lengths are.
const MAX_TABLE_BYTES: u32 = 1 << 20;

/// Shows the signature and the address of each table that the root pointer at `rsdp` leads to.
///
/// # Errors
///
/// A table lies where there is no memory, or the error of `show`.
pub fn each(
    memory: &impl PhysMemory,
    rsdp: u64,
    mut show: impl FnMut([u8; 4], u64) -> Result<(), OutOfRange>,
) -> Result<(), OutOfRange> {
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
        show(signature, table)?;
    }
    Ok(())
}

/// The length of a table, header included.
///
/// # Errors
///
/// It lies where there is no memory, or is longer than any table.
pub fn table_length(memory: &impl PhysMemory, table: u64) -> Result<u32, OutOfRange> {
    let length = memory.read_u32(table.saturating_add(TABLE_LENGTH))?;
    if length > MAX_TABLE_BYTES {
        return Err(OutOfRange { address: table, length: u64::from(length) });
    }
    Ok(length)
}
