//! MSRs: areas, bitmaps, and the copies of MTRRs.

use ept::Gpa;
use shadow::hw::GuestMemory;
use shadow::merge::{AreaError, MSR_AREA_ROOM, MsrEntry, copy_in, is_loadable, poison, store};
use shadow::msr::{
    Access, BITMAP_BYTES, HOST_INTERCEPTS, IA32_FS_BASE, IA32_XSS, bitmap_bit, host_owns, intercept_writes,
    is_outside_ranges,
};
use shadow::mtrr::Mtrrs;

use super::machine::Ram;
use crate::Input;
use crate::input::edit;

/// Entries of the areas that the input fills.
const ENTRIES: u32 = 16;
const AREA: Gpa = Gpa(0x100);

/// An MSR area, accesses to MSRs, and writes to MTRRs.
///
/// The input: an MSR and a value, the area's length and its content, and MTRRs.
pub fn msrs(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    check_bitmaps(input.neighbour(0x480) as u32);
    check_mtrrs(&mut input);
    let count = u32::from(input.byte());
    let mut memory = Ram::new();
    let area = &mut memory.bytes()[AREA.0 as usize..][..16 * ENTRIES as usize];
    for (number, entry) in area.chunks_exact_mut(16).enumerate() {
        entry[..4].copy_from_slice(&[0xc000_0082_u32, 0x174, 0x1d9, 0x277][number % 4].to_le_bytes());
    }
    edit(&mut input, area);
    // A long area is longer than any copy.
    let count = if count == 0xff { 513 } else { count % (ENTRIES + 1) };
    check_load(&memory, count);
    check_store(&mut memory, count);
}

fn check_bitmaps(msr: u32) {
    for access in [Access::Read, Access::Write] {
        let intercepted = bitmap_bit(msr, access).map(|(byte, bit)| HOST_INTERCEPTS[byte] >> bit & 1 != 0);
        assert_eq!(intercepted, (!is_outside_ranges(msr)).then(|| host_owns(msr, access)), "{msr:#x}");
    }
    let mut bitmap = [0; BITMAP_BYTES];
    intercept_writes(&mut bitmap, &[msr]);
    let ones: u32 = bitmap.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word).count_ones()).sum();
    assert_eq!(ones, u32::from(!is_outside_ranges(msr)));
}

/// A write that is valid is read back, another one changes nothing.
fn check_mtrrs(input: &mut Input<'_>) {
    let mtrrs = Mtrrs::new(input.neighbour(0x508), 32 + u32::from(input.byte() % 21));
    for _ in 0..input.byte() & 3 {
        let msr = 0x200 + u32::from(input.byte());
        let (before, value) = (mtrrs.read(msr), input.neighbour(0x806));
        match mtrrs.write(msr, value) {
            Some(()) => assert!(Mtrrs::has(msr) && mtrrs.read(msr) == Some(value)),
            None => assert_eq!(mtrrs.read(msr), before),
        }
    }
}

fn entry(memory: &Ram, number: u32) -> MsrEntry {
    let at = AREA + u64::from(number) * 16;
    MsrEntry { index: memory.read_u32(at), reserved: memory.read_u32(at + 4), value: memory.read_u64(at + 8) }
}

/// No MSR that is held gets into a copy.
fn check_load(memory: &Ram, count: u32) {
    let mut copy = [MsrEntry::default(); MSR_AREA_ROOM];
    let good = match copy_in(memory, AREA, count, is_loadable, &mut copy) {
        Ok(()) => count,
        Err(AreaError(number)) => {
            poison(&mut copy, number);
            assert_eq!(copy[number as usize - 1].index, IA32_FS_BASE, "the processor fails here");
            number as u32 - 1
        }
    };
    for number in 0..good {
        let copied = copy[number as usize];
        assert_eq!(copied, entry(memory, number));
        assert!(!host_owns(copied.index, Access::Write) || copied.index == IA32_XSS);
        assert!(!is_outside_ranges(copied.index));
    }
    assert!(good == count || good == 512 || !is_loadable(&entry(memory, good)));
}

/// A store changes the values of its entries and nothing else.
fn check_store(memory: &mut Ram, count: u32) {
    let before = *memory.bytes();
    let value = |msr: u32| (msr % 7 != 3).then_some(u64::from(msr) << 8 | 0x55);
    let stored = match store(memory, AREA, count, value) {
        Ok(()) => count,
        Err(AreaError(number)) => number as u32 - 1,
    };
    for number in 0..stored.min(ENTRIES) {
        let entry = entry(memory, number);
        assert_eq!(Some(entry.value), value(entry.index));
        assert!(entry.reserved == 0 && entry.index >> 8 != 8);
    }
    let (start, end) = (AREA.0 as usize, AREA.0 as usize + 16 * ENTRIES as usize);
    let after = memory.bytes();
    assert!(before[..start] == after[..start]);
    for (number, (old, new)) in before[start..end].chunks(16).zip(after[start..end].chunks(16)).enumerate() {
        assert!(old[..8] == new[..8] && (old == new || (number as u32) < stored));
    }
}
