//! Building a plan: every destination is claimed before it is used.

use core::ops::Range;

use arrayvec::ArrayVec;
use ept::Gpa;

use super::{GuestEntry, GuestInput, LoadError, LoadPlan, MAX_COPIES, MAX_ZEROS, PlannedCopy};
use crate::memory_map::{MemoryMap, overlap};
use crate::multiboot::MAX_MODULES;

const PAGE: u64 = 4096;
/// The memory for generated structures: above the memory that firmware and real-mode code use, below the extended BIOS
/// data area.
const LOW_MEMORY: Range<u64> = 0x1_0000..0x9_f000;
const FOUR_GIB: u64 = 1 << 32;

/// A plan in the making.
pub(crate) struct PlanBuilder<'a> {
    map: &'a MemoryMap,
    copies: ArrayVec<PlannedCopy<'a>, MAX_COPIES>,
    zeros: ArrayVec<Range<u64>, MAX_ZEROS>,
    /// The ranges of the modules, and of every destination so far.
    taken: ArrayVec<Range<u64>, { MAX_MODULES + MAX_COPIES + MAX_ZEROS }>,
}

impl<'a> PlanBuilder<'a> {
    /// An empty plan that keeps clear of all modules.
    pub fn new(input: &GuestInput<'a>) -> Result<Self, LoadError> {
        let mut builder =
            Self { map: input.memory_map, copies: ArrayVec::new(), zeros: ArrayVec::new(), taken: ArrayVec::new() };
        for module in core::iter::once(&input.image).chain(input.modules) {
            builder.take(module.range())?;
        }
        Ok(builder)
    }

    fn take(&mut self, range: Range<u64>) -> Result<(), LoadError> {
        self.taken.try_push(range).map_err(|_| LoadError::TooManyParts)
    }

    /// Whether `range` is usable memory that is not taken.
    pub fn is_free(&self, range: &Range<u64>) -> bool {
        range.end <= FOUR_GIB && self.map.is_usable(range) && !self.taken.iter().any(|taken| overlap(taken, range))
    }

    /// Takes `length` bytes at the fixed address `start`.
    pub fn claim_at(&mut self, start: u64, length: u64) -> Result<Range<u64>, LoadError> {
        let range = start..start.saturating_add(length);
        if !self.is_free(&range) {
            return Err(LoadError::NotFree { start: range.start, end: range.end });
        }
        self.take(range.clone())?;
        Ok(range)
    }

    /// Takes the lowest free `length` bytes from `floor` up.
    pub fn claim_lowest(
        &mut self,
        what: &'static str,
        length: u64,
        align: u64,
        floor: u64,
    ) -> Result<Range<u64>, LoadError> {
        let found = self.map.find_lowest(length, align, floor..FOUR_GIB, &self.taken);
        self.claimed(found, what, length)
    }

    /// Takes the highest free `length` bytes that end at `ceiling` or below, on a page.
    pub fn claim_highest(&mut self, what: &'static str, length: u64, ceiling: u64) -> Result<Range<u64>, LoadError> {
        let found = self.map.find_highest(length, PAGE, 0x10_0000..ceiling.min(FOUR_GIB), &self.taken);
        self.claimed(found, what, length)
    }

    fn claimed(&mut self, found: Option<Range<u64>>, what: &'static str, bytes: u64) -> Result<Range<u64>, LoadError> {
        let range = found.ok_or(LoadError::NoRoom { what, bytes })?;
        self.take(range.clone())?;
        Ok(range)
    }

    /// Plans a copy to a claimed place.
    pub fn copy(&mut self, to: u64, bytes: &'a [u8]) -> Result<(), LoadError> {
        self.copies.try_push(PlannedCopy { to: Gpa(to), bytes }).map_err(|_| LoadError::TooManyParts)
    }

    /// Plans zeros in a claimed place.
    pub fn zero(&mut self, range: Range<u64>) -> Result<(), LoadError> {
        if range.is_empty() {
            return Ok(());
        }
        self.zeros.try_push(range).map_err(|_| LoadError::TooManyParts)
    }

    /// Takes low memory for generated structures of `bytes` together, composed in `scratch`.
    pub fn low_block(&mut self, bytes: u64, scratch: &'a mut [u8]) -> Result<LowBlock<'a>, LoadError> {
        let what = "structures that the guest needs in low memory";
        let bytes = bytes.next_multiple_of(PAGE);
        let scratch = scratch.get_mut(..bytes as usize).ok_or(LoadError::NoRoom { what, bytes })?;
        let found = self.map.find_lowest(bytes, PAGE, LOW_MEMORY, &self.taken);
        let range = self.claimed(found, what, bytes)?;
        scratch.fill(0);
        Ok(LowBlock { base: range.start, bytes: scratch, used: 0 })
    }

    /// The plan with its entry.
    pub fn finish(mut self, low: LowBlock<'a>, entry: GuestEntry) -> Result<LoadPlan<'a>, LoadError> {
        self.copy(low.base, low.bytes)?;
        Ok(LoadPlan { copies: self.copies, zeros: self.zeros, entry })
    }
}

/// Low memory of the guest under composition: pieces are handed out from the bottom.
pub(crate) struct LowBlock<'a> {
    base: u64,
    bytes: &'a mut [u8],
    used: u64,
}

impl LowBlock<'_> {
    /// Hands out `length` zeroed bytes and their guest-physical address.
    pub fn alloc(&mut self, length: u64, align: u64) -> Result<(u64, &mut [u8]), LoadError> {
        let start = (self.base + self.used).next_multiple_of(align) - self.base;
        let end = start + length;
        let no_room = LoadError::NoRoom { what: "structures that the guest needs in low memory", bytes: end };
        let piece = self.bytes.get_mut(start as usize..end as usize).ok_or(no_room)?;
        self.used = end;
        Ok((self.base + start, piece))
    }

    /// Places `text` with a zero at its end; returns its address.
    pub fn string(&mut self, text: &[u8]) -> Result<u64, LoadError> {
        let (address, piece) = self.alloc(text.len() as u64 + 1, 1)?;
        piece[..text.len()].copy_from_slice(text);
        Ok(address)
    }

    /// Writes `bytes` at `offset` of the piece at `address`, which `alloc` handed out with room for them.
    pub fn put(&mut self, address: u64, offset: usize, bytes: &[u8]) {
        let at = (address - self.base) as usize + offset;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
