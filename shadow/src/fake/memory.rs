//! Memory of a [`FakeMachine`](super::FakeMachine): the guest hypervisor's, and the host's tables.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use ept::table::TableMemory;
use ept::{Entry, Gpa, Hpa};

use super::compare_exchange_alone;
use crate::hw::GuestMemory;

/// The guest hypervisor's memory, from address 0.
#[derive(Debug)]
pub struct Ram(RefCell<Vec<u8>>);

impl Ram {
    /// The paging structures of [`Self::with_paging`]: 1 GiB, identity.
    pub const PML4: u64 = 0x1000;

    /// 576 KiB of zeros, but for paging structures in 64-bit mode.
    pub fn with_paging() -> Self {
        const PDPT: u64 = 0x2000;
        let ram = Self(RefCell::new(vec![0; 0x9_0000]));
        ram.write_u64(Gpa(Self::PML4), PDPT | 0x23);
        ram.write_u64(Gpa(PDPT), 0xe3);
        ram
    }

    /// A copy of all of it.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.borrow().clone()
    }
}

impl GuestMemory for Ram {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        let bytes = self.0.borrow();
        for (at, byte) in (from.0 as usize..).zip(to) {
            *byte = bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        let mut bytes = self.0.borrow_mut();
        for (at, byte) in (to.0 as usize..).zip(from) {
            if let Some(place) = bytes.get_mut(at) {
                *place = *byte;
            }
        }
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        compare_exchange_alone(self, at, seen, new)
    }

    fn translate(&self, address: Gpa) -> Hpa {
        Hpa(address.0)
    }
}

/// A pool of tables.
#[derive(Clone, Debug)]
pub struct Tables(Rc<RefCell<Pool>>);

#[derive(Debug)]
struct Pool {
    tables: BTreeMap<u64, [Entry; 512]>,
    unused: Vec<u64>,
}

impl Tables {
    /// A pool of `budget` tables.
    pub fn new(budget: u64) -> Self {
        let unused = (0..budget).map(|number| 0x70_0000_0000 + number * 4096).collect();
        Self(Rc::new(RefCell::new(Pool { tables: BTreeMap::new(), unused })))
    }
}

impl TableMemory for Tables {
    fn read(&self, table: Hpa, index: u64) -> Entry {
        self.0.borrow().tables[&table.0][index as usize]
    }

    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        self.0.borrow_mut().tables.get_mut(&table.0).expect("a table in use")[index as usize] = entry;
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let pool = &mut *self.0.borrow_mut();
        let table = pool.unused.pop()?;
        pool.tables.insert(table, [Entry::NOT_PRESENT; 512]);
        Some(Hpa(table))
    }

    fn free(&mut self, table: Hpa) {
        let pool = &mut *self.0.borrow_mut();
        assert!(pool.tables.remove(&table.0).is_some(), "freed twice");
        pool.unused.push(table.0);
    }
}
