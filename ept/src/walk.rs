//! Walking EPT12, as the processor would (SDM 29.3.2, 29.3.3).

use crate::entry::Features;
use crate::table::index;
use crate::{Entry, Eptp, Gpa, MemoryType, NestedGpa, PageSize, Rights};

/// The guest hypervisor's memory, for its tables.
pub trait GuestTables {
    /// Reads an entry in one access.
    fn read(&self, entry: Gpa) -> u64;
    /// Sets flags in an entry that was read as `seen`; one that has changed since is left alone.
    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64);
}

/// A translation by EPT12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// First byte of the page.
    pub page: Gpa,
    /// Its size.
    pub size: PageSize,
    /// Rights that all levels grant. A page whose dirty flag is still to be set is not writable in it.
    pub rights: Rights,
    /// The leaf's memory type.
    pub memory_type: MemoryType,
    /// The leaf's ignore-PAT bit.
    pub ignore_pat: bool,
    /// The leaf's dirty flag was set before this access, or there is none.
    pub was_dirty: bool,
}

/// Why there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkError {
    /// EPT violation; what the tables permit.
    Violation(Rights),
    /// EPT misconfiguration.
    Misconfiguration,
}

/// Translates an address for an access, setting accessed and dirty flags if the EPTP enables them.
pub fn walk(
    tables: &mut impl GuestTables,
    eptp: Eptp,
    features: &Features,
    address: NestedGpa,
    access: Rights,
) -> Result<Translation, WalkError> {
    const LEVELS: usize = 4;
    let mut path = [(Gpa(0), 0); LEVELS];
    let (mut table, mut level, mut rights) = (Gpa(eptp.root()), LEVELS as u32, Rights::ALL);
    if address.0 >> 48 != 0 {
        return Err(WalkError::Violation(Rights::NONE));
    }
    let mut common = u64::MAX;
    let leaf = loop {
        let at = table + index(address.0, level) * 8;
        let entry = Entry(tables.read(at));
        path[level as usize - 1] = (at, entry.0);
        common &= entry.0;
        // Nearly every entry above a leaf.
        if level > 1 && entry.is_open_table(features) {
            (table, level) = (Gpa(entry.address()), level - 1);
            continue;
        }
        if entry.is_misconfigured(level, features) {
            return Err(WalkError::Misconfiguration);
        }
        rights = rights.and(entry.rights());
        if !entry.is_present() {
            return Err(WalkError::Violation(Rights::NONE));
        }
        if entry.is_leaf(level) {
            break entry;
        }
        (table, level) = (Gpa(entry.address()), level - 1);
    };
    if !rights.contain(access) {
        return Err(WalkError::Violation(rights));
    }
    let mut granted = rights;
    if eptp.accessed_dirty() {
        let write = access.contain(Rights::WRITE);
        if common & Entry::ACCESSED == 0 || write && !leaf.is_dirty() {
            set_flags(tables, &path[level as usize - 1..], write);
        }
        if !write && !leaf.is_dirty() {
            granted = granted.without(Rights::WRITE);
        }
    }
    let size = match level {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    };
    Ok(Translation {
        page: Gpa(leaf.address()).align_down(size),
        size,
        rights: granted,
        memory_type: leaf.memory_type(),
        ignore_pat: leaf.ignores_pat(),
        was_dirty: !eptp.accessed_dirty() || leaf.is_dirty(),
    })
}

/// Sets the accessed flags of the entries of a path, whose first is the leaf, and the dirty flag of that for a write.
#[inline(never)]
fn set_flags(tables: &mut impl GuestTables, path: &[(Gpa, u64)], write: bool) {
    for (height, &(at, seen)) in path.iter().enumerate() {
        let flags = Entry::ACCESSED | if height == 0 && write { Entry::DIRTY } else { 0 };
        if seen & flags != flags {
            tables.set_flags(at, seen, flags);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeGuest;

    const FEATURES: Features = Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true };
    const EPTP: Eptp = Eptp::new(0x1000, false);
    const EPTP_AD: Eptp = Eptp::new(0x1000, true);

    /// 0x1000 -> 0x2000 -> 0x3000 -> {0x4000, 2 MiB at 0x80_0000}; 0x4000 -> 0x9000 read-only.
    fn guest() -> FakeGuest {
        let mut guest = FakeGuest::default();
        guest.set(0x1000, 0, 0x2007);
        guest.set(0x2000, 0, 0x3007);
        guest.set(0x3000, 0, 0x4007);
        guest.set(0x3000, 1, 0x80_00b7);
        guest.set(0x4000, 1, 0x9031);
        guest
    }

    #[test]
    fn a_page_is_found_with_the_rights_of_all_levels() {
        let mut guest = guest();
        let found = walk(&mut guest, EPTP, &FEATURES, NestedGpa(0x1abc), Rights::READ).unwrap();
        assert_eq!((found.page, found.size, found.rights), (Gpa(0x9000), PageSize::Size4K, Rights::READ));
        let found = walk(&mut guest, EPTP, &FEATURES, NestedGpa(0x2f_ffff), Rights::WRITE).unwrap();
        assert_eq!((found.page, found.size, found.rights), (Gpa(0x80_0000), PageSize::Size2M, Rights::ALL));
        guest.set(0x2000, 0, 0x3001);
        let found = walk(&mut guest, EPTP, &FEATURES, NestedGpa(0x20_0000), Rights::READ).unwrap();
        assert_eq!(found.rights, Rights::READ);
    }

    #[test]
    fn violations_say_what_is_permitted() {
        let mut guest = guest();
        let mut refused = |address, access| walk(&mut guest, EPTP, &FEATURES, NestedGpa(address), access).unwrap_err();
        assert_eq!(refused(0x1000, Rights::WRITE), WalkError::Violation(Rights::READ));
        assert_eq!(refused(0x2000, Rights::READ), WalkError::Violation(Rights::NONE));
        assert_eq!(refused(1 << 48, Rights::READ), WalkError::Violation(Rights::NONE));
    }

    #[test]
    fn a_misconfiguration_is_not_a_violation() {
        let mut guest = guest();
        guest.set(0x4000, 1, 0x9032);
        let refused = walk(&mut guest, EPTP, &FEATURES, NestedGpa(0x1000), Rights::WRITE);
        assert_eq!(refused, Err(WalkError::Misconfiguration));
    }

    #[test]
    fn accessed_and_dirty_are_set_as_the_processor_sets_them() {
        let mut guest = guest();
        let read = walk(&mut guest, EPTP_AD, &FEATURES, NestedGpa(0x20_0000), Rights::READ).unwrap();
        assert!(!read.rights.contain(Rights::WRITE), "the first write must be seen");
        assert_eq!(guest.get(0x1000, 0), 0x2107);
        assert_eq!(guest.get(0x3000, 1), 0x80_01b7);
        let written = walk(&mut guest, EPTP_AD, &FEATURES, NestedGpa(0x20_0000), Rights::WRITE).unwrap();
        assert_eq!(written.rights, Rights::ALL);
        assert_eq!(guest.get(0x3000, 1), 0x80_03b7);
        assert_eq!(guest.get(0x2000, 0), 0x3107, "only a leaf gets dirty");
    }

    #[test]
    fn a_refused_access_sets_no_flag() {
        let mut guest = guest();
        walk(&mut guest, EPTP_AD, &FEATURES, NestedGpa(0x1000), Rights::WRITE).unwrap_err();
        assert_eq!(guest.get(0x1000, 0), 0x2007);
    }
}
