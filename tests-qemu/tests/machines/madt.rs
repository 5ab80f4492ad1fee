//! Lists of processors that take the place of the firmware's (ACPI 6.5, 5.2.12 "Multiple APIC Description Table").

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::context::Context;

/// A file with a table of these entries, and one for the I/O APIC before them.
pub fn file(context: &Context, name: &str, entries: &[u8]) -> Result<PathBuf> {
    const IO_APIC: [u8; 12] = [1, 12, 1, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0];
    let mut madt = [0; 44].to_vec();
    madt[..4].copy_from_slice(b"APIC");
    madt[8] = 1;
    madt[36..40].copy_from_slice(&0xfee0_0000_u32.to_le_bytes());
    madt.extend(IO_APIC);
    madt.extend(entries);
    let length = madt.len() as u32;
    madt[4..8].copy_from_slice(&length.to_le_bytes());
    madt[9] = madt.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
    let path = context.layout.root().join(name);
    fs::write(&path, madt)?;
    Ok(path)
}

/// The entry of an enabled processor.
pub const fn local_apic(id: u8) -> [u8; 8] {
    [0, 8, id, id, 1, 0, 0, 0]
}

/// The same with an id of 32 bits.
pub fn local_x2apic(id: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    (entry[0], entry[1], entry[8]) = (9, 16, 1);
    entry[4..8].copy_from_slice(&id.to_le_bytes());
    entry
}
