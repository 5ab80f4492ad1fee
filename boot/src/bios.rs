//! A PC's BIOS, which guests go on to use: a disk's boot sector, GRUB on a disk, Xen.
//!
//! It does not know of the host's region. [`Bios::compose`] makes a page of services for low memory: those of interrupt
//! 15H that tell of memory, made from the host's map, and the code that starts a disk's boot sector; everything else
//! goes on to the BIOS itself.
//!
//! References: ACPI 6.5, 15.1 "INT 15H, E820H - Query System Address Map"; for the older services Ralf Brown's Interrupt List, release 61.

use core::ops::Range;

use crate::memory_map::{MAX_REGIONS, MemoryMap};
use crate::phys::PhysMemory;

const MIB: u64 = 1 << 20;

/// The size of the page of services.
pub const SERVICES_BYTES: usize = 4096;

/// The most bytes of code, so that the longest map fits behind it.
const MOST_CODE_BYTES: usize = 512;
const _: () = assert!(MOST_CODE_BYTES + 16 + MAX_REGIONS * 20 <= SERVICES_BYTES);

/// The address of the vector of interrupt 15H.
pub const INT15_VECTOR: u64 = 4 * 0x15;
/// The address of a 16-bit word of the BIOS' data area: the KiB of memory from 0 on, as interrupt 12H tells it.
pub const BASE_MEMORY_KIB: u64 = 0x413;

/// The offsets in the page of services where interrupt 15H and the start of a disk begin, and where the latter ends if
/// there is no boot sector.
const INT15_ENTRY: u16 = 0;
const START_ENTRY: u16 = 4;
const NO_BOOT_SECTOR: u16 = 8;

/// A BIOS that serves interrupts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bios {
    /// Segment and offset of its interrupt 15H.
    int15: u32,
}

/// Where the page of services is to be: the highest free low memory, as what is above it is lost to guests that ask
/// interrupt 12H.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place(Range<u64>);

impl Bios {
    /// The machine's BIOS; `None` where the interrupt vectors are empty, as EFI firmware leaves them.
    pub fn find(memory: &impl PhysMemory) -> Option<Self> {
        const LEAST_KIB: u16 = 64;
        const MOST_KIB: u16 = 640;
        let int15 = memory.read_u32(INT15_VECTOR).ok()?;
        let mut base_memory = [0; 2];
        memory.read(BASE_MEMORY_KIB, &mut base_memory).ok()?;
        let kib = u16::from_le_bytes(base_memory);
        (int15 != 0 && (LEAST_KIB..=MOST_KIB).contains(&kib)).then_some(Self { int15 })
    }

    /// Composes the page at `place`: `code`, which is `entry`'s, and the data that it uses. `map` is the memory
    /// that guests have, and `drive` the BIOS' number of the disk to be started, if there is one.
    pub fn compose(self, code: &[u8], map: &MemoryMap, drive: Option<u8>, services: &mut [u8; SERVICES_BYTES]) {
        debug_assert!(code.len() <= MOST_CODE_BYTES, "the map has no room");
        let sizes = Sizes::of(map);
        let entries = map.regions().iter().flat_map(|region| {
            let kind = region.kind.0.to_le_bytes();
            let [start, length] = [region.start, region.end - region.start].map(u64::to_le_bytes);
            start.into_iter().chain(length).chain(kind)
        });
        let data = (self.int15.to_le_bytes().into_iter())
            .chain((map.regions().len() as u32).to_le_bytes())
            .chain([sizes.low, sizes.high, sizes.extended].into_iter().flat_map(u16::to_le_bytes))
            .chain([drive.unwrap_or(0), 0])
            .chain(entries);
        services.fill(0);
        for (to, from) in services.iter_mut().zip(code.iter().copied().chain(data)) {
            *to = from;
        }
    }
}

impl Place {
    /// The place, clear of `taken`.
    pub fn find(map: &MemoryMap, taken: &[Range<u64>]) -> Option<Self> {
        const KIB: u64 = 1024;
        const LOW_MEMORY: Range<u64> = 0x1000..0xa_0000;
        map.find_highest(SERVICES_BYTES as u64, KIB, LOW_MEMORY, taken).map(Self)
    }

    /// Its addresses.
    pub fn range(&self) -> Range<u64> {
        self.0.clone()
    }

    /// What [`BASE_MEMORY_KIB`] must say.
    pub const fn base_memory_kib(&self) -> u16 {
        (self.0.start / 1024) as u16
    }

    /// What [`INT15_VECTOR`] must say.
    pub const fn int15(&self) -> u32 {
        (self.segment() as u32) << 16 | INT15_ENTRY as u32
    }

    /// The segment.
    pub const fn segment(&self) -> u16 {
        (self.0.start / 16) as u16
    }

    /// The offset in the segment at which a guest begins that is to start a disk.
    pub const fn start(&self) -> u16 {
        START_ENTRY
    }

    /// The linear address of the VMCALL that says that there is no boot sector.
    pub const fn no_boot_sector(&self) -> u64 {
        self.0.start + NO_BOOT_SECTOR as u64
    }
}

/// The sizes that services older than E820H tell, each up to the first hole.
#[derive(Debug, PartialEq, Eq)]
struct Sizes {
    /// KiB from 1 MiB to 16 MiB.
    low: u16,
    /// Blocks of 64 KiB from 16 MiB on.
    high: u16,
    /// KiB from 1 MiB on, at most 63 MiB of them.
    extended: u16,
}

impl Sizes {
    fn of(map: &MemoryMap) -> Self {
        const BLOCK: u64 = 64 * 1024;
        let extended = map.usable_from(MIB);
        let low = extended.min(15 * MIB);
        let high = if low == 15 * MIB { extended - low } else { 0 };
        Self {
            low: (low / 1024) as u16,
            high: (high / BLOCK).min(0xffff) as u16,
            extended: (extended.min(63 * MIB) / 1024) as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{Region, RegionKind};
    use crate::phys::FakePhys;
    use std::vec;
    use std::vec::Vec;

    fn map(regions: &[(u64, u64, RegionKind)]) -> MemoryMap {
        let regions = regions.iter().map(|&(start, end, kind)| Region { start, end, kind });
        MemoryMap::sanitize(regions).unwrap()
    }

    fn memory(int15: u32, base_kib: u16) -> FakePhys {
        let mut bytes = vec![0; 0x500];
        bytes[0x54..0x58].copy_from_slice(&int15.to_le_bytes());
        bytes[0x413..0x415].copy_from_slice(&base_kib.to_le_bytes());
        FakePhys { base: 0, bytes }
    }

    #[test]
    fn a_bios_has_a_vector_and_a_plausible_size_of_memory() {
        assert_eq!(Bios::find(&memory(0xf000_f859, 639)), Some(Bios { int15: 0xf000_f859 }));
        for (int15, kib) in [(0, 639), (0xf000_f859, 0), (0xf000_f859, 641)] {
            assert_eq!(Bios::find(&memory(int15, kib)), None);
        }
        assert_eq!(Bios::find(&FakePhys { base: 0x1000, bytes: Vec::new() }), None);
    }

    #[test]
    fn the_place_is_the_top_of_low_memory_in_whole_kib_and_all_that_depends_on_it_agrees() {
        let map = map(&[(0, 0x9_fa00, RegionKind::USABLE), (MIB, 64 * MIB, RegionKind::USABLE)]);
        let place = Place::find(&map, &[]).unwrap();
        assert_eq!(place.range(), 0x9_e800..0x9_f800);
        assert_eq!((place.base_memory_kib(), place.int15(), place.segment()), (634, 0x9e80_0000, 0x9e80));
        let below = Place::find(&map, &[0x9_f000..0x9_f100]).unwrap();
        assert_eq!(below.range(), 0x9_e000..0x9_f000);
        assert_eq!(Place::find(&map, &[0..0xa_0000]), None);
    }

    #[test]
    fn the_page_has_code_then_vector_sizes_drive_and_map() {
        let map = map(&[
            (0, 0x9_e800, RegionKind::USABLE),
            (MIB, 100 * MIB, RegionKind::USABLE),
            (100 * MIB, 102 * MIB, RegionKind::RESERVED),
        ]);
        let mut page = [0xcc; SERVICES_BYTES];
        Bios { int15: 0xf000_f859 }.compose(&[0x90; 32], &map, Some(0x81), &mut page);
        let half = |at: usize| u16::from_le_bytes(page[at..at + 2].try_into().unwrap());
        let wide = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        assert_eq!(page[..32], [0x90; 32]);
        assert_eq!(page[32..40], [0x59, 0xf8, 0, 0xf0, 3, 0, 0, 0]);
        assert_eq!([half(40), half(42), half(44)], [15 * 1024, 84 * 16, 63 * 1024]);
        assert_eq!(page[46..48], [0x81, 0]);
        let last = 48 + 2 * 20;
        assert_eq!((wide(last), wide(last + 8), page[last + 16]), (100 * MIB, 2 * MIB, 2));
        assert!(page[last + 20..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn sizes_end_at_the_first_hole_and_fit_into_16_bits() {
        let of = |end| Sizes::of(&map(&[(MIB, end, RegionKind::USABLE)]));
        assert_eq!(of(8 * MIB), Sizes { low: 7 * 1024, high: 0, extended: 7 * 1024 });
        assert_eq!(of(16 * MIB), Sizes { low: 15 * 1024, high: 0, extended: 15 * 1024 });
        assert_eq!(of(32 * MIB), Sizes { low: 15 * 1024, high: 256, extended: 31 * 1024 });
        assert_eq!(of(8192 * MIB), Sizes { low: 15 * 1024, high: 0xffff, extended: 63 * 1024 });
        assert_eq!(Sizes::of(&map(&[])), Sizes { low: 0, high: 0, extended: 0 });
    }
}
