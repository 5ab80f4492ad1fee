//! The existing EPT02s, by the address of their EPT12, which is how INVEPT names them.
//!
//! The hash table gets its memory once. It is never more than half full, so that it makes room for a new root by
//! rehashing in place, not by growing.

use core::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::walk::Ept12;
use crate::{Eptp02, Gpa};

/// One EPT02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Root {
    pub ept12: Ept12,
    pub eptp02: Eptp02,
    last_used: u64,
}

/// All EPT02s.
#[derive(Debug)]
pub(super) struct Roots {
    table: HashTable<Root>,
    hasher: DefaultHashBuilder,
    clock: u64,
}

impl Roots {
    /// The most EPT02s that are kept.
    pub const MOST: usize = 256;
    const CAPACITY: usize = 2 * Self::MOST;
    /// The bytes that the hash table takes from the heap: a place and a control byte for each root, their number a
    /// power of two of which at most seven eighths are used, and the control bytes of one more group.
    pub const HEAP_BYTES: usize = (Self::CAPACITY * 8 / 7).next_power_of_two() * (size_of::<Root>() + 1) + 64;

    pub fn new() -> Self {
        Self { table: HashTable::with_capacity(Self::CAPACITY), hasher: DefaultHashBuilder::default(), clock: 0 }
    }

    fn hash(&self, ept12_root: Gpa) -> u64 {
        self.hasher.hash_one(ept12_root.0)
    }

    /// The root for an EPT12, which becomes the most recently used one.
    pub fn take_into_use(&mut self, ept12: Ept12) -> Option<Root> {
        self.clock += 1;
        let hash = self.hash(ept12.eptp.root());
        let root = self.table.find_mut(hash, |root| root.ept12 == ept12)?;
        root.last_used = self.clock;
        Some(*root)
    }

    /// The root for an EPT12.
    pub fn find(&self, ept12: Ept12) -> Option<Root> {
        self.table.find(self.hash(ept12.eptp.root()), |root| root.ept12 == ept12).copied()
    }

    /// The roots whose EPT12 is at an address, whatever the flags of its EPTP.
    pub fn at(&self, ept12_root: Gpa) -> impl Iterator<Item = &Root> {
        self.table.iter_hash(self.hash(ept12_root)).filter(move |root| root.ept12.eptp.root() == ept12_root)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Root> {
        self.table.iter()
    }

    pub fn is_full(&self) -> bool {
        self.table.len() == Self::MOST
    }

    /// Adds the root of an EPT12 that has none. The caller has made room.
    pub fn insert(&mut self, ept12: Ept12, eptp02: Eptp02) -> Root {
        debug_assert!(!self.is_full(), "one more EPT02 than there is room for");
        let root = Root { ept12, eptp02, last_used: self.clock };
        let hash = self.hash(ept12.eptp.root());
        let hasher = &self.hasher;
        self.table.insert_unique(hash, root, |root| hasher.hash_one(root.ept12.eptp.root().0));
        root
    }

    /// Removes the least recently used root other than `needed`.
    pub fn remove_oldest(&mut self, needed: Option<Eptp02>) -> Option<Root> {
        let others = self.table.iter().filter(|root| Some(root.eptp02) != needed);
        let oldest = *others.min_by_key(|root| root.last_used)?;
        let hash = self.hash(oldest.ept12.eptp.root());
        let (root, _) = self.table.find_entry(hash, |root| *root == oldest).ok()?.remove();
        Some(root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Eptp12, ExecuteControl, Hpa, Levels};

    fn root(number: u64) -> (Ept12, Eptp02) {
        let eptp = Eptp12::new(Gpa(number << 12), Levels::Four);
        (Ept12 { eptp, execute: ExecuteControl::UNIFORM }, eptp.with_root(Hpa(number << 12)))
    }

    #[test]
    fn the_least_recently_used_makes_room_and_no_memory_is_taken_for_it() {
        let mut roots = Roots::new();
        let taken = roots.table.allocation_size();
        assert!(taken <= Roots::HEAP_BYTES, "{taken} bytes");
        for number in 0..100 * Roots::MOST as u64 {
            let (ept12, eptp02) = root(number);
            assert_eq!(roots.take_into_use(ept12), None);
            if roots.is_full() {
                let oldest = roots.remove_oldest(None).unwrap();
                assert_eq!(oldest.eptp02, root(number - Roots::MOST as u64).1);
            }
            roots.insert(ept12, eptp02);
            assert_eq!(roots.find(ept12).map(|root| root.eptp02), Some(eptp02));
        }
        assert_eq!((roots.table.allocation_size(), roots.iter().count()), (taken, Roots::MOST));
    }

    #[test]
    fn an_address_finds_all_ept12s_that_are_there() {
        let mut roots = Roots::new();
        for number in 0..Roots::MOST as u64 / 2 {
            let (ept12, eptp02) = root(number);
            roots.insert(ept12, eptp02);
            roots.insert(Ept12 { execute: ExecuteControl::BY_MODE, ..ept12 }, eptp02);
        }
        for number in 0..Roots::MOST as u64 / 2 {
            let found = roots.at(Gpa(number << 12)).filter(|found| found.eptp02 == root(number).1);
            assert_eq!(found.count(), 2);
        }
        assert_eq!(roots.at(Gpa(1 << 40)).count(), 0);
    }
}
