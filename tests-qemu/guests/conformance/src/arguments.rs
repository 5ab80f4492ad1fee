//! What the loader passes: the command line and the memory map (Multiboot Specification 0.6.96, 3.3 "Boot information
//! format").

use core::ffi::CStr;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

static INFORMATION: AtomicU32 = AtomicU32::new(0);
static COMMAND_LINE: [AtomicU8; 1024] = [const { AtomicU8::new(0) }; 1024];
static RESERVED_MEMORY: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];

/// Copies the loader's information, which may lie where nested guests write.
pub fn init(address: u32) {
    INFORMATION.store(address, Relaxed);
    for (copy, &byte) in COMMAND_LINE.iter().zip(loaders_command_line().as_bytes()).take(COMMAND_LINE.len() - 1) {
        copy.store(byte, Relaxed);
    }
    if let Some(Range { start, end }) = loaders_reserved_memory() {
        RESERVED_MEMORY[0].store(start, Relaxed);
        RESERVED_MEMORY[1].store(end, Relaxed);
    }
}

/// A dword of the loader's information.
fn dword(address: u32) -> u32 {
    // SAFETY: callers read only addresses that the loader has given; no code changes the memory there.
    unsafe { core::ptr::with_exposed_provenance::<u32>(address as usize).read_unaligned() }
}

/// A dword of the information structure, if its flag is set.
fn information(flag: u32, offset: u32) -> Option<u32> {
    let base = INFORMATION.load(Relaxed);
    (dword(base) >> flag & 1 != 0).then(|| dword(base + offset))
}

/// The command line.
pub fn command_line() -> &'static str {
    // SAFETY: the copy ends with a zero, and does not change.
    let text = unsafe { CStr::from_ptr((&raw const COMMAND_LINE).cast()) };
    text.to_str().unwrap_or("")
}

fn loaders_command_line() -> &'static str {
    let Some(address) = information(2, 16) else { return "" };
    // SAFETY: by the flag, it is a C string.
    let text = unsafe { CStr::from_ptr(core::ptr::with_exposed_provenance(address as usize)) };
    text.to_str().unwrap_or("")
}

/// The screen, if the loader says that it is one of pixels: address, bytes of a row, width, height, bytes of a pixel.
pub fn pixels() -> Option<[u32; 5]> {
    const COLOURS: u32 = 1;
    let address = information(12, 88)?;
    let [high, pitch, width, height, depth] =
        [92, 96, 100, 104, 108].map(|offset| dword(INFORMATION.load(Relaxed) + offset));
    let is_pixels = depth >> 8 & 0xff == COLOURS && high == 0;
    is_pixels.then_some([address, pitch, width, height, (depth & 0xff).div_ceil(8)])
}

/// The words of the command line.
pub fn words() -> impl Iterator<Item = &'static str> {
    command_line().split_ascii_whitespace()
}

/// The rest of the word that begins with `name`.
pub fn word(name: &str) -> Option<&'static str> {
    words().find_map(|word| word.strip_prefix(name))
}

/// Whether the cases of this group are printed: `only=GROUP,GROUP` leaves out all other groups.
pub fn wants(group: &str) -> bool {
    word("only=").is_none_or(|groups| groups.split(',').any(|name| name == group))
}

/// Whether `only=` names a group for which this holds.
pub fn names_a_group(is_one: impl Fn(&str) -> bool) -> bool {
    word("only=").is_some_and(|groups| groups.split(',').any(is_one))
}

/// Whether the machine's processor stops at a VMX structure or operand that is not in memory: `memory-only`.
pub fn has_memory_only() -> bool {
    words().any(|word| word == "memory-only")
}

/// The number in the word that begins with `name`.
pub fn value(name: &str) -> Option<u64> {
    word(name)?.parse().ok()
}

/// Memory below 3 GiB that the map reserves in pieces of 2 MiB: a host's memory. Firmware reserves smaller pieces, and
/// elsewhere.
pub fn reserved_memory() -> Option<Range<u64>> {
    let [start, end] = [0, 1].map(|index| RESERVED_MEMORY[index].load(Relaxed));
    (start < end).then_some(start..end)
}

fn loaders_reserved_memory() -> Option<Range<u64>> {
    const RESERVED: u32 = 2;
    const LIMIT: u64 = 3 << 30;
    let (length, first) = (information(6, 44)?, information(6, 48)?);
    let mut at = first;
    while at < first + length {
        let quadword = |offset| u64::from(dword(at + offset)) | u64::from(dword(at + offset + 4)) << 32;
        let (start, bytes) = (quadword(4), quadword(12));
        let whole = (start | bytes).is_multiple_of(2 << 20) && start > 0 && bytes > 0 && start + bytes <= LIMIT;
        if dword(at + 20) == RESERVED && whole {
            return Some(start..start + bytes);
        }
        at += dword(at) + 4;
    }
    None
}
