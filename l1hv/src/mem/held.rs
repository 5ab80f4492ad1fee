//! Pages of devices that are the host's alone: the registers of IOMMUs. Guests find the scratch page there, and what the
//! host does for guests through the direct map ends in a page of the same kind.

use core::ops::Range;

use arrayvec::ArrayVec;
use boot::acpi::dmar::MAX_UNITS;

/// Ranges of whole pages.
#[derive(Clone, Debug, Default)]
pub struct HeldPages {
    ranges: ArrayVec<Range<u64>, MAX_UNITS>,
    /// From the first to the last of them: most addresses are outside, which takes one test.
    bounds: Range<u64>,
}

impl HeldPages {
    /// These ranges.
    pub fn new(ranges: impl Iterator<Item = Range<u64>>) -> Self {
        let mut ranges: ArrayVec<_, MAX_UNITS> = ranges.collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let start = ranges.first().map_or(0, |first| first.start);
        let end = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        Self { ranges, bounds: start..end }
    }

    /// The ranges in ascending order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Whether any byte from `start` to before `end` is in one of them.
    #[inline]
    pub fn touch(&self, start: u64, end: u64) -> bool {
        start < self.bounds.end && end > self.bounds.start && self.find(start, end)
    }

    #[cold]
    fn find(&self, start: u64, end: u64) -> bool {
        self.ranges.iter().any(|range| start < range.end && end > range.start)
    }
}
