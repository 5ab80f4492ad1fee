//! Random programs against a model. A processor whose EPT02 is filled by [`NestedPaging`] finds the translations of
//! EPT12 over EPT01, or those of an earlier access that no invalidation has ended yet (SDM 29.4.3 "Invalidating Cached
//! Translation Information"). No table that the processor may still have in its paging-structure caches is given back.

use super::*;
use crate::fake::{FakeGuest, FakeTables};
use crate::map::map_range;
use crate::{Caching, Eptp, Eptp12, Levels, MemoryType, Rights, entry};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::vec::Vec;

const FEATURES: Features =
    Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };
/// Where EPT01 puts the guest hypervisor's memory, so that a mix-up of addresses shows.
const OFFSET: u64 = 1 << 36;
/// EPT01 has a page table at this address, with one read-only page. Elsewhere it has pages of 2 MiB, and beyond 2 GiB
/// none.
const SPLIT: u64 = 4 << 20;
const READ_ONLY: u64 = SPLIT + 0x2000;
const END: u64 = 2 << 30;
/// Accessed and dirty.
const FLAGS: u64 = 3 << 8;

/// EPT12s: two roots, each with and without flags, and with mode-based execute control.
const EPT12S: usize = 6;

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
const TABLES: u64 = 0x1000;
const TABLE_COUNT: u64 = 8;

#[derive(Clone, Debug)]
enum Step {
    /// Sets an entry of a table.
    Edit { table: u64, index: u64, entry: u64 },
    /// Clears accessed and dirty flags of an entry.
    ClearFlags { table: u64, index: u64 },
    /// The nested guest accesses an address through an EPT12.
    Access { ept12: usize, address: u64, access: Rights },
    /// INVEPT for the address of an EPT12.
    Single { ept12: usize },
    /// INVEPT for all.
    Global,
}

fn index() -> impl Strategy<Value = u64> {
    prop_oneof![12 => Just(0_u64), 4 => 1_u64..3, 1 => Just(511)]
}

fn table() -> impl Strategy<Value = u64> {
    prop_oneof![3 => Just(0x5000_u64), 3 => Just(0x6000), 2 => (0..TABLE_COUNT).prop_map(|table| TABLES + table * 4096)]
}

fn entry() -> impl Strategy<Value = u64> {
    let page = prop_oneof![
        Just(0x9000),
        Just(SPLIT + 0x1000),
        Just(READ_ONLY),
        Just(SPLIT),
        Just(0),
        Just(1 << 30),
        Just(END),
        Just(1 << 41)
    ];
    let rights = prop_oneof![4 => Just(0x407_u64), 1 => 0_u64..8, 1 => (0_u64..8).prop_map(|rights| rights | 0x400)];
    prop_oneof![
        1 => Just(0),
        3 => (table(), rights.clone()).prop_map(|(table, rights)| table | rights),
        6 => (page, rights, prop_oneof![6 => Just(6_u64), 1 => 0_u64..8], any::<[bool; 2]>()).prop_map(
            |(page, rights, kind, [large, ignore_pat])| {
                page | rights | kind << 3 | u64::from(large) << 7 | u64::from(ignore_pat) << 6
            }
        ),
    ]
}

/// A GiB of the nested guest becomes one page, and then tables again.
fn regrouping() -> impl Strategy<Value = Step> {
    let above = (0_u64..2, prop_oneof![Just((1 << 30) | 0x4b7_u64), Just(0x4407)])
        .prop_map(|(index, entry)| Step::Edit { table: 0x3000, index, entry });
    let below = (0_u64..3, prop_oneof![Just(0x5407_u64), Just(0x6407)]).prop_map(|(index, entry)| Step::Edit {
        table: 0x4000,
        index,
        entry,
    });
    prop_oneof![above, below]
}

fn access() -> impl Strategy<Value = Rights> {
    let kinds = [Rights::READ, Rights::WRITE, Rights::READ.or(Rights::WRITE), Rights::EXECUTE, Rights::USER_EXECUTE];
    prop::sample::select(kinds.to_vec())
}

fn step() -> impl Strategy<Value = Step> {
    let address = (index(), index(), index(), index(), 0_u64..4)
        .prop_map(|(a, b, c, d, offset)| a << 39 | b << 30 | c << 21 | d << 12 | (offset * 8));
    prop_oneof![
        6 => (table(), index(), entry()).prop_map(|(table, index, entry)| Step::Edit { table, index, entry }),
        3 => regrouping(),
        1 => (table(), index()).prop_map(|(table, index)| Step::ClearFlags { table, index }),
        8 => (0..EPT12S, address, access())
            .prop_map(|(ept12, address, access)| Step::Access { ept12, address, access }),
        1 => (0..EPT12S).prop_map(|ept12| Step::Single { ept12 }),
        1 => Just(Step::Global),
    ]
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

struct Machine {
    tables: FakeTables,
    guest: FakeGuest,
    ept01: Eptp01,
    nested: NestedPaging,
    levels: Levels,
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
    fn new(budget: u64, levels: Levels) -> Self {
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
            guest.set_word(table, 0, entry);
        }
        if levels == Levels::Five {
            guest.set_word(0x5000, 0, 0x6407);
        }
        let history = [0, 1].map(|_| std::vec![(0, guest.clone())]);
        let nested = NestedPaging::new(FEATURES);
        Self {
            tables,
            guest,
            ept01,
            nested,
            levels,
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
    fn check_cached(&self) -> Result<(), TestCaseError> {
        for (entry, &(table, times_freed)) in &self.cached {
            prop_assert_eq!(self.tables.times_freed(table), times_freed, "{:x?} leads to {:?}", entry, table);
        }
        Ok(())
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
            let entry = guest.word(table, address >> (12 + 9 * (level - 1)) & 511);
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

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        self.time += 1;
        match *step {
            Step::Edit { table, index, entry } => self.guest.set_word(table, index, entry),
            Step::ClearFlags { table, index } => {
                self.guest.set_word(table, index, self.guest.word(table, index) & !FLAGS)
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
        Ok(())
    }

    fn check_access(&mut self, number: usize, address: u64, access: Rights) -> Result<(), TestCaseError> {
        let ept12 = ept12(number, self.levels);
        if access == Rights::USER_EXECUTE && ept12.execute == ExecuteControl::UNIFORM {
            return Ok(());
        }
        let expected = self.expected(&self.guest, ept12, address, access);
        let found = self.access(ept12, address, access);
        let history = &self.history[number % 2];
        if found == expected && matches!(found, Found::Memory { .. }) && history.len() == 1 && ept12.eptp.has_flags() {
            self.check_flags(ept12, address, access)?;
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
            prop_assert!(explained, "{found:?} instead of {expected:?}");
        }
        if let Found::Violation { .. } = found {
            self.refused.insert((number, address >> 12), self.time);
        }
        Ok(())
    }

    /// If no table was edited since the last invalidation, every entry that the access used has its flags set.
    fn check_flags(&self, ept12: Ept12, address: u64, access: Rights) -> Result<(), TestCaseError> {
        let (mut table, mut level) = (ept12.eptp.root().0, self.levels.root());
        loop {
            let entry = self.guest.word(table, address >> (12 + 9 * (level - 1)) & 511);
            prop_assert!(entry & entry::ACCESSED != 0, "level {level} lacks the accessed flag");
            if level == 1 || level <= 3 && entry >> 7 & 1 != 0 {
                prop_assert!(!access.contain(Rights::WRITE) || entry & entry::DIRTY != 0, "the dirty flag is clear");
                return Ok(());
            }
            (table, level) = (entry & 0xf_ffff_ffff_f000, level - 1);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn an_access_finds_what_the_tables_say_or_said_since_the_last_invalidation(
        steps in prop::collection::vec(step(), 1..80),
        five_levels: bool,
        // EPT01 takes 4 tables; 9 leave room for one translation at a time.
        budget in prop_oneof![Just(10_u64), Just(16), Just(400)],
    ) {
        let mut machine = Machine::new(budget, if five_levels { Levels::Five } else { Levels::Four });
        for step in &steps {
            machine.run(step)?;
            machine.check_cached()?;
            prop_assert!(machine.tables.in_use() as u64 <= budget);
        }
        // Every table is below EPT01 or a root of EPT02: none was lost.
        while machine.nested.reclaim(&mut machine.tables, None).is_ok() {}
        prop_assert_eq!(machine.tables.in_use(), 4);
    }
}
