use super::*;
use crate::fake::{FakeGuest, FakeTables};
use crate::map::{map_range, set_rights};
use crate::{Gpa, MemoryType, Rights};

const FEATURES: Features = Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true };
const EPTP12: Eptp = Eptp::new(0x1000, false);
const READ: Qualification = Qualification(0x181);
const WRITE: Qualification = Qualification(0x182);

struct Machine {
    tables: FakeTables,
    guest: FakeGuest,
    ept01: Hpa,
    nested: NestedPaging,
}

impl Machine {
    /// EPT01: 1 GiB identity in 2-MiB pages, offset by 4 GiB so that a mix-up shows. EPT12: one 1-GiB page and one 4-KiB page.
    fn new(budget: u64) -> Self {
        let mut tables = FakeTables::new(budget);
        let ept01 = tables.allocate().unwrap();
        map_range(&mut tables, ept01, 0, 1 << 30, PageSize::Size2M, |address, size| {
            Entry::leaf(address + (4 << 30), size, Rights::ALL, MemoryType::WRITE_BACK, false)
        })
        .unwrap();
        let mut guest = FakeGuest::default();
        guest.set(0x1000, 0, 0x2007);
        guest.set(0x2000, 0, 0xb7);
        guest.set(0x2000, 1, 0x3007);
        guest.set(0x3000, 0, 0x4007);
        guest.set(0x4000, 0, 0x9035);
        guest.set(0x2000, 2, (2 << 30) | 0xb7);
        Self { tables, guest, ept01, nested: NestedPaging::new(FEATURES) }
    }

    fn activate(&mut self, eptp12: Eptp) -> Eptp {
        let (eptp02, _) = self.nested.activate(&mut self.tables, eptp12).unwrap();
        eptp02
    }

    fn fill(&mut self, address: u64, qualification: Qualification) -> (Fill, Dropped) {
        self.nested.fill(&mut self.tables, &mut self.guest, self.ept01, EPTP12, NestedGpa(address), qualification)
    }

    fn translate(&self, eptp02: Eptp, address: u64) -> Option<(u64, PageSize)> {
        lookup(&self.tables, Hpa(eptp02.root()), address).map(|found| (found.leaf.address(), found.size))
    }
}

#[test]
fn a_page_is_as_large_as_both_tables_allow() {
    let mut machine = Machine::new(64);
    let eptp02 = machine.activate(EPTP12);
    assert_eq!(machine.fill(0x1234_5678, WRITE).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 0x1234_5678), Some((0x1_1220_0000, PageSize::Size2M)));
    assert_eq!(machine.fill(1 << 30, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, 1 << 30), Some((0x1_0000_9000, PageSize::Size4K)));
}

#[test]
fn what_ept12_forbids_is_the_guest_hypervisors() {
    let mut machine = Machine::new(64);
    machine.activate(EPTP12);
    assert_eq!(machine.fill(1 << 30, WRITE).0, Fill::Violation(Qualification(0x1aa)));
    assert_eq!(machine.fill(3 << 30, READ).0, Fill::Violation(Qualification(0x181)));
    machine.guest.set(0x4000, 0, 0x9032);
    assert_eq!(machine.fill(1 << 30, WRITE).0, Fill::Misconfiguration);
}

#[test]
fn what_ept01_forbids_is_the_hosts() {
    let mut machine = Machine::new(64);
    machine.activate(EPTP12);
    set_rights(&mut machine.tables, machine.ept01, 0x5000, Rights::READ).unwrap();
    assert_eq!(machine.fill(0x5008, WRITE).0, Fill::Ept01Forbids(Gpa(0x5008)));
    assert_eq!(machine.fill(0x5008, READ).0, Fill::Mapped);
    assert_eq!(machine.fill((2 << 30) + 5, READ).0, Fill::Ept01Forbids(Gpa((2 << 30) + 5)));
}

#[test]
fn invept_goes_by_the_address_and_drops_only_its_own() {
    let mut machine = Machine::new(64);
    let with_flags = Eptp::new(0x1000, true);
    let (plain, flagged) = (machine.activate(EPTP12), machine.activate(with_flags));
    let other = machine.activate(Eptp::new(0x8000, false));
    assert_eq!(machine.fill(0, READ).0, Fill::Mapped);
    assert_eq!(machine.nested.invalidate(&mut machine.tables, Eptp::new(0x1000, true)), Dropped::All);
    assert_eq!(machine.translate(plain, 0), None);
    assert_eq!(machine.translate(flagged, 0), None);
    assert_eq!(machine.nested.invalidate(&mut machine.tables, Eptp::new(0x8000, false)), Dropped::One(other));
    assert_eq!(machine.nested.invalidate(&mut machine.tables, Eptp::new(0xf000, false)), Dropped::Nothing);
}

#[test]
fn a_spent_budget_drops_translations_and_goes_on() {
    // EPT01 takes 3 tables, EPT02's root 1: five more are not enough for pages under three page tables.
    let mut machine = Machine::new(3 + 1 + 5);
    for gib in 4..8 {
        machine.guest.set(0x2000, gib, 0x3007);
    }
    let eptp02 = machine.activate(EPTP12);
    let mut drops = 0;
    for gib in [1, 4, 5, 6, 7, 1] {
        let (fill, dropped) = machine.fill(gib << 30, READ);
        assert_eq!(fill, Fill::Mapped);
        assert!(machine.translate(eptp02, gib << 30).is_some());
        drops += usize::from(dropped == Dropped::All);
    }
    assert!(drops > 0);
}

#[test]
fn a_page_is_clean_in_ept02_only_for_the_write_that_makes_it_dirty_in_ept12() {
    let mut machine = Machine::new(64);
    let flagged = Eptp::new(0x1000, true);
    machine.guest.set(0x4000, 0, 0x9037);
    let eptp02 = machine.activate(flagged);
    let mut dirty_after = |access| {
        let address = NestedGpa(1 << 30);
        let (fill, _) =
            machine.nested.fill(&mut machine.tables, &mut machine.guest, machine.ept01, flagged, address, access);
        assert_eq!(fill, Fill::Mapped);
        lookup(&machine.tables, Hpa(eptp02.root()), address.0).map(|found| (found.leaf.rights(), found.leaf.is_dirty()))
    };
    assert_eq!(dirty_after(READ), Some((Rights::READ.or(Rights::EXECUTE), false)));
    assert_eq!(dirty_after(WRITE), Some((Rights::ALL, false)), "the processor sets it, and logs");
    assert_eq!(dirty_after(READ), Some((Rights::ALL, true)), "logged already");
}

#[test]
fn the_least_recently_used_root_makes_room() {
    let mut machine = Machine::new(64);
    let first = machine.activate(EPTP12);
    for root in 1..ROOTS as u64 {
        machine.activate(Eptp::new(0x10_0000 * root, false));
    }
    assert_eq!(machine.activate(EPTP12), first);
    let (_, dropped) = machine.nested.activate(&mut machine.tables, Eptp::new(0xff00_0000, false)).unwrap();
    assert!(matches!(dropped, Dropped::One(eptp) if eptp != first));
    assert_eq!(machine.activate(EPTP12), first);
}

#[test]
fn a_neighbour_goes_into_the_table_of_the_page_before_it_until_that_is_freed() {
    let mut machine = Machine::new(64);
    machine.guest.set(0x4000, 1, 0xa037);
    let eptp02 = machine.activate(EPTP12);
    let (first, second) = (1 << 30, (1 << 30) + 0x1000);
    assert_eq!(machine.fill(first, READ).0, Fill::Mapped);
    assert_eq!(machine.fill(second, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, second), Some((0x1_0000_a000, PageSize::Size4K)));
    // The freed tables are handed out again for something else: nothing may be written to them as if they were still of EPT02.
    assert_eq!(machine.nested.invalidate(&mut machine.tables, EPTP12), Dropped::One(eptp02));
    let others: [Hpa; 3] = core::array::from_fn(|_| machine.tables.allocate().unwrap());
    assert_eq!(machine.fill(second, READ).0, Fill::Mapped);
    assert_eq!(machine.translate(eptp02, second), Some((0x1_0000_a000, PageSize::Size4K)));
    assert!(others.iter().all(|&table| (0..512).all(|at| machine.tables.read(table, at) == Entry::NOT_PRESENT)));
    let other = Eptp::new(0x2000, false);
    let other02 = machine.activate(other);
    let _ = machine.nested.fill(&mut machine.tables, &mut machine.guest, machine.ept01, other, NestedGpa(second), READ);
    assert_ne!(other02.root(), eptp02.root());
    assert_eq!(
        machine.translate(eptp02, second),
        Some((0x1_0000_a000, PageSize::Size4K)),
        "another root, another table"
    );
}
