//! The machine's memory map: sanitised once, then searched for free space.
//!
//! Firmware maps come unsorted, overlapping and unaligned. [`MemoryMap::sanitize`] turns them into sorted regions
//! without overlap; where two claims disagree, the less usable kind wins, as in Linux's `e820__update_table`.

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;

/// The most regions a map holds; as many as the e820 table of Linux's zero page.
pub const MAX_REGIONS: usize = 128;

/// What a region is for, with the numbers of ACPI 6.5, 15.1 "INT 15H, E820H"; multiboot 1 uses the same.
///
/// A newtype, not an enum, because firmware uses kinds of its own. A greater number is less usable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionKind(pub u32);

impl RegionKind {
    /// Free memory.
    pub const USABLE: Self = Self(1);
    /// Not memory, or not free.
    pub const RESERVED: Self = Self(2);
    /// ACPI tables; free once they are read.
    pub const ACPI_TABLES: Self = Self(3);
    /// ACPI's non-volatile storage.
    pub const ACPI_NVS: Self = Self(4);
    /// Memory with errors.
    pub const UNUSABLE: Self = Self(5);
}

impl fmt::Debug for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::USABLE => f.write_str("usable"),
            Self::RESERVED => f.write_str("reserved"),
            Self::ACPI_TABLES => f.write_str("ACPI tables"),
            Self::ACPI_NVS => f.write_str("ACPI NVS"),
            Self::UNUSABLE => f.write_str("unusable"),
            Self(kind) => write!(f, "kind {kind}"),
        }
    }
}

/// A range of physical addresses of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// The use of the region.
    pub kind: RegionKind,
}

/// The map does not fit into [`MAX_REGIONS`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooManyRegions;

impl fmt::Display for TooManyRegions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the memory map has more than {MAX_REGIONS} regions")
    }
}

impl core::error::Error for TooManyRegions {}

/// Sorted regions without overlap. An address in no region is not memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemoryMap {
    regions: ArrayVec<Region, MAX_REGIONS>,
}

impl MemoryMap {
    /// A map of no memory.
    pub const fn empty() -> Self {
        Self { regions: ArrayVec::new_const() }
    }

    /// Makes a map of the firmware's claims.
    ///
    /// # Errors
    ///
    /// The firmware's list or the sanitised one is longer than [`MAX_REGIONS`].
    pub fn sanitize(claims: impl IntoIterator<Item = Region>) -> Result<Self, TooManyRegions> {
        let mut raw = ArrayVec::<Region, MAX_REGIONS>::new();
        for claim in claims {
            if claim.start < claim.end {
                raw.try_push(claim).map_err(|_| TooManyRegions)?;
            }
        }
        // Between two neighbouring boundaries nothing changes.
        let mut boundaries = ArrayVec::<u64, { 2 * MAX_REGIONS }>::new();
        boundaries.extend(raw.iter().flat_map(|region| [region.start, region.end]));
        boundaries.sort_unstable();

        let mut map = Self::default();
        for pair in boundaries.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let covers = |region: &&Region| region.start <= start && end <= region.end;
            if start == end {
                continue;
            }
            if let Some(kind) = raw.iter().filter(covers).map(|region| region.kind).max() {
                map.append(Region { start, end, kind })?;
            }
        }
        Ok(map)
    }

    /// Adds a region above all others. Joins it to the last one if they are adjacent and of the same kind.
    fn append(&mut self, region: Region) -> Result<(), TooManyRegions> {
        match self.regions.last_mut() {
            Some(last) if last.end == region.start && last.kind == region.kind => last.end = region.end,
            _ => self.regions.try_push(region).map_err(|_| TooManyRegions)?,
        }
        Ok(())
    }

    /// The regions in ascending order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A new map without `range` in the usable memory.
    ///
    /// # Errors
    ///
    /// The new map is longer than [`MAX_REGIONS`].
    pub fn with_reserved(&self, range: Range<u64>) -> Result<Self, TooManyRegions> {
        let outside = self.regions.iter().flat_map(|&region| {
            [
                Region { end: region.end.min(range.start), ..region },
                Region { start: region.start.max(range.end), ..region },
            ]
        });
        let reserved = Region { start: range.start, end: range.end, kind: RegionKind::RESERVED };
        Self::sanitize(outside.chain([reserved]))
    }

    /// The usable ranges in ascending order.
    pub fn usable(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.regions.iter().filter(|region| region.kind == RegionKind::USABLE).map(|region| region.start..region.end)
    }

    /// Usable bytes in all.
    pub fn usable_bytes(&self) -> u64 {
        self.usable().map(|range| range.end - range.start).sum()
    }

    /// The end of the highest memory, usable or ACPI's.
    pub fn memory_end(&self) -> u64 {
        let memory = |region: &&Region| {
            matches!(region.kind, RegionKind::USABLE | RegionKind::ACPI_TABLES | RegionKind::ACPI_NVS)
        };
        self.regions.iter().filter(memory).map(|region| region.end).max().unwrap_or(0)
    }

    /// Whether all of `range` is usable.
    pub fn is_usable(&self, range: &Range<u64>) -> bool {
        self.usable().any(|usable| usable.start <= range.start && range.end <= usable.end)
    }

    /// Usable bytes from `start` up to the first hole.
    pub fn usable_from(&self, start: u64) -> u64 {
        self.usable().find(|range| range.contains(&start)).map_or(0, |range| range.end - start)
    }

    /// The highest free `size` bytes that start at a multiple of `align` (a power of two), within `window` and clear of
    /// `avoid`.
    pub fn find_highest(&self, size: u64, align: u64, window: Range<u64>, avoid: &[Range<u64>]) -> Option<Range<u64>> {
        self.usable().rev().find_map(|usable| {
            let floor = usable.start.max(window.start);
            let mut top = usable.end.min(window.end);
            loop {
                let start = top.checked_sub(size)? & !(align - 1);
                if start < floor {
                    return None;
                }
                let candidate = start..start + size;
                // The search resumes below the obstacle, so each pass passes at least one.
                match avoid.iter().find(|taken| overlap(taken, &candidate)) {
                    Some(obstacle) => top = obstacle.start,
                    None => return Some(candidate),
                }
            }
        })
    }

    /// The lowest free `size` bytes that start at a multiple of `align` (a power of two), within `window` and clear of
    /// `avoid`.
    pub fn find_lowest(&self, size: u64, align: u64, window: Range<u64>, avoid: &[Range<u64>]) -> Option<Range<u64>> {
        self.usable().find_map(|usable| {
            let ceiling = usable.end.min(window.end);
            let mut bottom = usable.start.max(window.start);
            loop {
                let start = bottom.checked_next_multiple_of(align)?;
                let end = start.checked_add(size)?;
                if end > ceiling {
                    return None;
                }
                match avoid.iter().find(|taken| overlap(taken, &(start..end))) {
                    Some(obstacle) => bottom = obstacle.end,
                    None => return Some(start..end),
                }
            }
        })
    }
}

/// Whether two ranges have a byte in common.
pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn usable(start: u64, end: u64) -> Region {
        Region { start, end, kind: RegionKind::USABLE }
    }

    fn reserved(start: u64, end: u64) -> Region {
        Region { start, end, kind: RegionKind::RESERVED }
    }

    fn map(claims: &[Region]) -> MemoryMap {
        MemoryMap::sanitize(claims.iter().copied()).unwrap()
    }

    #[test]
    fn an_unsorted_overlapping_map_is_sorted_and_the_less_usable_claim_wins() {
        let map =
            map(&[usable(0x10_0000, 0x800_0000), reserved(0x9_f000, 0x20_0000), usable(0, 0xa_0000), usable(5, 5)]);
        assert_eq!(map.regions(), [usable(0, 0x9_f000), reserved(0x9_f000, 0x20_0000), usable(0x20_0000, 0x800_0000)]);
        assert_eq!(map.usable_bytes(), 0x9_f000 + 0x7e0_0000);
        assert_eq!(map.memory_end(), 0x800_0000);
    }

    #[test]
    fn touching_regions_of_one_kind_become_one() {
        assert_eq!(map(&[usable(0x2000, 0x3000), usable(0x1000, 0x2000)]).regions(), [usable(0x1000, 0x3000)]);
    }

    #[test]
    fn a_map_with_more_regions_than_fit_is_an_error() {
        let many = (0..=MAX_REGIONS as u64).map(|i| usable(i * 0x2000, i * 0x2000 + 0x1000));
        assert_eq!(MemoryMap::sanitize(many), Err(TooManyRegions));
        let full = (0..MAX_REGIONS as u64).map(|i| usable(i * 0x2000, i * 0x2000 + 0x1000));
        let full = MemoryMap::sanitize(full).unwrap();
        assert_eq!(full.with_reserved(0x400..0x800), Err(TooManyRegions));
    }

    #[test]
    fn the_highest_space_skips_what_is_taken_and_what_is_too_small() {
        let map = map(&[usable(0x10_0000, 0x100_0000), usable(0x200_0000, 0x201_0000)]);
        let all = 0..u64::MAX;
        assert_eq!(map.find_highest(0x20_0000, 0x20_0000, all.clone(), &[]), Some(0xe0_0000..0x100_0000));
        assert_eq!(
            map.find_highest(0x20_0000, 0x20_0000, all.clone(), &[0xf0_0000..0xf0_0001]),
            Some(0xc0_0000..0xe0_0000)
        );
        assert_eq!(map.find_highest(0x1000, 0x1000, 0..0x100_0000, &[]), Some(0xff_f000..0x100_0000));
        assert_eq!(map.find_highest(0x1000_0000, 0x1000, all, &[]), None);
    }

    #[test]
    fn the_lowest_space_skips_what_is_taken_and_what_is_too_small() {
        let map = map(&[usable(0, 0x9_f800), usable(0x10_0000, 0x100_0000)]);
        assert_eq!(map.find_lowest(0x1000, 0x1000, 0x1_0000..u64::MAX, &[]), Some(0x1_0000..0x1_1000));
        assert_eq!(map.find_lowest(0x1000, 0x1000, 0x1_0000..u64::MAX, &[0..0x1_0001]), Some(0x1_1000..0x1_2000));
        assert_eq!(map.find_lowest(0x10_0000, 0x1000, 0..u64::MAX, &[]), Some(0x10_0000..0x20_0000));
        assert_eq!(map.find_lowest(u64::MAX, 0x1000, 0..u64::MAX, &[]), None);
    }

    prop_compose! {
        fn region()(start in 0u64..64, length in 0u64..16, kind in 1u32..6) -> Region {
            Region { start, end: start + length, kind: RegionKind(kind) }
        }
    }

    /// The kind of one address by a list of claims.
    fn kind_at(claims: &[Region], address: u64) -> Option<RegionKind> {
        claims.iter().filter(|claim| (claim.start..claim.end).contains(&address)).map(|claim| claim.kind).max()
    }

    proptest! {
        #[test]
        fn a_sanitised_map_is_sorted_joined_and_says_of_each_address_what_the_least_usable_claim_says(
            claims in prop::collection::vec(region(), 0..40),
        ) {
            let map = map(&claims);
            for pair in map.regions().windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
                prop_assert!(pair[0].end < pair[1].start || pair[0].kind != pair[1].kind);
            }
            for address in 0..90 {
                prop_assert_eq!(kind_at(map.regions(), address), kind_at(&claims, address));
            }
        }

        #[test]
        fn a_reserved_range_is_reserved_and_all_else_is_as_before(
            claims in prop::collection::vec(region(), 0..40), start in 0u64..90, length in 0u64..40,
        ) {
            let before = map(&claims);
            let range = start..start + length;
            let after = before.with_reserved(range.clone()).unwrap();
            prop_assert_eq!(&after, &map(after.regions()), "the result is sanitised");
            for address in 0..140 {
                let expected =
                    if range.contains(&address) { Some(RegionKind::RESERVED) } else { kind_at(before.regions(), address) };
                prop_assert_eq!(kind_at(after.regions(), address), expected);
            }
        }

        #[test]
        fn found_space_is_usable_aligned_clear_of_obstacles_and_nothing_better_exists(
            claims in prop::collection::vec(region(), 0..40),
            taken in prop::collection::vec((0u64..80, 0u64..8), 0..8),
            size in 1u64..12,
            shift in 0u32..4,
        ) {
            let map = map(&claims);
            let align = 1 << shift;
            let taken: Vec<_> = taken.into_iter().map(|(start, length)| start..start + length).collect();
            let window = 3..77;
            let fits = |start: u64| {
                let range = start..start + size;
                start.is_multiple_of(align) && range.start >= window.start && range.end <= window.end
                    && map.is_usable(&range) && !taken.iter().any(|other| overlap(other, &range))
            };
            let highest = map.find_highest(size, align, window.clone(), &taken).map(|range| range.start);
            let lowest = map.find_lowest(size, align, window.clone(), &taken).map(|range| range.start);
            prop_assert_eq!(highest, (0..80).rev().find(|&start| fits(start)));
            prop_assert_eq!(lowest, (0..80).find(|&start| fits(start)));
        }
    }
}
