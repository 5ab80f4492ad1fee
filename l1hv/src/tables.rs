//! The tables of EPT01 and of all EPT02s: one area in the host's region, of which each processor owns a part.
//!
//! A processor allocates only from its own part, so that no lock is taken. It reads tables in the others' parts only if
//! they belong to EPT01.

use core::sync::atomic::{AtomicU64, Ordering};

use ept::nested::NestedPaging;
use ept::table::TableMemory;
use ept::{Entry, Hpa};

use crate::mem::{HostPages, PAGE_BYTES};

type Table = [AtomicU64; 512];

/// All tables.
#[derive(Clone, Copy, Debug)]
pub struct TableArea {
    base: Hpa,
    tables: &'static [Table],
}

impl TableArea {
    /// All of `pages` as tables.
    pub fn new(pages: HostPages) -> Self {
        Self { base: pages.phys(), tables: pages.into_shared_tables() }
    }

    /// The number of tables.
    pub const fn len(&self) -> usize {
        self.tables.len()
    }

    /// Part `part` of `parts` parts of the same size. Each part may be taken once only.
    pub fn pool(self, part: usize, parts: usize) -> TablePool {
        let count = self.len() / parts;
        TablePool::new(self, part * count, count)
    }

    /// A pool without tables, for changes that need no new table.
    pub fn without_room(self) -> TablePool {
        TablePool::new(self, 0, 0)
    }

    fn number(&self, table: Hpa) -> usize {
        ((table.0 - self.base.0) / PAGE_BYTES) as usize
    }

    /// An entry of a table.
    #[inline]
    pub fn read(&self, table: Hpa, index: u64) -> Entry {
        // Acquire: the entry's table was written before the entry.
        Entry::from_bits(self.tables[self.number(table)][index as usize].load(Ordering::Acquire))
    }

    #[inline]
    fn write(&self, table: Hpa, index: u64, entry: Entry) {
        self.tables[self.number(table)][index as usize].store(entry.bits(), Ordering::Release);
    }

    /// Tests several entries at a time.
    fn next_used(&self, table: Hpa, from: usize) -> usize {
        const TOGETHER: usize = 8;
        let words = &self.tables[self.number(table)];
        let is_used = |word: &AtomicU64| word.load(Ordering::Relaxed) != 0;
        let end = from.next_multiple_of(TOGETHER).min(words.len());
        let begun = words[from..end].iter().position(is_used);
        let at = begun.map(|at| from + at).or_else(|| {
            let (groups, _) = words[end..].as_chunks::<TOGETHER>();
            let any_used = |group: &[AtomicU64; TOGETHER]| {
                group.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed)) != 0
            };
            let group = groups.iter().position(any_used)?;
            let within = groups[group].iter().position(is_used)?;
            Some(end + group * TOGETHER + within)
        });
        at.unwrap_or(words.len())
    }

    fn first_word(&self, number: usize) -> &AtomicU64 {
        &self.tables[number][0]
    }
}

/// A part of the area, of fixed size: the budget of one processor.
#[derive(Debug)]
pub struct TablePool {
    area: TableArea,
    budget: usize,
    /// Tables from this one on, and before `end`, were never handed out.
    fresh: usize,
    end: usize,
    /// The first table of the list of free tables. A free table's first word is the number of the next one.
    free: Option<usize>,
    /// Tables handed out and not given back.
    in_use: usize,
    /// The most tables that were ever in use.
    most_in_use: usize,
}

const END_OF_LIST: u64 = u64::MAX;

impl TablePool {
    fn new(area: TableArea, first: usize, count: usize) -> Self {
        Self { area, budget: count, fresh: first, end: first + count, free: None, in_use: 0, most_in_use: 0 }
    }

    /// The budget: the number of tables in the pool.
    pub const fn budget(&self) -> usize {
        self.budget
    }

    /// The number of tables in use.
    pub const fn in_use(&self) -> usize {
        self.in_use
    }

    /// The most tables that were ever in use.
    pub const fn most_in_use(&self) -> usize {
        self.most_in_use
    }
}

/// The room of a part that EPT01 may take: a nested guest always finds what one EPT02 needs.
#[derive(Debug)]
pub struct RoomForEpt01<'a>(pub &'a mut TablePool);

impl TableMemory for RoomForEpt01<'_> {
    fn read(&self, table: Hpa, index: u64) -> Entry {
        self.0.read(table, index)
    }

    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        self.0.write(table, index, entry);
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let left = self.0.budget() - self.0.in_use();
        if left > NestedPaging::LEAST_TABLES { self.0.allocate() } else { None }
    }

    fn free(&mut self, table: Hpa) {
        self.0.free(table);
    }
}

impl TableMemory for TablePool {
    #[inline]
    fn read(&self, table: Hpa, index: u64) -> Entry {
        self.area.read(table, index)
    }

    #[inline]
    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        self.area.write(table, index, entry);
    }

    fn next_used(&self, table: Hpa, from: u64) -> u64 {
        self.area.next_used(table, from as usize) as u64
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let number = match self.free {
            Some(number) => {
                let next = self.area.first_word(number).load(Ordering::Relaxed);
                self.free = (next != END_OF_LIST).then_some(next as usize);
                for word in &self.area.tables[number] {
                    word.store(0, Ordering::Relaxed);
                }
                number
            }
            None if self.fresh < self.end => {
                self.fresh += 1;
                self.fresh - 1
            }
            None => return None,
        };
        self.in_use += 1;
        self.most_in_use = self.most_in_use.max(self.in_use);
        Some(self.area.base + number as u64 * PAGE_BYTES)
    }

    fn free(&mut self, table: Hpa) {
        let number = self.area.number(table);
        self.in_use -= 1;
        self.area.first_word(number).store(self.free.map_or(END_OF_LIST, |next| next as u64), Ordering::Relaxed);
        self.free = Some(number);
    }
}
