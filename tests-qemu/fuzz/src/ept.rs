//! Targets of `ept`: the tables of a guest hypervisor.

use ept::fake::FakeGuest;
use ept::fake::model::{END, EPT12S, Machine, READ_ONLY, SPLIT, Step, TABLE_COUNT, TABLES};
use ept::violation::EptViolation;
use ept::walk::{Ept12, GuestTables, Refusal, WalkError, walk as walk_ept12};
use ept::{Entry, Eptp12, ExecuteControl, Features, Gpa, Levels, NestedGpa, PageSize, Rights};

use crate::Input;

/// Accesses, as the model makes them.
const ACCESSES: [Rights; 5] =
    [Rights::READ, Rights::WRITE, Rights::READ.or(Rights::WRITE), Rights::EXECUTE, Rights::USER_EXECUTE];
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const SUPPRESS_VE: u64 = 1 << 63;

/// Entries with few sources of translations, so that a program uses a table again.
fn entry(input: &mut Input<'_>) -> u64 {
    const PAGES: [u64; 8] = [0x9000, SPLIT + 0x1000, READ_ONLY, SPLIT, 0, 1 << 30, END, 1 << 41];
    let kind = input.byte();
    let rights = if kind & 3 == 0 { u64::from(kind >> 2 & 7) } else { 7 } | if kind & 0x20 == 0 { 0x400 } else { 0 };
    match kind >> 6 {
        0 => 0,
        1 => (TABLES + input.below(TABLE_COUNT as usize) as u64 * 4096) | rights,
        _ => {
            let attributes = input.byte();
            let kind = if attributes & 3 == 0 { u64::from(attributes >> 2 & 7) } else { 6 };
            input.pick(&PAGES) | rights | kind << 3 | u64::from(attributes >> 5 & 3) << 6
        }
    }
}

fn index(number: u8) -> u64 {
    match number & 3 {
        3 => 511,
        small => small.into(),
    }
}

fn address(input: &mut Input<'_>) -> u64 {
    let indices = input.byte();
    let of_level = |level: u32| index(indices >> (2 * (level - 1))) << (12 + 9 * (level - 1));
    (1..=4).map(of_level).sum()
}

/// A program of a guest hypervisor on the model of [`ept::fake::model`].
///
/// The input: levels and the number of tables, then steps.
pub fn paging(bytes: &[u8]) {
    /// The model compares with all states since the last invalidation, so a long program takes long.
    const STEPS: usize = 100;
    let mut input = Input::new(bytes);
    let style = input.byte();
    let budget = [10, 16, 24, 400][usize::from(style >> 1 & 3)];
    let mut machine = Machine::new(budget, if style & 1 == 0 { Levels::Four } else { Levels::Five });
    for _ in 0..STEPS {
        if input.is_at_end() {
            break;
        }
        let kind = input.byte();
        let number = usize::from(kind >> 4) % EPT12S;
        let table = TABLES + u64::from(kind >> 4 & 7) * 4096;
        machine.run(&match kind & 0xf {
            0..6 => Step::Edit { table, index: index(input.byte()), entry: entry(&mut input) },
            6 => Step::ClearFlags { table, index: index(input.byte()) },
            7 => Step::Single { ept12: number },
            8 => Step::Global,
            _ => {
                let access = input.pick(&ACCESSES);
                Step::Access { ept12: number, address: address(&mut input) | u64::from(kind & 1) << 3, access }
            }
        });
    }
    machine.finish();
}

/// An EPT12 of arbitrary entries, one for each level but for what the input adds, and a walk.
///
/// The input: the features and the EPTP, the access, and the entries on its way.
pub fn walk(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let style = input.byte();
    let features = Features {
        physical_bits: 32 + u32::from(input.byte() % 21),
        execute_only: style & 1 != 0,
        page_2m: style & 2 != 0,
        page_1g: style & 4 != 0,
        advanced_violation: style & 8 != 0,
    };
    let execute = if style & 0x10 == 0 { ExecuteControl::UNIFORM } else { ExecuteControl::BY_MODE };
    let eptp = Eptp12::from_bits(0x1000 | input.neighbour(0x1e) & 0xfff);
    check_eptp(eptp);
    let ept12 = Ept12 { eptp, execute };
    let access = Rights::from_bits(input.byte().into());
    let user = style & 0x20 != 0 && execute == ExecuteControl::BY_MODE;
    let access = if user { access.or(Rights::USER_EXECUTE) } else { access };
    let address = NestedGpa(input.neighbour(0x12_3456_7000));

    let mut guest = FakeGuest::default();
    let mut table = eptp.root();
    for level in (1..=eptp.levels().root()).rev() {
        let below = 0x2000 + u64::from(level) * 0x1000;
        let usual = if level == 1 { 0x0_9fff_f037 } else { below | 0x407 };
        let word = input.neighbour(usual);
        guest.set(table, address.0 >> (12 + 9 * (level - 1)) & 511, Entry::from_bits(word));
        table = Gpa(word & 0xf_ffff_ffff_f000);
    }
    check_walk(guest, ept12, &features, address, access);
    check_violation(EptViolation(input.quad()), execute, &features, access);
}

fn check_eptp(eptp: Eptp12) {
    let again = eptp.with_root(eptp.root());
    assert_eq!((again.root(), again.levels(), again.has_flags()), (eptp.root(), eptp.levels(), eptp.has_flags()));
    assert!(eptp.with_flags().has_flags() && eptp.root().is_aligned(PageSize::Size4K));
}

/// The walk finds what the SDM says, and sets the flags that it says, and no others.
fn check_walk(mut guest: FakeGuest, ept12: Ept12, features: &Features, address: NestedGpa, access: Rights) {
    let before = guest.clone();
    let (expected, path) = expected_walk(&before, ept12, features, address, access);
    let found = walk_ept12(&mut guest, ept12, features, address, access);
    match (found, expected) {
        (Ok(found), Ok((page, size, rights))) => {
            assert_eq!((found.page.0, found.size.bytes()), (page, size));
            let leaf = GuestTables::read(&before, path[path.len() - 1]);
            let writable = !ept12.eptp.has_flags() || leaf & DIRTY != 0 || access.contain(Rights::WRITE);
            let rights = if writable { rights } else { rights & !Rights::WRITE.bits() };
            assert_eq!(found.rights.bits(), rights);
            assert!(found.caching.memory_type().is_defined());
        }
        (Err(found), Err(expected)) => assert_eq!(found, expected),
        // One entry of two levels changes when the flags of the first are set.
        (Err(WalkError::Changed), Ok(_)) if (1..path.len()).any(|at| path[..at].contains(&path[at])) => return,
        (found, expected) => panic!("{found:?} instead of {expected:x?}"),
    }
    let sets_flags = found.is_ok() && ept12.eptp.has_flags();
    for (number, &at) in path.iter().enumerate() {
        let is_leaf = number == path.len() - 1;
        let dirty = if is_leaf && access.contain(Rights::WRITE) { DIRTY } else { 0 };
        let others = if sets_flags { ACCESSED | DIRTY } else { 0 };
        let (old, new) = (GuestTables::read(&before, at), GuestTables::read(&guest, at));
        let required = if sets_flags { ACCESSED | dirty } else { 0 };
        assert!(new & required == required && (new ^ old) & !others == 0 && new & old == old);
    }
}

type Walked = Result<(u64, u64, u64), WalkError>;

/// The walk as the SDM describes it (29.3.2 "EPT Translation Mechanism", 29.3.3 "EPT-Induced VM Exits"): the page, its
/// size and the rights, and the addresses of the entries on the way.
fn expected_walk(
    guest: &FakeGuest,
    Ept12 { eptp, execute }: Ept12,
    features: &Features,
    address: NestedGpa,
    access: Rights,
) -> (Walked, Vec<Gpa>) {
    let mask = execute.all().bits();
    let violation = |rights: u64, suppresses_ve| {
        let (all, user) = (Rights::from_bits(rights), Rights::USER_EXECUTE);
        let rights = if rights & user.bits() != 0 { all.or(user) } else { all };
        Err(WalkError::Violation(Refusal { rights, suppresses_ve }))
    };
    let (mut table, mut rights, mut path) = (eptp.root().0, mask, Vec::new());
    if !eptp.levels().reach(address) {
        return (violation(0, true), path);
    }
    for level in (1..=eptp.levels().root()).rev() {
        let at = Gpa(table + 8 * (address.0 >> (12 + 9 * (level - 1)) & 511));
        let entry = GuestTables::read(guest, at);
        path.push(at);
        let own = entry & mask;
        if own == 0 {
            return (violation(0, entry & SUPPRESS_VE != 0), path);
        }
        let is_large = entry >> 7 & 1 != 0;
        let is_leaf = level == 1 || level <= 3 && is_large;
        let size = 1_u64 << (12 + 9 * (level - 1));
        let reserved = match level {
            1 => 0,
            2 | 3 if is_leaf => size - 0x1000,
            2 | 3 => 0x78,
            _ => 0xf8,
        };
        let has_size = !is_leaf || [true, features.page_2m, features.page_1g][level as usize - 1];
        let beyond = (entry & 0xf_ffff_ffff_f000) >> features.physical_bits != 0;
        let unreadable = own & 1 == 0 && (own & 2 != 0 || !features.execute_only);
        let bad_type = is_leaf && matches!(entry >> 3 & 7, 2 | 3 | 7);
        if entry & reserved != 0 || !has_size || beyond || unreadable || bad_type {
            return (Err(WalkError::Misconfiguration), path);
        }
        rights &= own;
        table = entry & 0xf_ffff_ffff_f000;
        if is_leaf {
            let is_permitted = rights & access.bits() == access.bits();
            let found = Ok((table & !(size - 1), size, rights));
            return (if is_permitted { found } else { violation(rights, entry & SUPPRESS_VE != 0) }, path);
        }
    }
    unreachable!("level 1 has pages")
}

fn check_violation(qualification: EptViolation, execute: ExecuteControl, features: &Features, rights: Rights) {
    let (first, second) = qualification.needs(execute, features);
    for needed in [Some(first), second].into_iter().flatten() {
        assert!(execute.all().contain(needed));
    }
    let against = qualification.against(rights);
    assert_eq!(against.permits_something(), rights != Rights::NONE);
    assert_eq!(against.against(rights), against);
    assert_eq!(against.difference(EptViolation(0x78)), qualification.difference(EptViolation(0x78)));
}
