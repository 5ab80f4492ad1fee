//! Targets of `boot`: what the loader, the firmware and the user give to l1hv.

mod acpi;
mod image;
mod memory;
mod multiboot;

pub use acpi::acpi;
pub use image::guest_image;
pub use memory::memory_map;
pub use multiboot::multiboot;

use boot::cmdline::{EPT_TABLES, HOST_MEMORY_MIB, Options};
use boot::memory_map::overlap;
use boot::phys::{OutOfRange, PhysMemory};
use std::ops::Range;

use crate::{Input, is_one_line};

/// Physical memory with bytes in some places, and nothing elsewhere.
#[derive(Clone, Debug)]
struct Memory(Vec<(u64, Vec<u8>)>);

impl PhysMemory for Memory {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), OutOfRange> {
        let found = self.0.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..offset.checked_add(buffer.len())?)
        });
        buffer.copy_from_slice(found.ok_or(OutOfRange { address, length: buffer.len() as u64 })?);
        Ok(())
    }
}

/// None of the ranges overlaps another.
fn are_apart(ranges: &[Range<u64>]) -> bool {
    ranges.iter().enumerate().all(|(at, range)| ranges[..at].iter().all(|other| !overlap(range, other)))
}

/// The command line: characters, and from 80H on words of the options.
pub fn command_line(bytes: &[u8]) {
    const WORDS: [&str; 24] = [
        "log=",
        "error",
        "trace",
        "stats",
        "vmcs-shadowing=",
        "on",
        "off",
        "host-memory=",
        "8",
        "1024",
        "ept-tables=",
        "16",
        "262144",
        "shadow=",
        "GUEST_RIP:rw",
        "profile",
        "triple-fault=",
        "reset",
        "stop",
        "hypercalls",
        "mitigations=",
        "auto",
        " ",
        "=",
    ];
    let line: String = bytes
        .iter()
        .flat_map(|&byte| match byte {
            ..0x80 => vec![char::from(byte)],
            _ => WORDS[usize::from(byte) % WORDS.len()].chars().collect(),
        })
        .collect();
    match Options::parse(&line) {
        Ok(options) => {
            assert!(options.host_memory_mib.is_none_or(|mib| HOST_MEMORY_MIB.contains(&mib)));
            assert!(options.ept_tables.is_none_or(|count| EPT_TABLES.contains(&count)));
            // A word counts wherever it stands, and twice as once.
            assert_eq!(Options::parse(&format!(" {line}\t{line}\n")), Ok(options));
        }
        Err(error) => is_one_line(error),
    }
}

/// A range that starts on a page below 16 MiB, and is no longer than 32 MiB.
fn page_range(input: &mut Input<'_>) -> Range<u64> {
    let start = u64::from(input.half() & 0xfff) * 4096;
    start..start + u64::from(input.half()) * 512
}
