use super::*;
use crate::fake::{FakeGuest, FakeTables};
use crate::map::{map_range, set_rights};
use crate::{Caching, Eptp, Eptp12, Gpa, Levels, MemoryType, Rights, entry};
use std::vec::Vec;

const FEATURES: Features =
    Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };
const EPT12: Ept12 = ept12(0x1000);
const FLAGGED: Ept12 = Ept12 { eptp: EPT12.eptp.with_flags(), ..EPT12 };
const READ: EptViolation = EptViolation(0x181);
const WRITE: EptViolation = EptViolation(0x182);

const fn ept12(root: u64) -> Ept12 {
    Ept12 { eptp: Eptp::from_bits(root | 0x1e), execute: ExecuteControl::UNIFORM }
}

struct Machine {
    tables: FakeTables,
    guest: FakeGuest,
    ept01: Eptp01,
    nested: NestedPaging,
}

impl Machine {
    /// EPT01: 1 GiB identity in 2-MiB pages, offset by 4 GiB so that a mix-up shows. EPT12: one 1-GiB page and one
    /// 4-KiB page.
    fn new(budget: u64) -> Self {
        let mut tables = FakeTables::new(budget);
        let ept01 = Eptp::new(tables.allocate().unwrap(), Levels::Four);
        map_range(&mut tables, ept01, Gpa(0)..Gpa(1 << 30), PageSize::Size2M, |address, size| {
            Entry::leaf(Hpa(address.0 + (4 << 30)), size, Rights::ALL, Caching::new(MemoryType::WRITE_BACK))
        })
        .unwrap();
        let mut guest = FakeGuest::default();
        guest.set_word(0x1000, 0, 0x2007);
        guest.set_word(0x2000, 0, 0xb7);
        guest.set_word(0x2000, 1, 0x3007);
        guest.set_word(0x3000, 0, 0x4007);
        guest.set_word(0x4000, 0, 0x9035);
        guest.set_word(0x2000, 2, (2 << 30) | 0xb7);
        Self { tables, guest, ept01, nested: NestedPaging::new(FEATURES) }
    }

    fn activate(&mut self, ept12: Ept12) -> Eptp02 {
        let (eptp02, _) = self.nested.activate(&mut self.tables, ept12).unwrap();
        eptp02
    }

    fn fill(&mut self, address: u64, qualification: EptViolation) -> (Fill, Dropped) {
        self.fill_for(EPT12, address, qualification)
    }

    fn fill_for(&mut self, ept12: Ept12, address: u64, qualification: EptViolation) -> (Fill, Dropped) {
        let Self { tables, guest, ept01, nested } = self;
        let mut context = Context { tables, guest, ept01: *ept01 };
        nested.fill(&mut context, ept12, NestedGpa(address), qualification, Extent::Page).unwrap()
    }

    fn invept(&mut self, root: u64) -> Dropped {
        self.nested.invalidate(&mut self.tables, Eptp12::new(Gpa(root), Levels::Four))
    }

    fn translate(&self, eptp02: Eptp02, address: u64) -> Option<(u64, PageSize)> {
        lookup(&self.tables, eptp02, NestedGpa(address)).map(|found| (found.leaf.address().0, found.size))
    }
}

#[test]
fn a_page_is_as_large_as_both_tables_allow() {
    let mut machine = Machine::new(64);
    let eptp02 = machine.activate(EPT12);
    assert_eq!(machine.fill(0x1234_5678, WRITE).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 0x1234_5678), Some((0x1_1220_0000, PageSize::Size2M)));
    assert_eq!(machine.fill(1 << 30, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 1 << 30), Some((0x1_0000_9000, PageSize::Size4K)));
}

#[test]
fn bits_of_features_that_are_not_offered_change_nothing_and_do_not_reach_ept02() {
    let mut machine = Machine::new(64);
    for (table, index, word) in [(0x1000, 0, 0x2007), (0x2000, 1, 0x3007), (0x3000, 0, 0x4007), (0x4000, 0, 0x9035)] {
        machine.guest.set_word(table, index, word | entry::IGNORED);
    }
    let eptp02 = machine.activate(EPT12);
    assert_eq!(machine.fill(1 << 30, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 1 << 30), Some((0x1_0000_9000, PageSize::Size4K)));
    let leaf = lookup(&machine.tables, eptp02, NestedGpa(1 << 30)).unwrap().leaf;
    assert_eq!(leaf.bits() & entry::IGNORED, 0);
}

#[test]
fn what_ept12_forbids_is_the_guest_hypervisors() {
    let violation = |word| Fill::Violation { qualification: EptViolation(word), suppresses_ve: false };
    let mut machine = Machine::new(64);
    machine.activate(EPT12);
    assert_eq!(machine.fill(1 << 30, WRITE).0, violation(0x1aa));
    assert_eq!(machine.fill(3 << 30, READ).0, violation(0x181));
    machine.guest.set_word(0x4000, 0, 0x9032);
    assert_eq!(machine.fill(1 << 30, WRITE).0, Fill::Misconfiguration);
}

#[test]
fn what_ept01_forbids_is_the_hosts() {
    let mut machine = Machine::new(64);
    machine.activate(EPT12);
    set_rights(&mut machine.tables, machine.ept01, Gpa(0x5000), Rights::READ).unwrap();
    assert_eq!(machine.fill(0x5008, WRITE).0, Fill::Ept01Forbids(Gpa(0x5008)));
    assert_eq!(machine.fill(0x5008, READ).0, Fill::Mapped);
    assert_eq!(machine.fill((2 << 30) + 5, READ).0, Fill::Ept01Forbids(Gpa((2 << 30) + 5)));
}

#[test]
fn invept_goes_by_the_address() {
    let mut machine = Machine::new(64);
    let by_mode = Ept12 { execute: ExecuteControl::BY_MODE, ..EPT12 };
    let [plain, flagged, by_mode02] = [EPT12, FLAGGED, by_mode].map(|ept12| machine.activate(ept12));
    let other = machine.activate(ept12(0x8000));
    assert_eq!(machine.invept(0x8000), Dropped::One(other));
    assert_eq!(machine.invept(0xf000), Dropped::Nothing);
    for (ept12, eptp02) in [(EPT12, plain), (FLAGGED, flagged), (by_mode, by_mode02)] {
        assert_eq!(machine.fill_for(ept12, 0, READ).0, Fill::Mapped);
        assert!(machine.translate(eptp02, 0).is_some());
    }
    machine.guest.set_word(0x2000, 0, 0);
    assert_eq!(machine.invept(0x1000), Dropped::All);
    assert!([plain, flagged, by_mode02].iter().all(|&eptp02| machine.translate(eptp02, 0).is_none()));
}

#[test]
fn invept_keeps_what_is_still_true_when_it_is_used_again() {
    let mut machine = Machine::new(64);
    machine.guest.set_word(0x4000, 1, 0xa037);
    machine.guest.set_word(0x4000, 2, 0xc037);
    let eptp02 = machine.activate(EPT12);
    let [moved, removed, used] = [0, 1, 2].map(|page| (1 << 30) + page * 4096);
    for address in [0, moved, removed, used] {
        assert_eq!(machine.fill(address, READ).0, Fill::Mapped);
    }
    machine.guest.set_word(0x4000, 0, 0xb037);
    machine.guest.set_word(0x4000, 1, 0);
    assert_eq!(machine.invept(0x1000), Dropped::One(eptp02));
    assert!([0, moved, removed, used].iter().all(|&address| machine.translate(eptp02, address).is_none()));
    assert_eq!(machine.fill(used, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, moved), Some((0x1_0000_b000, PageSize::Size4K)));
    assert_eq!(machine.translate(eptp02, removed), None);
    assert_eq!((machine.nested.counters().kept, machine.nested.counters().dropped), (2, 1));
    assert_eq!(machine.translate(eptp02, 0), None, "nothing of its GiB was used yet");
    assert_eq!(machine.fill(0x40_0000, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 0), Some((0x1_0000_0000, PageSize::Size2M)));
    // A table that is gone takes the tables below it along. A large page that is a table now is dropped.
    machine.guest.set_word(0x2000, 0, 0x3007);
    machine.guest.set_word(0x3000, 0, 0x5007);
    machine.guest.set_word(0x5000, 2, 0xd037);
    assert_eq!(machine.invept(0x1000), Dropped::One(eptp02));
    assert_eq!(machine.fill(used, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, used), Some((0x1_0000_d000, PageSize::Size4K)));
    assert!([0, moved].iter().all(|&address| machine.translate(eptp02, address).is_none()));
}

#[test]
fn invept_drops_what_would_set_a_flag_again() {
    let mut machine = Machine::new(64);
    let (page, neighbour) = (1 << 30, (1 << 30) + 0x1000);
    machine.guest.set_word(0x4000, 0, 0x9037);
    machine.guest.set_word(0x4000, 1, 0xa037);
    let eptp02 = machine.activate(FLAGGED);
    let mut rights_after = |entry| {
        for address in [page, neighbour] {
            assert_eq!(machine.fill_for(FLAGGED, address, WRITE).0, Fill::Mapped);
        }
        machine.guest.set_word(0x4000, 0, entry);
        assert_eq!(machine.invept(0x1000), Dropped::One(eptp02));
        assert_eq!(machine.fill_for(FLAGGED, neighbour, WRITE).0, Fill::Mapped);
        lookup(&machine.tables, eptp02, NestedGpa(page)).map(|m| m.leaf.rights(ExecuteControl::UNIFORM))
    };
    assert_eq!(rights_after(0x9337), Some(Rights::ALL));
    assert_eq!(rights_after(0x9137), Some(Rights::READ.or(Rights::EXECUTE)), "the next write sets the flag");
    assert_eq!(rights_after(0x9037), None);
}

#[test]
fn a_new_table_gets_all_that_ept12_has_for_it_if_that_is_asked_for() {
    let mut machine = Machine::new(64);
    machine.guest.set_word(0x4000, 7, 0xa137);
    machine.guest.set_word(0x4000, 8, 0xb037);
    machine.guest.set_word(0x4000, 9, 0xb133 ^ 1);
    let eptp02 = machine.activate(FLAGGED);
    let Machine { tables, guest, ept01, nested } = &mut machine;
    let mut context = Context { tables, guest, ept01: *ept01 };
    let filled = nested.fill(&mut context, FLAGGED, NestedGpa(1 << 30), READ, Extent::Table);
    assert_eq!(filled, Ok((Fill::Mapped, Dropped::Nothing)));
    let mapped: Vec<u64> =
        (0..512).filter(|page| machine.translate(eptp02, (1 << 30) + (page << 12)).is_some()).collect();
    assert_eq!(mapped, [0, 7], "not what has no accessed flag, and no misconfiguration");
}

#[test]
fn tables_that_a_large_page_replaces_are_given_back_only_together_with_an_invalidation() {
    let mut machine = Machine::new(64);
    let eptp02 = machine.activate(EPT12);
    assert_eq!(machine.fill(1 << 30, READ), (Fill::Mapped, Dropped::Nothing));
    let in_use = machine.tables.in_use();
    // Without INVEPT, a processor may use a cached page table for any time.
    machine.guest.set_word(0x2000, 1, 0xb7);
    assert_eq!(machine.fill((1 << 30) + 0x1000, READ), (Fill::Mapped, Dropped::One(eptp02)));
    assert!(machine.tables.in_use() < in_use);
}

#[test]
fn tables_whose_source_is_gone_are_given_back_only_together_with_an_invalidation() {
    let mut machine = Machine::new(64);
    let eptp02 = machine.activate(EPT12);
    machine.guest.set_word(0x4000, 1, 0xa037);
    assert_eq!(machine.fill(1 << 30, READ).0, Fill::Mapped);
    // In EPT12 a page takes the place of the page tables; EPT01 maps its memory by smaller pages.
    machine.guest.set_word(0x2000, 1, 0x3000);
    let Machine { tables, guest, ept01, nested } = &mut machine;
    let mut context = Context { tables, guest, ept01: *ept01 };
    let root = nested.root(EPT12).unwrap();
    nested
        .map_elsewhere(&mut context, root, NestedGpa(1 << 30), (Entry::NOT_PRESENT, PageSize::Size4K), Extent::Page)
        .unwrap();
    assert_eq!(nested.take_dropped(), Dropped::One(eptp02), "another processor has taken the table away meanwhile");
}

#[test]
fn a_spent_budget_drops_translations_and_goes_on() {
    // EPT01 takes 3 tables, EPT02's root 1: five more are not enough for pages under three page tables.
    let mut machine = Machine::new(3 + 1 + 5);
    for gib in 4..8 {
        machine.guest.set_word(0x2000, gib, 0x3007);
    }
    let eptp02 = machine.activate(EPT12);
    let mut drops = 0;
    for gib in [1, 4, 5, 6, 7, 1] {
        let (fill, dropped) = machine.fill(gib << 30, READ);
        assert_eq!(fill, Fill::Mapped);
        assert!(machine.translate(eptp02, gib << 30).is_some());
        drops += u64::from(dropped == Dropped::One(eptp02));
    }
    assert!(drops > 0 && machine.nested.counters().reclaims == drops);
}

#[test]
fn a_spent_budget_takes_the_least_recently_used_root_first() {
    let mut machine = Machine::new(3 + 4 + 4 + 1);
    let [old, new] = [ept12(0x8000), EPT12].map(|ept12| machine.activate(ept12));
    for (table, next) in [(0x8000, 0x9000), (0x9000, 0xa000), (0xa000, 0xb000), (0xb000, 0xc030)] {
        machine.guest.set_word(table, 0, next | 7);
    }
    assert_eq!(machine.fill_for(ept12(0x8000), 0, READ).0, Fill::Mapped);
    assert_eq!(machine.fill(1 << 30, READ), (Fill::Mapped, Dropped::Nothing));
    machine.guest.set_word(0x2000, 4, 0x3007);
    assert_eq!(machine.fill(4 << 30, READ), (Fill::Mapped, Dropped::One(old)));
    assert!(machine.translate(new, 1 << 30).is_some(), "what is in use stays");
}

#[test]
fn a_budget_too_small_for_one_translation_is_an_error() {
    let mut machine = Machine::new(3 + 3);
    machine.activate(EPT12);
    let Machine { tables, guest, ept01, nested } = &mut machine;
    let mut context = Context { tables, guest, ept01: *ept01 };
    assert_eq!(nested.fill(&mut context, EPT12, NestedGpa(1 << 30), READ, Extent::Page), Err(FillError::OutOfTables));
}

#[test]
fn an_ept12_that_was_not_activated_is_not_filled() {
    let mut machine = Machine::new(64);
    let Machine { tables, guest, ept01, nested } = &mut machine;
    let mut context = Context { tables, guest, ept01: *ept01 };
    assert_eq!(nested.fill(&mut context, EPT12, NestedGpa(1 << 30), READ, Extent::Page), Err(FillError::NotActive));
}

#[test]
fn a_fetch_whose_mode_is_not_known_gets_what_one_of_the_modes_may() {
    let by_mode = Ept12 { execute: ExecuteControl::BY_MODE, ..EPT12 };
    let mut machine = Machine::new(64);
    for (table, at, entry) in [(0x1000, 0, 0x2407), (0x2000, 1, 0x3407), (0x3000, 0, 0x4407), (0x4000, 0, 0x9431)] {
        machine.guest.set_word(table, at, entry);
    }
    machine.activate(by_mode);
    assert_eq!(machine.fill_for(by_mode, 1 << 30, EptViolation(0x184)).0, Fill::Mapped);
    let refused = Fill::Violation { qualification: EptViolation(0x1cc), suppresses_ve: false };
    assert_eq!(
        machine.fill_for(by_mode, 1 << 30, EptViolation(0x1cc)).0,
        refused,
        "the processor has user mode already"
    );
}

#[test]
fn a_page_that_is_clean_in_ept12_is_not_writable_in_ept02_where_all_are_dirty() {
    let mut machine = Machine::new(64);
    machine.guest.set_word(0x4000, 0, 0x9037);
    let eptp02 = machine.activate(FLAGGED);
    let mut rights_after = |access| {
        let address = 1 << 30;
        assert_eq!(machine.fill_for(FLAGGED, address, access).0, Fill::Mapped);
        let leaf = lookup(&machine.tables, eptp02, NestedGpa(address)).map(|mapping| mapping.leaf);
        assert!(leaf.is_some_and(Entry::is_dirty), "the processor would have a flag to set");
        leaf.map(|leaf| leaf.rights(ExecuteControl::UNIFORM))
    };
    assert_eq!(rights_after(READ), Some(Rights::READ.or(Rights::EXECUTE)));
    assert_eq!(rights_after(WRITE), Some(Rights::ALL));
    assert_eq!(rights_after(READ), Some(Rights::ALL));
}

#[test]
fn the_least_recently_used_root_makes_room() {
    let mut machine = Machine::new(3 + ROOTS as u64);
    let first = machine.activate(EPT12);
    for root in 1..ROOTS as u64 {
        machine.activate(ept12(0x10_0000 * root));
    }
    assert_eq!(machine.activate(EPT12), first);
    let (_, dropped) = machine.nested.activate(&mut machine.tables, ept12(0xff00_0000)).unwrap();
    assert!(matches!(dropped, Dropped::One(eptp) if eptp != first));
    assert_eq!(machine.activate(EPT12), first);
}

#[test]
fn a_neighbour_goes_into_the_table_of_the_page_before_it_until_that_is_freed() {
    let mut machine = Machine::new(64);
    machine.guest.set_word(0x4000, 1, 0xa037);
    let eptp02 = machine.activate(EPT12);
    let (first, second) = (1 << 30, (1 << 30) + 0x1000);
    assert_eq!(machine.fill(first, READ).0, Fill::Mapped);
    assert_eq!(machine.fill(second, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, second), Some((0x1_0000_a000, PageSize::Size4K)));
    // The freed tables are handed out again for something else: nothing may be written to them as if they still
    // belonged to EPT02.
    machine.guest.set_word(0x3000, 0, 0);
    assert_eq!(machine.invept(0x1000), Dropped::One(eptp02));
    machine.guest.set_word(0x3000, 0, 0x4007);
    let others: [Hpa; 1] = core::array::from_fn(|_| machine.tables.allocate().unwrap());
    assert_eq!(machine.fill(second, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, second), Some((0x1_0000_a000, PageSize::Size4K)));
    assert!(others.iter().all(|&table| (0..512).all(|at| machine.tables.read(table, at) == Entry::NOT_PRESENT)));
    let other = ept12(0x2000);
    let other02 = machine.activate(other);
    assert_eq!(machine.fill_for(other, second, READ).1, Dropped::Nothing);
    assert_ne!(other02.root(), eptp02.root());
    assert_eq!(
        machine.translate(eptp02, second),
        Some((0x1_0000_a000, PageSize::Size4K)),
        "another root, another table"
    );
}
