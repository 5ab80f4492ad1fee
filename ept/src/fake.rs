//! Fakes of the seams, for tests: a pool of tables that checks its laws, and a guest hypervisor's memory with an EPT12
//! in it.

pub mod model;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::table::{ENTRIES, TableMemory};
use crate::walk::GuestTables;
use crate::{Entry, Gpa, Hpa};

/// Memory for the host's tables, with a budget.
///
/// The use of a table that was not allocated, or was freed, panics.
#[derive(Clone, Debug)]
pub struct FakeTables {
    tables: BTreeMap<Hpa, [Entry; ENTRIES as usize]>,
    unused: Vec<Hpa>,
    freed: BTreeMap<Hpa, u64>,
}

impl FakeTables {
    const BASE: Hpa = Hpa(0x70_0000_0000);

    /// Room for `budget` tables.
    pub fn new(budget: u64) -> Self {
        let unused = (0..budget).rev().map(|page| Self::BASE + page * 4096).collect();
        Self { tables: BTreeMap::new(), unused, freed: BTreeMap::new() }
    }

    /// The number of allocated tables.
    pub fn in_use(&self) -> usize {
        self.tables.len()
    }

    /// How many times a table has been given back.
    pub fn times_freed(&self, table: Hpa) -> u64 {
        self.freed.get(&table).copied().unwrap_or(0)
    }
}

impl TableMemory for FakeTables {
    fn read(&self, table: Hpa, index: u64) -> Entry {
        self.tables[&table][index as usize]
    }

    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        self.tables.get_mut(&table).expect("a table in use")[index as usize] = entry;
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let table = self.unused.pop()?;
        self.tables.insert(table, [Entry::NOT_PRESENT; ENTRIES as usize]);
        Some(table)
    }

    fn free(&mut self, table: Hpa) {
        assert!(self.tables.remove(&table).is_some(), "freed twice");
        *self.freed.entry(table).or_default() += 1;
        self.unused.push(table);
    }
}

/// A guest hypervisor's memory: words by address, all others 0.
#[derive(Clone, Debug, Default)]
pub struct FakeGuest(BTreeMap<Gpa, u64>);

impl FakeGuest {
    /// Sets an entry of a table.
    pub fn set(&mut self, table: Gpa, index: u64, entry: Entry<Gpa>) {
        self.0.insert(table + index * 8, entry.bits());
    }

    /// An entry of a table.
    pub fn get(&self, table: Gpa, index: u64) -> Entry<Gpa> {
        Entry::from_bits(self.read(table + index * 8))
    }
}

/// Access to tables as words, for tests.
#[cfg(test)]
impl FakeGuest {
    pub(crate) fn set_word(&mut self, table: u64, index: u64, word: u64) {
        self.set(Gpa(table), index, Entry::from_bits(word));
    }

    pub(crate) fn word(&self, table: u64, index: u64) -> u64 {
        self.get(Gpa(table), index).bits()
    }
}

impl GuestTables for FakeGuest {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.get(&entry).copied().unwrap_or(0)
    }

    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
        let is_unchanged = self.read(entry) == seen;
        if is_unchanged {
            self.0.insert(entry, seen | flags);
        }
        is_unchanged
    }
}
