//! Walking EPT12, as the processor would (SDM 29.3.2, 29.3.3).

use core::fmt;

use crate::entry::{self, Caching, ExecuteControl, Features};
use crate::map::page_size;
use crate::table::index;
use crate::{Entry, Eptp12, Gpa, Levels, NestedGpa, PageSize, Rights};

/// The guest hypervisor's memory, as a source of table entries.
pub trait GuestTables {
    /// Reads an entry in one access.
    fn read(&self, entry: Gpa) -> u64;
    /// Sets flags in an entry that was read as `seen`, in one access. Returns false, and leaves the entry alone, if it
    /// has changed since.
    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool;
}

/// A guest hypervisor's EPT as VMCS12 uses it. EPT12s that differ in a field have different EPT02s.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ept12 {
    /// Its EPTP.
    pub eptp: Eptp12,
    /// The meaning of its execute permissions.
    pub execute: ExecuteControl,
}

/// A translation by EPT12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// First byte of the page.
    pub page: Gpa,
    /// Its size.
    pub size: PageSize,
    /// Rights that all levels grant. They exclude writes if the page's dirty flag is still clear.
    pub rights: Rights,
    /// How the page is cached.
    pub caching: Caching,
}

impl Translation {
    /// The translation by a leaf at `level`. `rights` are those that the leaf and the entries above it grant. The
    /// access sets the dirty flag if it is a write.
    #[inline(always)]
    pub(crate) fn new(leaf: Entry<Gpa>, level: u32, rights: Rights, eptp: Eptp12, access: Rights) -> Self {
        let is_dirty = !eptp.has_flags() || leaf.is_dirty() || access.contain(Rights::WRITE);
        let size = page_size(level);
        Self {
            page: leaf.address().align_down(size),
            size,
            rights: if is_dirty { rights } else { rights.without(Rights::WRITE) },
            caching: leaf.caching(),
        }
    }
}

/// Why a walk finds no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkError {
    /// EPT violation.
    Violation(Refusal),
    /// EPT misconfiguration.
    Misconfiguration,
    /// An entry changed before its flags could be set: the access must be repeated.
    Changed,
}

impl fmt::Display for WalkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Violation(_) => "EPT violation",
            Self::Misconfiguration => "EPT misconfiguration",
            Self::Changed => "an entry changed during the walk",
        })
    }
}

impl core::error::Error for WalkError {}

/// An EPT violation: what the tables permit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The rights that all levels grant; none if an entry is not present.
    pub rights: Rights,
    /// The entry that decided has "suppress #VE" set (SDM 26.5.7.1 "Convertible EPT Violations").
    pub suppresses_ve: bool,
}

impl Refusal {
    /// The refusal by an entry that is not present.
    const fn not_present(entry: Entry<Gpa>) -> WalkError {
        WalkError::Violation(Self { rights: Rights::NONE, suppresses_ve: entry.suppresses_ve() })
    }
}

/// Translates an address for an access, setting accessed and dirty flags if the EPTP enables them.
///
/// # Errors
///
/// The tables do not permit the access, or are misconfigured; or the access must be repeated.
#[inline]
pub fn walk(
    tables: &mut impl GuestTables,
    ept12: Ept12,
    features: &Features,
    address: NestedGpa,
    access: Rights,
) -> Result<Translation, WalkError> {
    // With a constant number of levels the compiler unrolls the loop; with a constant mask its tests are cheaper.
    const USUAL: ExecuteControl = ExecuteControl::UNIFORM;
    if ept12.eptp.levels() == Levels::Four && ept12.execute == USUAL {
        return walk_levels::<4>(tables, Ept12 { execute: USUAL, ..ept12 }, features, address, access);
    }
    walk_unusual(tables, ept12, features, address, access)
}

/// [`walk`] for the rare cases: 5 levels, or mode-based execute control.
#[inline(never)]
pub(crate) fn walk_unusual(
    tables: &mut impl GuestTables,
    ept12: Ept12,
    features: &Features,
    address: NestedGpa,
    access: Rights,
) -> Result<Translation, WalkError> {
    match ept12.eptp.levels() {
        Levels::Four => walk_levels::<4>(tables, ept12, features, address, access),
        Levels::Five => walk_levels::<5>(tables, ept12, features, address, access),
    }
}

#[inline(always)]
fn walk_levels<const LEVELS: usize>(
    tables: &mut impl GuestTables,
    Ept12 { eptp, execute }: Ept12,
    features: &Features,
    address: NestedGpa,
    access: Rights,
) -> Result<Translation, WalkError> {
    if !eptp.levels().reach(address) {
        return Err(Refusal::not_present(Entry::from_bits(entry::SUPPRESS_VE)));
    }
    let mut path = [(Gpa(0), 0); LEVELS];
    let mut common = u64::MAX;
    let mut read = |tables: &_, table: Gpa, level: u32| {
        let at = table + index(address, level) * 8;
        let word = GuestTables::read(tables, at);
        path[level as usize - 1] = (at, word);
        common &= word;
        Entry::<Gpa>::from_bits(word)
    };
    let (mut level, mut rights) = (LEVELS as u32, execute.all());
    let mut entry = read(tables, eptp.root(), level);
    // Nearly every entry above a leaf restricts nothing. This loop is unrolled.
    for below in (1..LEVELS as u32).rev() {
        if !entry.is_open_table(features, execute) {
            break;
        }
        (level, entry) = (below, read(tables, entry.address(), below));
    }
    let leaf = loop {
        if entry.is_misconfigured(level, features, execute) {
            return Err(WalkError::Misconfiguration);
        }
        let own = entry.rights(execute);
        rights = rights.and(own);
        if own == Rights::NONE {
            return Err(Refusal::not_present(entry));
        }
        if entry.is_leaf(level) {
            break entry;
        }
        level -= 1;
        entry = read(tables, entry.address(), level);
    };
    if !rights.contain(access) {
        return Err(WalkError::Violation(Refusal { rights, suppresses_ve: leaf.suppresses_ve() }));
    }
    let write = access.contain(Rights::WRITE);
    let flags_are_set = common & entry::ACCESSED != 0 && (leaf.is_dirty() || !write);
    if eptp.has_flags() && !flags_are_set && !set_flags(tables, &path[level as usize - 1..], write) {
        return Err(WalkError::Changed);
    }
    Ok(Translation::new(leaf, level, rights, eptp, access))
}

/// Sets the accessed flags of the entries of a path, whose first is the leaf, and for a write the leaf's dirty flag.
/// Stops at an entry that has changed since.
#[inline(never)]
fn set_flags(tables: &mut impl GuestTables, path: &[(Gpa, u64)], write: bool) -> bool {
    path.iter().enumerate().all(|(height, &(at, seen))| {
        let flags = entry::ACCESSED | if height == 0 && write { entry::DIRTY } else { 0 };
        seen & flags == flags || tables.set_flags(at, seen, flags)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeGuest;

    const FEATURES: Features =
        Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };
    const PLAIN: Ept12 = Ept12 { eptp: Eptp12::from_bits(0x101e), execute: ExecuteControl::UNIFORM };
    const FLAGGED: Ept12 = Ept12 { eptp: PLAIN.eptp.with_flags(), ..PLAIN };
    const BY_MODE: Ept12 = Ept12 { execute: ExecuteControl::BY_MODE, ..PLAIN };

    /// 0x1000 -> 0x2000 -> 0x3000 -> {0x4000, 2 MiB at 0x80_0000}; 0x4000 -> 0x9000 read-only.
    fn guest() -> FakeGuest {
        let mut guest = FakeGuest::default();
        guest.set_word(0x1000, 0, 0x2007);
        guest.set_word(0x2000, 0, 0x3007);
        guest.set_word(0x3000, 0, 0x4007);
        guest.set_word(0x3000, 1, 0x80_00b7);
        guest.set_word(0x4000, 1, 0x9031);
        guest
    }

    #[test]
    fn a_page_is_found_with_the_rights_of_all_levels() {
        let mut guest = guest();
        let found = walk(&mut guest, PLAIN, &FEATURES, NestedGpa(0x1abc), Rights::READ).unwrap();
        assert_eq!((found.page, found.size, found.rights), (Gpa(0x9000), PageSize::Size4K, Rights::READ));
        let found = walk(&mut guest, PLAIN, &FEATURES, NestedGpa(0x2f_ffff), Rights::WRITE).unwrap();
        assert_eq!((found.page, found.size, found.rights), (Gpa(0x80_0000), PageSize::Size2M, Rights::ALL));
        guest.set_word(0x2000, 0, 0x3001);
        let found = walk(&mut guest, PLAIN, &FEATURES, NestedGpa(0x20_0000), Rights::READ).unwrap();
        assert_eq!(found.rights, Rights::READ);
    }

    #[test]
    fn violations_say_what_is_permitted() {
        let mut guest = guest();
        let mut refused = |address, access| walk(&mut guest, PLAIN, &FEATURES, NestedGpa(address), access).unwrap_err();
        let violation = |rights, suppresses_ve| WalkError::Violation(Refusal { rights, suppresses_ve });
        assert_eq!(refused(0x1000, Rights::WRITE), violation(Rights::READ, false));
        assert_eq!(refused(0x2000, Rights::READ), violation(Rights::NONE, false));
        assert_eq!(refused(1 << 48, Rights::READ), violation(Rights::NONE, true));
        guest.set_word(0x4000, 1, entry::SUPPRESS_VE | 0x9031);
        guest.set_word(0x4000, 2, entry::SUPPRESS_VE);
        let mut refused = |address, access| walk(&mut guest, PLAIN, &FEATURES, NestedGpa(address), access).unwrap_err();
        assert_eq!(refused(0x1000, Rights::WRITE), violation(Rights::READ, true));
        assert_eq!(refused(0x2000, Rights::READ), violation(Rights::NONE, true));
    }

    #[test]
    fn a_fifth_level_translates_nine_bits_more() {
        let mut guest = guest();
        guest.set_word(0xa000, 1, 0x1007);
        let five = Ept12 { eptp: Eptp12::new(Gpa(0xa000), Levels::Five), ..PLAIN };
        let found = walk(&mut guest, five, &FEATURES, NestedGpa(1 << 48 | 0x1000), Rights::READ).unwrap();
        assert_eq!(found.page, Gpa(0x9000));
        assert!(walk(&mut guest, five, &FEATURES, NestedGpa(0x1000), Rights::READ).is_err());
    }

    #[test]
    fn fetches_are_controlled_by_mode_at_every_level() {
        let mut guest = guest();
        for (table, entry) in [(0x1000, 0x2407), (0x2000, 0x3407), (0x3000, 0x4407)] {
            guest.set_word(table, 0, entry);
        }
        guest.set_word(0x4000, 1, 0x9431);
        let mut rights = |access| walk(&mut guest, BY_MODE, &FEATURES, NestedGpa(0x1000), access).map(|t| t.rights);
        assert_eq!(rights(Rights::USER_EXECUTE), Ok(Rights::READ.or(Rights::USER_EXECUTE)));
        assert!(rights(Rights::EXECUTE).is_err());
        guest.set_word(0x3000, 0, 0x4007);
        assert!(walk(&mut guest, BY_MODE, &FEATURES, NestedGpa(0x1000), Rights::USER_EXECUTE).is_err());
    }

    #[test]
    fn a_misconfiguration_is_not_a_violation() {
        let mut guest = guest();
        guest.set_word(0x4000, 1, 0x9032);
        let refused = walk(&mut guest, PLAIN, &FEATURES, NestedGpa(0x1000), Rights::WRITE);
        assert_eq!(refused, Err(WalkError::Misconfiguration));
    }

    /// A guest hypervisor whose other processor changes each entry right after it was read.
    struct Racing(FakeGuest, core::cell::RefCell<std::vec::Vec<u64>>);

    impl GuestTables for Racing {
        fn read(&self, entry: Gpa) -> u64 {
            self.1.borrow_mut().push(entry.0);
            self.0.read(entry)
        }

        fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
            self.0.set(entry, 0, Entry::from_bits(!seen));
            self.0.set_flags(entry, seen, flags)
        }
    }

    #[test]
    fn an_entry_is_read_once_and_one_that_changes_meanwhile_keeps_its_change() {
        let mut racing = Racing(guest(), Default::default());
        let raced = walk(&mut racing, FLAGGED, &FEATURES, NestedGpa(0x1000), Rights::READ);
        assert_eq!(raced, Err(WalkError::Changed));
        assert_eq!(*racing.1.borrow(), [0x1000, 0x2000, 0x3000, 0x4008]);
        assert_eq!(racing.0.word(0x4000, 1), !0x9031);
    }

    #[test]
    fn accessed_and_dirty_are_set_as_the_processor_sets_them() {
        let mut guest = guest();
        let read = walk(&mut guest, FLAGGED, &FEATURES, NestedGpa(0x20_0000), Rights::READ).unwrap();
        assert!(!read.rights.contain(Rights::WRITE), "the first write must be seen");
        assert_eq!(guest.word(0x1000, 0), 0x2107);
        assert_eq!(guest.word(0x3000, 1), 0x80_01b7);
        let written = walk(&mut guest, FLAGGED, &FEATURES, NestedGpa(0x20_0000), Rights::WRITE).unwrap();
        assert_eq!(written.rights, Rights::ALL);
        assert_eq!(guest.word(0x3000, 1), 0x80_03b7);
        assert_eq!(guest.word(0x2000, 0), 0x3107, "only a leaf gets dirty");
    }

    #[test]
    fn a_refused_access_sets_no_flag() {
        let mut guest = guest();
        walk(&mut guest, FLAGGED, &FEATURES, NestedGpa(0x1000), Rights::WRITE).unwrap_err();
        assert_eq!(guest.word(0x1000, 0), 0x2007);
    }
}
