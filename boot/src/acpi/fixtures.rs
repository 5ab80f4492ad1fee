//! Machines with tables, for tests.

use crate::phys::FakePhys;
use std::vec::Vec;

/// The root pointer of [`machine_with`].
pub const RSDP: u64 = 0xe_0040;
/// Its root table.
pub const RSDT: u64 = 0x2000;

/// Makes the bytes add up to zero.
pub fn seal(bytes: &mut [u8], checksum_at: usize) {
    bytes[checksum_at] = 0;
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[checksum_at] = sum.wrapping_neg();
}

/// A table with a header of this size.
pub fn table(signature: &[u8; 4], header: usize, body: &[u8]) -> Vec<u8> {
    let mut bytes = std::vec![0; header];
    bytes.extend_from_slice(body);
    bytes[..4].copy_from_slice(signature);
    let length = bytes.len() as u32;
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    seal(&mut bytes, 9);
    bytes
}

/// A machine with these bytes in its memory, and a root table that names the tables at `named`.
pub fn machine_with(content: &[(u64, &[u8])], named: &[u64]) -> FakePhys {
    let mut memory = FakePhys { base: 0, bytes: std::vec![0; 0x10_0000] };
    let mut put = |at: u64, bytes: &[u8]| memory.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    let mut rsdp = [0; 20];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[16..20].copy_from_slice(&(RSDT as u32).to_le_bytes());
    seal(&mut rsdp, 8);
    put(RSDP, &rsdp);
    let pointers: Vec<u8> = named.iter().flat_map(|&table| (table as u32).to_le_bytes()).collect();
    put(RSDT, &table(b"RSDT", 36, &pointers));
    content.iter().for_each(|&(at, bytes)| put(at, bytes));
    memory
}
