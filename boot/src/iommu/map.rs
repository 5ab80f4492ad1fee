//! What devices reach, and the tables that say so (VT-d, 9 "Translation Structure Formats").

use core::ops::Range;

use arrayvec::ArrayVec;

use super::unit::Capabilities;
use crate::acpi::dmar::MAX_UNITS;

/// The registers of all units, the interrupts and the host's region.
const MOST_WITHHELD: usize = MAX_UNITS + 2;

const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = 4096;
const BUSES: usize = 256;
const FUNCTIONS: usize = 256;

/// Root and context entries.
const PRESENT: u64 = 1 << 0;
/// Of a context entry: the domain. 0 is not for tables if the unit caches entries that are not present.
const DOMAIN: u64 = 1;
const DOMAIN_SHIFT: u32 = 8;

/// Second-stage entries.
const READ_WRITE: u64 = 0b11;
const PAGE: u64 = 1 << 7;

/// An identity map with holes, in tables of some format.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Map {
    /// The levels of tables: 3, 4 or 5.
    levels: u32,
    /// The highest level with pages.
    leaf_level: u32,
    /// Where the map ends.
    end: u64,
    /// Pages that are not mapped.
    withheld: ArrayVec<Range<u64>, MOST_WITHHELD>,
}

/// The part of a range that is mapped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mapped {
    All,
    Some,
    Nothing,
}

/// The bytes that an entry of a table of this level is for.
const fn entry_bytes(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

/// The bits of addresses that so many levels translate.
const fn bits(levels: u32) -> u32 {
    12 + 9 * levels
}

impl Map {
    /// The map of a machine with memory up to `memory_end` and addresses of so many bits, for units that have these
    /// capabilities in common. `None` if devices would not reach all memory.
    pub fn new(common: Capabilities, memory_end: u64, physical_bits: u32) -> Option<Self> {
        let wanted = physical_bits.min(common.address_bits());
        let levels = common.levels().find(|levels| bits(*levels) >= wanted).or_else(|| common.levels().last())?;
        let leaf_level = common.leaf_level();
        let reach = 1 << wanted.min(bits(levels));
        // With pages of 1 GiB, windows of devices above memory cost a table for each 512 GiB.
        let end = if leaf_level == 3 { reach } else { memory_end.next_multiple_of(entry_bytes(3)).min(reach) };
        (memory_end <= end).then(|| Self { levels, leaf_level, end, withheld: ArrayVec::new() })
    }

    /// Leaves a range out: of whole pages.
    pub fn withhold(&mut self, range: Range<u64>) {
        self.withheld.push(range);
    }

    /// The width of addresses that the tables translate.
    pub const fn address_bits(&self) -> u32 {
        bits(self.levels)
    }

    /// The number of tables, the top one included.
    pub fn tables(&self) -> u64 {
        self.tables_from(self.levels, 0)
    }

    fn tables_from(&self, level: u32, start: u64) -> u64 {
        let below = (0..ENTRIES).map(|index| self.entry(level, start, index));
        let links = below.filter(|(_, mapped)| self.links(level, *mapped));
        1 + links.map(|(start, _)| self.tables_from(level - 1, start)).sum::<u64>()
    }

    /// Whether the entry for a range leads to another table.
    fn links(&self, level: u32, mapped: Mapped) -> bool {
        match mapped {
            Mapped::Nothing => false,
            Mapped::All => level > self.leaf_level,
            Mapped::Some => level > 1,
        }
    }

    /// Where the range of an entry starts, and what of it is mapped, in the table of `level` for what is at `start`.
    fn entry(&self, level: u32, start: u64, index: u64) -> (u64, Mapped) {
        let start = start + index * entry_bytes(level);
        (start, self.part(start..start + entry_bytes(level)))
    }

    fn part(&self, range: Range<u64>) -> Mapped {
        let covers = |hole: &Range<u64>| hole.start <= range.start && range.end <= hole.end;
        let touches = |hole: &Range<u64>| hole.start < range.end && range.start < hole.end;
        if range.start >= self.end || self.withheld.iter().any(covers) {
            Mapped::Nothing
        } else if range.end > self.end || self.withheld.iter().any(touches) {
            Mapped::Some
        } else {
            Mapped::All
        }
    }
}

/// Memory for tables: pages of zeros that follow each other from an address on.
#[derive(Debug)]
pub struct TableArea<'a> {
    address: u64,
    pages: &'a mut [[u64; ENTRIES as usize]],
    used: usize,
}

impl<'a> TableArea<'a> {
    /// The pages at `address`.
    pub const fn new(address: u64, pages: &'a mut [[u64; ENTRIES as usize]]) -> Self {
        Self { address, pages, used: 0 }
    }

    /// Writes all tables for a map. Returns the address of the root table.
    ///
    /// # Panics
    ///
    /// There are fewer pages than [`super::Plan::pages`] says.
    pub(super) fn build(mut self, map: &Map) -> u64 {
        let (root, context) = (self.take(), self.take());
        let second_stage = self.write(map, map.levels, 0);
        let width = u64::from(map.levels - 2);
        for bus in 0..BUSES {
            self.pages[root][2 * bus] = self.address_of(context) | PRESENT;
        }
        // The type of translation is 0: untranslated requests only, by second-stage tables. Faults are reported.
        for function in 0..FUNCTIONS {
            self.pages[context][2 * function] = second_stage | PRESENT;
            self.pages[context][2 * function + 1] = DOMAIN << DOMAIN_SHIFT | width;
        }
        self.address_of(root)
    }

    /// Writes the table of `level` for what is at `start`, and those below it. Returns its address.
    fn write(&mut self, map: &Map, level: u32, start: u64) -> u64 {
        let table = self.take();
        for index in 0..ENTRIES {
            let (start, mapped) = map.entry(level, start, index);
            let entry = if map.links(level, mapped) {
                self.write(map, level - 1, start) | READ_WRITE
            } else if mapped == Mapped::All {
                start | READ_WRITE | if level > 1 { PAGE } else { 0 }
            } else {
                0
            };
            self.pages[table][index as usize] = entry;
        }
        self.address_of(table)
    }

    fn take(&mut self) -> usize {
        self.used += 1;
        self.used - 1
    }

    const fn address_of(&self, table: usize) -> u64 {
        self.address + table as u64 * TABLE_BYTES
    }
}
