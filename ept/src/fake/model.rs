//! A model of a guest hypervisor that edits its EPT12s, runs nested guests on them, and executes INVEPT. A processor
//! whose EPT02 is filled by [`NestedPaging`] finds the translations of EPT12 over EPT01, or those of an earlier access
//! that no invalidation has ended yet (SDM 29.4.3 "Invalidating Cached Translation Information"). No table that the
//! processor may still have in its paging-structure caches is given back. What breaks one of these laws panics.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::{FakeGuest, FakeTables};
use crate::map::{Mapping, lookup, map_range};
use crate::nested::{Context, Dropped, Extent, Fill, NestedPaging};
use crate::table::TableMemory;
use crate::violation::EptViolation;
use crate::walk::Ept12;
use crate::{Caching, Entry, Eptp, Eptp01, Eptp02, Eptp12, ExecuteControl, Features, Gpa, Hpa, Levels, MemoryType};
use crate::{NestedGpa, PageSize, Rights, entry};

const FEATURES: Features =
    Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };
/// Where EPT01 puts the guest hypervisor's memory, so that a mix-up of addresses shows.
const OFFSET: u64 = 1 << 36;
/// EPT01 has a page table at this address, with one read-only page. Elsewhere it has pages of 2 MiB and 1 GiB, and
/// beyond [`END`] none.
pub const SPLIT: u64 = 4 << 20;
/// The read-only page.
pub const READ_ONLY: u64 = SPLIT + 0x2000;
/// The end of what EPT01 maps.
pub const END: u64 = 2 << 30;
/// The tables that EPT01 takes.
pub const EPT01_TABLES: usize = 4;
/// Accessed and dirty.
const FLAGS: u64 = 3 << 8;

/// EPT12s: two roots, each with and without flags, and with mode-based execute control.
pub const EPT12S: usize = 6;

fn ept12(number: usize, levels: Levels) -> Ept12 {
    let eptp = Eptp12::new(Gpa(if number.is_multiple_of(2) { 0x1000 } else { 0x2000 }), levels);
    match number / 2 {
        0 => Ept12 { eptp, execute: ExecuteControl::UNIFORM },
        1 => Ept12 { eptp: eptp.with_flags(), execute: ExecuteControl::UNIFORM },
        _ => Ept12 { eptp, execute: ExecuteControl::BY_MODE },
    }
}

/// The first of the tables that random entries point to, one page each. They are few, so that a program uses a table
/// again.
pub const TABLES: u64 = 0x1000;
/// Their number.
pub const TABLE_COUNT: u64 = 8;

/// A step of a program.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sets an entry of a table.
    Edit {
        /// The address of the table.
        table: u64,
        /// The number of the entry.
        index: u64,
        /// Its new value.
        entry: u64,
    },
    /// Clears accessed and dirty flags of an entry.
    ClearFlags {
        /// The address of the table.
        table: u64,
        /// The number of the entry.
        index: u64,
    },
    /// The nested guest accesses an address through an EPT12.
    Access {
        /// The number of the EPT12, below [`EPT12S`].
        ept12: usize,
        /// The address, in a word. Bit 3 chooses how much the host fills in.
        address: u64,
        /// One kind of access, or a read and a write in one.
        access: Rights,
    },
    /// INVEPT for the address of an EPT12.
    Single {
        /// Its number.
        ept12: usize,
    },
    /// INVEPT for all.
    Global,
}

fn word(guest: &FakeGuest, table: u64, index: u64) -> u64 {
    guest.get(Gpa(table), index).bits()
}

fn set(guest: &mut FakeGuest, table: u64, index: u64, word: u64) {
    guest.set(Gpa(table), index, Entry::from_bits(word));
}

/// The outcome of one access.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Found {
    /// A byte of memory, by a mapping with these attributes.
    Memory {
        hpa: u64,
        memory_type: MemoryType,
        ignore_pat: bool,
    },
    /// A violation for the guest hypervisor, with the rights that it reports.
    Violation {
        rights: u64,
        suppresses_ve: bool,
    },
    Misconfiguration,
    /// EPT01 does not permit the access.
    Nobody,
}

/// The machine: processor, guest hypervisor, and host.
#[derive(Debug)]
pub struct Machine {
    tables: FakeTables,
    guest: FakeGuest,
    ept01: Eptp01,
    nested: NestedPaging,
    levels: Levels,
    budget: u64,
    /// For each of the two roots, the states of the guest hypervisor's tables since the last invalidation, each with
    /// the time at which it began.
    history: [Vec<(u64, FakeGuest)>; 2],
    /// The time of the last violation of a page: no older translation of the page may be used.
    refused: BTreeMap<(usize, u64), u64>,
    /// The processor's paging-structure caches.
    cached: BTreeMap<CachedEntry, CachedTable>,
    time: u64,
}

/// The tag of an entry of the paging-structure caches: the EPTP, the level of the table that the entry leads to, and
/// the address bits above those that the table translates.
type CachedEntry = (u64, u32, u64);

/// The table that an entry of the paging-structure caches leads to, and how many times that table had been given back
/// by then.
type CachedTable = (Hpa, u64);

const fn cached_entry(eptp02: Eptp02, level: u32, address: u64) -> CachedEntry {
    (eptp02.bits(), level, address >> (12 + 9 * level))
}

impl Machine {
    /// A machine whose host has `budget` tables, and whose EPT12s have `levels`.
    ///
    /// # Panics
    ///
    /// The budget does not suffice for EPT01.
    pub fn new(budget: u64, levels: Levels) -> Self {
        let mut tables = FakeTables::new(budget);
        let ept01 = Eptp::new(tables.allocate().unwrap(), Levels::Four);
        let leaf = |address: Gpa, size| {
            let rights = if address.0 == READ_ONLY { Rights::READ } else { Rights::ALL };
            Entry::leaf(Hpa(address.0 + OFFSET), size, rights, Caching::new(MemoryType::WRITE_BACK))
        };
        for (start, end, largest) in [
            (0, SPLIT, PageSize::Size2M),
            (SPLIT, SPLIT + (2 << 20), PageSize::Size4K),
            (SPLIT + (2 << 20), 1 << 30, PageSize::Size2M),
            (1 << 30, END, PageSize::Size1G),
        ] {
            map_range(&mut tables, ept01, Gpa(start)..Gpa(end), largest, leaf).unwrap();
        }
        let mut guest = FakeGuest::default();
        // The initial tables: both roots lead to the same tables, of which the last two are edited most.
        let chain = [(0x1000, 0x3407), (0x2000, 0x3407), (0x3000, 0x4407), (0x4000, 0x5407), (0x5000, 0x6437)];
        for (table, entry) in chain {
            set(&mut guest, table, 0, entry);
        }
        if levels == Levels::Five {
            set(&mut guest, 0x5000, 0, 0x6407);
        }
        let history = [0, 1].map(|_| vec![(0, guest.clone())]);
        let nested = NestedPaging::new(FEATURES);
        Self {
            tables,
            guest,
            ept01,
            nested,
            levels,
            budget,
            history,
            refused: BTreeMap::new(),
            cached: BTreeMap::new(),
            time: 0,
        }
    }

    /// A walk of the processor puts the tables on its way into the paging-structure caches.
    fn cache(&mut self, eptp02: Eptp02, address: u64) {
        let (mut table, mut level) = (eptp02.root(), eptp02.levels().root());
        loop {
            let entry = self.tables.read(table, crate::table::index(NestedGpa(address), level));
            if !entry.is_present() || entry.is_leaf(level) {
                return;
            }
            (table, level) = (entry.address(), level - 1);
            self.cached.insert(cached_entry(eptp02, level, address), (table, self.tables.times_freed(table)));
        }
    }

    /// INVEPT by the host.
    fn flush(&mut self, dropped: Dropped) {
        match dropped {
            Dropped::Nothing => (),
            Dropped::One(eptp02) => self.cached.retain(|&(eptp, ..), _| eptp != eptp02.bits()),
            Dropped::All => self.cached.clear(),
        }
    }

    /// The law: a table that is given back is in no cache.
    fn check_cached(&self) {
        for (entry, &(table, times_freed)) in &self.cached {
            assert_eq!(self.tables.times_freed(table), times_freed, "{entry:x?} leads to {table:?}");
        }
    }

    /// An access of the processor on EPT02: it exits until the access succeeds, or until the host cannot repair it.
    fn access(&mut self, ept12: Ept12, address: u64, access: Rights) -> Found {
        let (eptp02, dropped) = self.nested.activate(&mut self.tables, ept12).unwrap();
        self.flush(dropped);
        for _ in 0..4 {
            self.cache(eptp02, address);
            let below = lookup(&self.tables, eptp02, NestedGpa(address));
            let granted = below.map_or(Rights::NONE, |mapping| mapping.leaf.rights(ept12.execute));
            if let Some(Mapping { leaf, size }) = below.filter(|_| granted.contain(access)) {
                let hpa = leaf.address().align_down(size).0 + NestedGpa(address).offset_in(size);
                let caching = leaf.caching();
                return Found::Memory { hpa, memory_type: caching.memory_type(), ignore_pat: caching.ignores_pat() };
            }
            // The violation itself (SDM 29.4.3.1 "Operations that Invalidate Cached Mappings").
            (1..5).for_each(|level| _ = self.cached.remove(&cached_entry(eptp02, level, address)));
            let kind = if access == Rights::USER_EXECUTE { Rights::EXECUTE } else { access }.bits();
            let qualification = EptViolation(0x180 | kind).against(granted);
            let mut context = Context { tables: &mut self.tables, guest: &mut self.guest, ept01: self.ept01 };
            let extent = if address & 8 == 0 { Extent::Page } else { Extent::Table };
            let filled = self.nested.fill(&mut context, ept12, NestedGpa(address), qualification, extent);
            let (fill, dropped) = filled.unwrap();
            self.flush(dropped);
            match fill {
                Fill::Mapped => (),
                Fill::Violation { qualification, suppresses_ve } => {
                    return Found::Violation { rights: qualification.0 >> 3 & 0xf, suppresses_ve };
                }
                Fill::Misconfiguration => return Found::Misconfiguration,
                Fill::Ept01Forbids(_) => return Found::Nobody,
            }
        }
        panic!("{access:?} at {address:#x} does not end");
    }

    /// The outcome by `guest` and then EPT01, as the SDM describes it, without the code under test.
    fn expected(&self, guest: &FakeGuest, ept12: Ept12, address: u64, access: Rights) -> Found {
        let (mut table, mut rights) = (ept12.eptp.root().0, 0x407_u64);
        let mask = if ept12.execute == ExecuteControl::BY_MODE { 0x407 } else { 7 };
        let mut level = if self.levels == Levels::Five { 5 } else { 4 };
        loop {
            let entry = word(guest, table, address >> (12 + 9 * (level - 1)) & 511);
            let own = entry & mask;
            if own == 0 {
                return Found::Violation { rights: 0, suppresses_ve: entry >> 63 != 0 };
            }
            let leaf = level == 1 || level <= 3 && entry >> 7 & 1 != 0;
            let size = 1_u64 << (12 + 9 * (level - 1));
            let low = if leaf {
                size - 0x1000
            } else if level > 3 {
                0xf8
            } else {
                0x78
            };
            let bad_type = leaf && matches!(entry >> 3 & 7, 2 | 3 | 7);
            if own & 3 == 2 || entry & low != 0 || entry >> 40 & 0xfff != 0 || bad_type {
                return Found::Misconfiguration;
            }
            rights &= own;
            if leaf {
                if rights & access.bits() != access.bits() {
                    let rights = rights & 7 | rights >> 10 << 3;
                    return Found::Violation { rights, suppresses_ve: entry >> 63 != 0 };
                }
                let gpa = (entry & 0xf_ffff_ffff_f000) + (address & (size - 1));
                let page = gpa & !0xfff;
                let permitted = if page == READ_ONLY { Rights::READ } else { ept12.execute.all() };
                if page >= END || !permitted.contain(access) {
                    return Found::Nobody;
                }
                let memory_type = MemoryType((entry >> 3 & 7) as u8);
                return Found::Memory { hpa: gpa + OFFSET, memory_type, ignore_pat: entry >> 6 & 1 != 0 };
            }
            (table, level) = (entry & 0xf_ffff_ffff_f000, level - 1);
        }
    }

    /// Runs a step.
    ///
    /// # Panics
    ///
    /// The step breaks a law.
    pub fn run(&mut self, step: &Step) {
        self.carry_out(step);
        self.check_cached();
        assert!(self.tables.in_use() as u64 <= self.budget);
    }

    /// Ends the program: gives back every table but those of EPT01.
    ///
    /// # Panics
    ///
    /// A table was lost.
    pub fn finish(mut self) {
        while self.nested.reclaim(&mut self.tables, None).is_ok() {}
        assert_eq!(self.tables.in_use(), EPT01_TABLES);
    }

    fn carry_out(&mut self, step: &Step) {
        self.time += 1;
        match *step {
            Step::Edit { table, index, entry } => set(&mut self.guest, table, index, entry),
            Step::ClearFlags { table, index } => {
                let entry = word(&self.guest, table, index) & !FLAGS;
                set(&mut self.guest, table, index, entry);
            }
            Step::Single { ept12: number } => {
                let dropped = self.nested.invalidate(&mut self.tables, ept12(number, self.levels).eptp);
                self.flush(dropped);
                self.history[number % 2].clear();
            }
            Step::Global => {
                let dropped = self.nested.invalidate_all(&mut self.tables);
                self.flush(dropped);
                self.history.iter_mut().for_each(Vec::clear);
            }
            Step::Access { ept12: number, address, access } => return self.check_access(number, address, access),
        }
        for history in &mut self.history {
            history.push((self.time, self.guest.clone()));
        }
    }

    fn check_access(&mut self, number: usize, address: u64, access: Rights) {
        let ept12 = ept12(number, self.levels);
        if access == Rights::USER_EXECUTE && ept12.execute == ExecuteControl::UNIFORM {
            return;
        }
        let expected = self.expected(&self.guest, ept12, address, access);
        let found = self.access(ept12, address, access);
        let history = &self.history[number % 2];
        if found == expected && matches!(found, Found::Memory { .. }) && history.len() == 1 && ept12.eptp.has_flags() {
            self.check_flags(ept12, address, access);
        }
        if found != expected {
            let since = self.refused.get(&(number, address >> 12)).copied().unwrap_or(0);
            // Each state of the tables lasts until the next edit.
            let ends = history.iter().skip(1).map(|(time, _)| *time).chain([u64::MAX]);
            let was_so = |((_, guest), end): (&(u64, FakeGuest), u64)| {
                end > since && self.expected(guest, ept12, address, access) == found
            };
            let explained = match found {
                Found::Memory { .. } => history.iter().zip(ends).any(was_so),
                // The exit does not say in which mode the processor fetched. If EPT01 permits the fetch, a further exit
                // may tell the mode.
                Found::Nobody if access.bits() & Rights::EXECUTE.or(Rights::USER_EXECUTE).bits() != 0 => {
                    [Rights::EXECUTE, Rights::USER_EXECUTE]
                        .iter()
                        .any(|&fetch| self.expected(&self.guest, ept12, address, fetch) == found)
                }
                _ => false,
            };
            assert!(explained, "{found:?} instead of {expected:?}");
        }
        if let Found::Violation { .. } = found {
            self.refused.insert((number, address >> 12), self.time);
        }
    }

    /// If no table was edited since the last invalidation, every entry that the access used has its flags set.
    fn check_flags(&self, ept12: Ept12, address: u64, access: Rights) {
        let (mut table, mut level) = (ept12.eptp.root().0, self.levels.root());
        loop {
            let entry = word(&self.guest, table, address >> (12 + 9 * (level - 1)) & 511);
            assert!(entry & entry::ACCESSED != 0, "level {level} lacks the accessed flag");
            if level == 1 || level <= 3 && entry >> 7 & 1 != 0 {
                assert!(!access.contain(Rights::WRITE) || entry & entry::DIRTY != 0, "the dirty flag is clear");
                return;
            }
            (table, level) = (entry & 0xf_ffff_ffff_f000, level - 1);
        }
    }
}
