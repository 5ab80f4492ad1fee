//! Loads a static ELF64 file to its physical addresses.

use anyhow::{Context, Result, ensure};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PT_LOAD: u32 = 1;
const ENTRY: usize = 24;
const PROGRAM_HEADERS: usize = 32;
const PROGRAM_HEADER_SIZE: usize = 54;
const PROGRAM_HEADER_COUNT: usize = 56;

/// Copies the segments of `image` into memory, which must be zero. Returns the entry point.
pub fn load(image: &[u8], memory: &GuestMemoryMmap) -> Result<u64> {
    ensure!(image.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit little-endian ELF file");
    let table = long(image, PROGRAM_HEADERS)? as usize;
    let size = usize::from(half(image, PROGRAM_HEADER_SIZE)?);
    for index in 0..usize::from(half(image, PROGRAM_HEADER_COUNT)?) {
        let header = image.get(table + index * size..).context("truncated program headers")?;
        if word(header, 0)? != PT_LOAD {
            continue;
        }
        let (offset, address, length) = (long(header, 8)?, long(header, 24)?, long(header, 32)?);
        let content =
            image.get(offset as usize..).and_then(|rest| rest.get(..length as usize)).context("truncated segment")?;
        memory.write_slice(content, GuestAddress(address)).context("segment outside memory")?;
    }
    long(image, ENTRY)
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> Result<[u8; N]> {
    data.get(at..).and_then(|rest| rest.first_chunk()).copied().context("truncated ELF file")
}

fn half(data: &[u8], at: usize) -> Result<u16> {
    bytes(data, at).map(u16::from_le_bytes)
}

fn word(data: &[u8], at: usize) -> Result<u32> {
    bytes(data, at).map(u32::from_le_bytes)
}

fn long(data: &[u8], at: usize) -> Result<u64> {
    bytes(data, at).map(u64::from_le_bytes)
}
