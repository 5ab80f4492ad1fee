use proptest::prelude::*;
use std::string::ToString;
use std::vec::Vec;

use super::fake::{
    CAPABILITY, EXTENDED, FakeUnit, INVALIDATES, IOTLB, MEMORY_REGIONS, RECORD_COUNT, TableMemory, WRITE_BUFFER,
};
use super::registers::{command, offset, protected_memory};
use super::*;
use crate::memory_map::Region;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const UNITS: [u64; 2] = [0xfed9_0000, 0xfed9_1000];
const HOST: Range<u64> = 2 * GIB - 64 * MIB..2 * GIB - 24 * MIB;
const TABLES: u64 = HOST.start;

const WIDTH_39: u64 = 0b0010 << 8;
const WIDTH_48: u64 = 0b0100 << 8;
const WIDTH_57: u64 = 0b1000 << 8;
const PAGES_1G: u64 = 1 << 35;
const PAGES_2M: u64 = 1 << 34;

fn unit(start: u64, segment: u16, includes_all: bool) -> ListedUnit {
    ListedUnit { registers: start..start + 0x1000, segment, includes_all }
}

fn dmar() -> Dmar {
    let units = [unit(UNITS[0], 0, false), unit(UNITS[1], 0, true)].into_iter().collect();
    let reserved = [0x7b00_0000..0x7b10_0000].into_iter().collect();
    Dmar { table: 0x7fe0_0000, address_bits: 46, units, reserved }
}

/// 2 GiB below 4 GiB and the rest above.
fn memory(bytes: u64) -> MemoryMap {
    let usable = |start, end| Region { start, end, kind: RegionKind::USABLE };
    let firmware = Region { start: 0xfed0_0000, end: 1 << 32, kind: RegionKind::RESERVED };
    MemoryMap::sanitize([usable(0, 2 * GIB), usable(4 * GIB, 2 * GIB + bytes), firmware]).unwrap()
}

fn without(capability: u64) -> FakeUnit {
    FakeUnit::new(CAPABILITY & !capability, EXTENDED)
}

fn plan_for(units: &[FakeUnit]) -> Result<Plan, Unusable> {
    let mut units = units.iter();
    Plan::new(&dmar(), &memory(8 * GIB), 48, |_| Unit::new(units.next().unwrap().clone()).capabilities())
}

fn build(plan: &Plan, host: Range<u64>) -> (TableMemory, u64) {
    let mut memory = TableMemory { address: TABLES, pages: std::vec![[0; 512]; plan.pages() as usize] };
    let root = plan.build(host, TableArea::new(TABLES, &mut memory.pages));
    (memory, root)
}

/// The tables of a unit, and the unit, turned on.
fn turned_on(fake: &FakeUnit) -> (TableMemory, Unit<FakeUnit>) {
    let plan = plan_for(&[fake.clone(), fake.clone()]).unwrap();
    let (memory, root) = build(&plan, HOST);
    let mut unit = Unit::new(fake.clone());
    unit.turn_on(root).unwrap();
    (memory, unit)
}

#[test]
fn devices_reach_all_but_the_host_the_units_and_the_interrupts() {
    const OPEN: [u64; 12] = [
        0,
        0x9_f000,
        GIB + 12,
        HOST.start - 1,
        HOST.end,
        3 * GIB,
        UNITS[0] - 1,
        UNITS[1] + 0x1000,
        INTERRUPTS.end,
        4 * GIB - 1,
        4 * GIB,
        10 * GIB - 1,
    ];
    const CLOSED: [u64; 7] = [
        HOST.start,
        HOST.start + 5 * MIB,
        HOST.end - 1,
        UNITS[0],
        UNITS[1] + 0xfff,
        INTERRUPTS.start,
        INTERRUPTS.end - 1,
    ];
    let all = [0, PAGES_1G, PAGES_1G | PAGES_2M, WIDTH_39, WIDTH_48, WIDTH_39 | PAGES_1G];
    for missing in all {
        let fake = without(missing);
        let (memory, mut unit) = turned_on(&fake);
        for (at, source) in OPEN.into_iter().zip((0..).step_by(0x1117)) {
            for is_read in [false, true] {
                assert_eq!(fake.transfer(&memory, source, at, is_read), Some(at), "without {missing:#x}: {at:#x}");
            }
        }
        for (at, source) in CLOSED.into_iter().zip((3..).step_by(0x2223)) {
            for is_read in [false, true] {
                assert_eq!(fake.transfer(&memory, source, at, is_read), None, "without {missing:#x}: {at:#x}");
                let mut faults = Vec::new();
                assert!(!unit.faults(|fault| faults.push(fault)));
                let reason = if is_read { 6 } else { 5 };
                assert_eq!(faults, [Fault { source, page: at & !0xfff, is_read, reason }]);
            }
        }
    }
}

#[test]
fn windows_of_devices_above_memory_are_reached_with_pages_of_1_gib() {
    let far = 1 << 45;
    let with_48 = without(WIDTH_39);
    assert_eq!(with_48.transfer(&turned_on(&with_48).0, 8, far, false), Some(far));
    assert_eq!(plan_for(&[with_48.clone(), with_48]).unwrap().pages(), 2 + (1 + 128 + 1 + 2) + 2, "46 bits");
    let with_39 = without(WIDTH_48);
    let (memory, _) = turned_on(&with_39);
    assert_eq!(with_39.transfer(&memory, 8, (1 << 39) - 1, false), Some((1 << 39) - 1));
    assert_eq!(with_39.transfer(&memory, 8, 1 << 39, false), None);
    let small = without(WIDTH_39 | PAGES_1G);
    assert_eq!(small.transfer(&turned_on(&small).0, 8, far, false), None);
}

#[test]
fn what_the_units_have_in_common_decides() {
    let pages = |units: &[FakeUnit]| plan_for(units).map(|plan| (plan.address_bits(), plan.is_coherent));
    let incoherent = FakeUnit::new(CAPABILITY, EXTENDED & !1);
    assert_eq!(pages(&[without(0), without(0)]), Ok((48, true)));
    assert_eq!(pages(&[without(0), without(WIDTH_48)]), Ok((39, true)));
    assert_eq!(pages(&[without(WIDTH_48), without(WIDTH_39)]), Err(Unusable::Width));
    assert_eq!(pages(&[without(0), incoherent]), Ok((48, false)));
    let five = FakeUnit::new(CAPABILITY & !(WIDTH_39 | WIDTH_48) | WIDTH_57, EXTENDED);
    assert_eq!(pages(&[five.clone(), five.clone()]), Ok((57, true)));
    assert_eq!(five.transfer(&turned_on(&five).0, 8, GIB, false), Some(GIB));
}

#[test]
fn each_reason_not_to_use_the_units_is_named() {
    let good = || without(0);
    let refusal = |units: [FakeUnit; 2]| plan_for(&units).map(|_| ()).unwrap_err();
    let absent = FakeUnit::new(u64::MAX, u64::MAX);
    absent.0.borrow_mut().version = u32::MAX;
    assert_eq!(refusal([good(), absent]), Unusable::Absent(UNITS[1]));
    assert_eq!(refusal([FakeUnit::new(0, 0), good()]), Unusable::Absent(UNITS[0]));
    assert_eq!(refusal([good(), without(WIDTH_39 | WIDTH_48)]), Unusable::NoTranslation(UNITS[1]));

    let new = FakeUnit::new(CAPABILITY, EXTENDED | 1 << 62);
    assert_eq!(refusal([good(), new]), Unusable::OnlyRemappedInterrupts(UNITS[1]));

    let refusal = |change: fn(&mut Dmar), bytes| {
        let mut dmar = dmar();
        change(&mut dmar);
        Plan::new(&dmar, &memory(bytes), 52, |_| Unit::new(without(WIDTH_48)).capabilities()).unwrap_err()
    };
    assert_eq!(refusal(|dmar| dmar.units.clear(), GIB), Unusable::NoUnit);
    assert_eq!(refusal(|dmar| dmar.units[0] = unit(GIB, 0, true), GIB), Unusable::Misplaced(GIB));
    assert_eq!(refusal(|dmar| dmar.units[0] = unit(5 * GIB, 0, true), GIB), Unusable::Misplaced(5 * GIB));
    assert_eq!(refusal(|_| (), 600 * GIB), Unusable::Width, "39 bits do not reach 600 GiB");
    assert_eq!(refusal(|dmar| dmar.address_bits = 33, 16 * GIB), Unusable::Width);
    for why in [Unusable::NeededByGuest, Unusable::Table(TableError::BadEntry(1)), Unusable::Silent(2, Silent("x"))] {
        assert!(!why.to_string().contains('\n'));
    }
}

#[test]
fn a_segment_without_a_unit_for_all_its_devices_is_named() {
    let partial = |change: fn(&mut Dmar)| {
        let mut dmar = dmar();
        change(&mut dmar);
        let plan = Plan::new(&dmar, &memory(GIB), 52, |_| Unit::new(without(0)).capabilities());
        plan.unwrap().partial_segment()
    };
    assert_eq!(partial(|_| ()), None);
    assert_eq!(partial(|dmar| dmar.units[1].includes_all = false), Some(0));
    assert_eq!(partial(|dmar| dmar.units[0].segment = 7), Some(7));
}

#[test]
fn registers_beyond_those_that_the_firmware_names_are_withheld_too() {
    let far_records = FakeUnit::new(CAPABILITY & !(0x3ff << 24) | 0x3ff << 24, EXTENDED);
    let plan = plan_for(&[without(0), far_records.clone()]).unwrap();
    let end = (UNITS[1] + 0x3ff * 16 + 32).next_multiple_of(4096);
    assert_eq!(plan.units[1].0, UNITS[1]..end);
    let (memory, root) = build(&plan, HOST);
    let fake = without(0);
    Unit::new(fake.clone()).turn_on(root).unwrap();
    assert_eq!(fake.transfer(&memory, 0, end - 1, false), None);
    assert_eq!(fake.transfer(&memory, 0, end, false), Some(end));
}

#[test]
fn a_unit_that_the_firmware_uses_is_taken_over() {
    let fake = FakeUnit::new(CAPABILITY | MEMORY_REGIONS | WRITE_BUFFER, EXTENDED);
    {
        let mut state = fake.0.borrow_mut();
        state.status = command::LASTING & !command::COMPATIBILITY_INTERRUPTS | command::SET_ROOT_TABLE;
        state.protected_memory = protected_memory::ENABLE | protected_memory::IS_ON;
        state.queue = [0x30, 0x30];
    }
    let (memory, _) = turned_on(&fake);
    let state = fake.0.borrow();
    assert_eq!(state.status, command::TRANSLATION | command::SET_ROOT_TABLE);
    assert_eq!((state.protected_memory, state.fault_control), (0, 1 << 31));
    drop(state);
    assert_eq!(fake.transfer(&memory, 0, HOST.start, true), None);
}

#[test]
fn a_unit_that_does_not_answer_is_given_up_with_the_step_named() {
    let steps: [(u64, &str); 10] = [
        (command::TRANSLATION.into(), "switch off the firmware's translation"),
        (command::INTERRUPT_REMAPPING.into(), "switch off the firmware's remapping of interrupts"),
        (command::QUEUED_INVALIDATION.into(), "finish the firmware's queue of invalidations"),
        (offset::QUEUE_HEAD, "finish the firmware's queue of invalidations"),
        (command::ADVANCED_FAULT_LOG.into(), "switch off the firmware's log of faults"),
        (command::FLUSH_WRITE_BUFFER.into(), "flush the write buffer"),
        (command::SET_ROOT_TABLE.into(), "set the root table"),
        (offset::CONTEXT_COMMAND, "invalidate the context cache"),
        (IOTLB, "invalidate the IOTLB"),
        (offset::PROTECTED_MEMORY, "open the firmware's protected memory"),
    ];
    for (stuck, name) in steps {
        let fake = FakeUnit::new(CAPABILITY | MEMORY_REGIONS | WRITE_BUFFER, EXTENDED);
        {
            let mut state = fake.0.borrow_mut();
            state.status = command::LASTING & !command::COMPATIBILITY_INTERRUPTS;
            state.protected_memory = protected_memory::ENABLE | protected_memory::IS_ON;
            state.queue = if stuck == offset::QUEUE_HEAD { [0x20, 0x30] } else { [0; 2] };
            state.stuck = Some(stuck);
        }
        assert_eq!(Unit::new(fake).turn_on(TABLES), Err(Silent(name)));
    }
    let fake = without(0);
    fake.0.borrow_mut().stuck = Some(command::TRANSLATION.into());
    assert_eq!(Unit::new(fake).turn_on(TABLES), Err(Silent("switch translation on")));
}

#[test]
fn a_unit_that_takes_invalidations_by_a_queue_only_needs_none_or_is_given_up() {
    for (capability, expected) in [(INVALIDATES, Ok(())), (0, Err(Silent("invalidate the context cache")))] {
        let fake = FakeUnit::new(CAPABILITY | capability, EXTENDED);
        fake.0.borrow_mut().only_queues = true;
        assert_eq!(Unit::new(fake).turn_on(TABLES), expected);
    }
}

#[test]
fn more_faults_than_records_are_reported_as_such_and_the_next_one_is_noted_again() {
    let fake = without(0);
    let (memory, mut unit) = turned_on(&fake);
    let mut count = |expected| {
        let mut faults = 0;
        assert_eq!((unit.faults(|_| faults += 1), faults), expected);
    };
    count((false, 0));
    (0..RECORD_COUNT as u16 + 3).for_each(|source| _ = fake.transfer(&memory, source, HOST.start, true));
    count((true, RECORD_COUNT));
    count((false, 0));
    _ = fake.transfer(&memory, 1, HOST.start, true);
    count((false, 1));
}

#[test]
fn a_fault_reads_as_device_direction_and_address() {
    let fault = Fault { source: 0x1a3b, page: 0x7c00_0000, is_read: false, reason: 5 };
    assert_eq!(fault.to_string(), "a write of device 1a:07.3 at 0x7c000000 (fault reason 0x5)");
}

proptest! {
    /// A host's region anywhere, and units anywhere: the tables fit the pages that were planned, and lead nowhere else.
    #[test]
    fn the_tables_are_an_identity_map_with_holes_and_take_no_more_pages_than_planned(
        missing in prop::sample::select(&[0, PAGES_1G, WIDTH_39, WIDTH_48, WIDTH_39 | PAGES_1G][..]),
        host in 1..1000_u64, host_size in 1..700_u64, unit_pages in prop::array::uniform2(0xc0000_u64..0xfed00),
        addresses in prop::collection::vec((0..10 * GIB, any::<u16>()), 50),
    ) {
        let fake = without(missing);
        let host = host * 2 * MIB..(host + host_size) * 2 * MIB;
        let mut dmar = dmar();
        for (unit, page) in dmar.units.iter_mut().zip(unit_pages) {
            unit.registers = page << 12..(page + 1) << 12;
        }
        let capabilities = Unit::new(fake.clone()).capabilities();
        let plan = Plan::new(&dmar, &memory(8 * GIB), 39, |_| capabilities).unwrap();
        let (memory, root) = build(&plan, host.clone());
        Unit::new(fake.clone()).turn_on(root).unwrap();
        let holes = [host, INTERRUPTS, dmar.units[0].registers.clone(), dmar.units[1].registers.clone()];
        let borders = holes.iter().flat_map(|hole| [hole.start - 1, hole.start, hole.end - 1, hole.end]);
        for (at, source) in borders.map(|at| (at, 0)).chain(addresses) {
            let is_withheld = holes.iter().any(|hole| hole.contains(&at));
            prop_assert_eq!(fake.transfer(&memory, source, at, false), (!is_withheld).then_some(at));
        }
    }
}
