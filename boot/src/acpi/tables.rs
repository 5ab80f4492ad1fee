//! The way from the root pointer to the other tables, and its end for tables that a guest is not to find.

use super::read_u8;
use crate::phys::{OutOfRange, PhysMemory};

/// Offsets of the root pointer's fields.
mod root_pointer {
    pub const REVISION: u64 = 15;
    pub const RSDT: u64 = 16;
    pub const XSDT: u64 = 24;
}

/// Offset of the length in any table's header.
const TABLE_LENGTH: u64 = 4;
/// Offset of the byte that makes a table's bytes add up to zero.
const TABLE_CHECKSUM: u64 = 9;
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
    let [rsdt, xsdt] = roots(memory, rsdp)?;
    let (root, pointer_bytes) = if xsdt != 0 { (xsdt, 8) } else { (rsdt, 4) };
    let length = u64::from(table_length(memory, root)?);
    for at in (TABLE_HEADER_BYTES..length).step_by(pointer_bytes) {
        let slot = root.saturating_add(at);
        let table = pointer(memory, slot, pointer_bytes)?;
        let mut signature = [0; 4];
        memory.read(table, &mut signature)?;
        show(signature, table)?;
    }
    Ok(())
}

/// The address of the first table with this signature.
///
/// # Errors
///
/// A table lies where there is no memory.
pub fn first(memory: &impl PhysMemory, rsdp: u64, wanted: [u8; 4]) -> Result<Option<u64>, OutOfRange> {
    let mut found = None;
    each(memory, rsdp, |signature, table| {
        if signature == wanted && found.is_none() {
            found = Some(table);
        }
        Ok(())
    })?;
    Ok(found)
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

/// The addresses of RSDT and XSDT; 0 for one that there is not.
fn roots(memory: &impl PhysMemory, rsdp: u64) -> Result<[u64; 2], OutOfRange> {
    let has_xsdt = read_u8(memory, rsdp + root_pointer::REVISION)? >= 2;
    let xsdt = if has_xsdt { memory.read_u64(rsdp + root_pointer::XSDT)? } else { 0 };
    Ok([memory.read_u32(rsdp + root_pointer::RSDT)?.into(), xsdt])
}

/// A root table's entry, of four or eight bytes.
fn pointer(memory: &impl PhysMemory, slot: u64, bytes: usize) -> Result<u64, OutOfRange> {
    if bytes == 8 { memory.read_u64(slot) } else { memory.read_u32(slot).map(u64::from) }
}

/// Takes `table` out of both root tables. `write` gets addresses and what to write there; it may write at once or later.
///
/// # Errors
///
/// A root table lies where there is no memory.
pub fn hide(
    memory: &impl PhysMemory,
    rsdp: u64,
    table: u64,
    mut write: impl FnMut(u64, &[u8]),
) -> Result<(), OutOfRange> {
    for (root, pointer_bytes) in roots(memory, rsdp)?.into_iter().zip([4, 8]) {
        if root != 0 {
            strike(memory, root, pointer_bytes, table, &mut write)?;
        }
    }
    Ok(())
}

/// Takes `table` out of one root table, whose sum stays what it is. The other entries keep their order, in which an
/// operating system loads tables.
fn strike(
    memory: &impl PhysMemory,
    root: u64,
    pointer_bytes: usize,
    table: u64,
    write: &mut impl FnMut(u64, &[u8]),
) -> Result<(), OutOfRange> {
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let old_length = table_length(memory, root)?;
    let (mut kept_end, mut removed) = (TABLE_HEADER_BYTES, 0_u8);
    for at in (TABLE_HEADER_BYTES..old_length.into()).step_by(pointer_bytes) {
        let found = pointer(memory, root.saturating_add(at), pointer_bytes)?;
        let bytes = &found.to_le_bytes()[..pointer_bytes];
        if found == table {
            removed = removed.wrapping_add(sum(bytes));
            continue;
        }
        if kept_end != at {
            write(root + kept_end, bytes);
        }
        kept_end += pointer_bytes as u64;
    }
    if kept_end == TABLE_HEADER_BYTES.max(old_length.into()) {
        return Ok(());
    }
    let length = (kept_end as u32).to_le_bytes();
    let checksum = read_u8(memory, root + TABLE_CHECKSUM)?
        .wrapping_add(removed)
        .wrapping_add(sum(&old_length.to_le_bytes()))
        .wrapping_sub(sum(&length));
    write(root + TABLE_LENGTH, &length);
    write(root + TABLE_CHECKSUM, &[checksum]);
    Ok(())
}
