//! Fakes of the seams: a pool of tables that checks its laws, and an EPT12 in a guest hypervisor's memory.

use crate::table::TableMemory;
use crate::walk::GuestTables;
use crate::{Entry, Gpa, Hpa};
use std::collections::BTreeMap;
use std::vec::Vec;

pub struct FakeTables {
    tables: BTreeMap<u64, [Entry; 512]>,
    unused: Vec<u64>,
}

impl FakeTables {
    const BASE: u64 = 0x70_0000_0000;

    pub fn new(budget: u64) -> Self {
        Self { tables: BTreeMap::new(), unused: (0..budget).rev().map(|page| Self::BASE + page * 4096).collect() }
    }

    pub fn in_use(&self) -> usize {
        self.tables.len()
    }
}

impl TableMemory for FakeTables {
    fn read(&self, table: Hpa, index: u64) -> Entry {
        self.tables[&table.0][index as usize]
    }

    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        self.tables.get_mut(&table.0).expect("a table in use")[index as usize] = entry;
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let table = self.unused.pop()?;
        self.tables.insert(table, [Entry::NOT_PRESENT; 512]);
        Some(Hpa(table))
    }

    fn free(&mut self, table: Hpa) {
        assert!(self.tables.remove(&table.0).is_some(), "freed twice");
        self.unused.push(table.0);
    }
}

/// A guest hypervisor's tables: entries by address, all others 0.
#[derive(Clone, Default)]
pub struct FakeGuest(pub BTreeMap<u64, u64>);

impl FakeGuest {
    pub fn set(&mut self, table: u64, index: u64, entry: u64) {
        self.0.insert(table + index * 8, entry);
    }

    pub fn get(&self, table: u64, index: u64) -> u64 {
        self.0.get(&(table + index * 8)).copied().unwrap_or(0)
    }
}

impl GuestTables for FakeGuest {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.get(&entry.0).copied().unwrap_or(0)
    }

    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
        let is_unchanged = self.read(entry) == seen;
        if is_unchanged {
            self.0.insert(entry.0, seen | flags);
        }
        is_unchanged
    }
}
