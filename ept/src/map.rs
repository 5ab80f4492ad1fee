//! Writing the host's own tables: pages, ranges, and taking tables down.

use core::fmt;
use core::ops::Range;

use crate::addr::Address;
use crate::entry::ExecuteControl;
use crate::table::{ENTRIES, TableMemory, for_each_used, index};
use crate::{Entry, Eptp, Hpa, Levels, PageSize, Rights};

/// The table budget is spent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfTables;

impl fmt::Display for OutOfTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no table is left")
    }
}

impl core::error::Error for OutOfTables {}

/// Why a page could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapError {
    /// A table is needed, and none is left.
    OutOfTables,
    /// The root has too few levels for the address.
    OutOfReach,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTables => OutOfTables.fmt(f),
            Self::OutOfReach => f.write_str("the tables have too few levels for the address"),
        }
    }
}

impl core::error::Error for MapError {}

impl From<OutOfTables> for MapError {
    fn from(OutOfTables: OutOfTables) -> Self {
        Self::OutOfTables
    }
}

/// The level at which pages of a size are mapped.
pub const fn leaf_level(size: PageSize) -> u32 {
    match size {
        PageSize::Size4K => 1,
        PageSize::Size2M => 2,
        PageSize::Size1G => 3,
    }
}

/// The size of pages that are mapped at a level.
pub(crate) const fn page_size(level: u32) -> PageSize {
    match level {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

/// Where a page was mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeafTable {
    /// The table that has the leaf.
    pub table: Hpa,
    /// Whether the table was made for this page.
    pub is_new: bool,
    /// Whether the page replaced tables, which were given back. A processor may have their addresses in its
    /// paging-structure caches: INVEPT must follow before a guest runs on this root again.
    pub replaced_tables: bool,
}

fn root_table<F: Address>(root: Eptp<F, Hpa>) -> (Hpa, u32) {
    (root.root(), root.levels().root())
}

/// Maps the page of `size` that holds `address`. An earlier mapping there is replaced, tables included.
///
/// # Errors
///
/// As [`MapError`] says. Tables that were made on the way stay, and are empty.
pub fn map_page<F: Address>(
    memory: &mut impl TableMemory,
    root: Eptp<F, Hpa>,
    address: F,
    size: PageSize,
    leaf: Entry,
) -> Result<LeafTable, MapError> {
    if !root.levels().reach(address) {
        return Err(MapError::OutOfReach);
    }
    let mut is_new = false;
    let (mut table, mut level) = root_table(root);
    while level > leaf_level(size) {
        let at = index(address, level);
        let entry = memory.read(table, at);
        table = if entry.is_present() && !entry.is_leaf(level) {
            entry.address()
        } else {
            let new = memory.allocate().ok_or(OutOfTables)?;
            memory.write(table, at, Entry::table(new));
            is_new = true;
            new
        };
        level -= 1;
    }
    let at = index(address, level);
    let old = memory.read(table, at);
    memory.write(table, at, leaf);
    let replaced_tables = old.links_table(level);
    if replaced_tables {
        free_tables(memory, old.table_address(), level - 1);
    }
    Ok(LeafTable { table, is_new, replaced_tables })
}

/// Changes the rights of one 4-KiB page, splitting a large page that it is part of. A page that is not mapped stays
/// unmapped.
///
/// # Errors
///
/// A large page must be split, and no table is left. The page keeps its rights.
pub fn set_rights<F: Address>(
    memory: &mut impl TableMemory,
    root: Eptp<F, Hpa>,
    address: F,
    rights: Rights,
) -> Result<(), OutOfTables> {
    if !root.levels().reach(address) {
        return Ok(());
    }
    let (mut table, mut level) = root_table(root);
    loop {
        let at = index(address, level);
        let entry = memory.read(table, at);
        if !entry.is_present() {
            return Ok(());
        }
        if level == 1 {
            memory.write(table, at, entry.with_rights(rights));
            return Ok(());
        }
        table = if entry.is_leaf(level) { split(memory, table, at, level, entry)? } else { entry.address() };
        level -= 1;
    }
}

/// Replaces a large page by a table of 512 smaller ones with the same attributes.
fn split(memory: &mut impl TableMemory, table: Hpa, at: u64, level: u32, leaf: Entry) -> Result<Hpa, OutOfTables> {
    let below = memory.allocate().ok_or(OutOfTables)?;
    let size = page_size(level - 1);
    for part in 0..ENTRIES {
        let page = leaf.address() + part * size.bytes();
        memory.write(below, part, Entry::leaf(page, size, leaf.rights(ExecuteControl::BY_MODE), leaf.caching()));
    }
    memory.write(table, at, Entry::table(below));
    Ok(below)
}

/// Maps a range whose ends lie on 4-KiB pages and where nothing is mapped yet, or only pages that are no larger than the
/// new ones. `leaf` gives the entry for an address and a size; pages are as large as possible, up to `largest`.
///
/// # Errors
///
/// As [`MapError`] says. Pages that were mapped until then stay mapped.
pub fn map_range<F: Address>(
    memory: &mut impl TableMemory,
    root: Eptp<F, Hpa>,
    range: Range<F>,
    largest: PageSize,
    leaf: impl Fn(F, PageSize) -> Entry,
) -> Result<(), MapError> {
    let mut address = range.start;
    while address < range.end {
        let left = range.end.raw() - address.raw();
        let fits = |size: PageSize| size <= largest && address.raw() & (size.bytes() - 1) == 0 && left >= size.bytes();
        let size =
            [PageSize::Size1G, PageSize::Size2M].into_iter().find(|&size| fits(size)).unwrap_or(PageSize::Size4K);
        map_page(memory, root, address, size, leaf(address, size))?;
        address = address + size.bytes();
    }
    Ok(())
}

/// A page that is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// The leaf.
    pub leaf: Entry,
    /// Its size.
    pub size: PageSize,
}

/// The mapping of an address.
#[inline]
pub fn lookup<F: Address>(memory: &impl TableMemory, root: Eptp<F, Hpa>, address: F) -> Option<Mapping> {
    if !root.levels().reach(address) {
        return None;
    }
    let mut table = root.root();
    if root.levels() == Levels::Five {
        let entry = memory.read(table, index(address, 5));
        if !entry.is_present() {
            return None;
        }
        table = entry.address();
    }
    // This loop is unrolled.
    for level in (1..=4).rev() {
        let entry = memory.read(table, index(address, level));
        if !entry.is_present() {
            return None;
        }
        if entry.is_leaf(level) {
            return Some(Mapping { leaf: entry, size: page_size(level) });
        }
        table = entry.address();
    }
    None
}

/// The level of the table whose entry for an address is not present, where the walk of the address ends. `None` if the
/// address is mapped.
pub fn gap<F: Address>(memory: &impl TableMemory, root: Eptp<F, Hpa>, address: F) -> Option<u32> {
    gap_entry(memory, root, address).map(|(_, level)| level)
}

/// Writes the entry that [`gap`] finds, from its level: a page, or a table that has pages already. Changes nothing if
/// the address is mapped.
pub fn fill_gap<F: Address>(
    memory: &mut impl TableMemory,
    root: Eptp<F, Hpa>,
    address: F,
    entry: impl FnOnce(u32) -> Entry,
) {
    if let Some((table, level)) = gap_entry(memory, root, address) {
        memory.write(table, index(address, level), entry(level));
    }
}

fn gap_entry<F: Address>(memory: &impl TableMemory, root: Eptp<F, Hpa>, address: F) -> Option<(Hpa, u32)> {
    let (mut table, mut level) = root_table(root);
    while root.levels().reach(address) {
        let entry = memory.read(table, index(address, level));
        if !entry.is_present() {
            return Some((table, level));
        }
        if entry.is_leaf(level) {
            return None;
        }
        (table, level) = (entry.address(), level - 1);
    }
    None
}

/// Removes the page that holds an address, if one is mapped.
pub fn unmap<F: Address>(memory: &mut impl TableMemory, root: Eptp<F, Hpa>, address: F) {
    if !root.levels().reach(address) {
        return;
    }
    let (mut table, mut level) = root_table(root);
    loop {
        let at = index(address, level);
        let entry = memory.read(table, at);
        if !entry.is_present() {
            return;
        }
        if entry.is_leaf(level) {
            return memory.write(table, at, Entry::NOT_PRESENT);
        }
        (table, level) = (entry.address(), level - 1);
    }
}

/// Gives back a table of `level` and all below it.
pub fn free_tables(memory: &mut impl TableMemory, table: Hpa, level: u32) {
    if level > 1 {
        for_each_used(memory, table, |memory, _, entry| {
            if entry.links_table(level) {
                free_tables(memory, entry.table_address(), level - 1);
            }
        });
    }
    memory.free(table);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Caching;
    use crate::fake::FakeTables;
    use crate::{Eptp01, Gpa, MemoryType};

    fn root_of(tables: &mut FakeTables) -> Eptp01 {
        Eptp::new(tables.allocate().unwrap(), Levels::Four)
    }

    fn identity(address: Gpa, size: PageSize) -> Entry {
        Entry::leaf(Hpa(address.0), size, Rights::ALL, Caching::new(MemoryType::WRITE_BACK))
    }

    #[test]
    fn a_range_is_mapped_with_the_largest_pages_that_fit() {
        let mut tables = FakeTables::new(16);
        let root = root_of(&mut tables);
        map_range(&mut tables, root, Gpa(0x1f_f000)..Gpa(0x8020_0000), PageSize::Size1G, identity).unwrap();
        let size = |address| lookup(&tables, root, Gpa(address)).map(|mapping| mapping.size);
        assert_eq!(size(0x1f_efff), None);
        assert_eq!(size(0x1f_f000), Some(PageSize::Size4K));
        assert_eq!(size(0x20_0000), Some(PageSize::Size2M));
        assert_eq!(size(0x4000_0000), Some(PageSize::Size1G));
        assert_eq!(size(0x8000_0000), Some(PageSize::Size2M));
        assert_eq!(size(0x8020_0000), None);
        assert_eq!(size(1 << 52), None);
    }

    #[test]
    fn replacing_a_table_by_a_large_page_gives_the_table_back() {
        let mut tables = FakeTables::new(5);
        let root = root_of(&mut tables);
        map_page(&mut tables, root, Gpa(0x1000), PageSize::Size4K, identity(Gpa(0x1000), PageSize::Size4K)).unwrap();
        assert_eq!(tables.in_use(), 4);
        let large = map_page(&mut tables, root, Gpa(0), PageSize::Size2M, identity(Gpa(0), PageSize::Size2M)).unwrap();
        assert!(large.replaced_tables && tables.in_use() == 3);
        map_page(&mut tables, root, Gpa(0x1000), PageSize::Size4K, identity(Gpa(0x1000), PageSize::Size4K)).unwrap();
        assert_eq!(lookup(&tables, root, Gpa(0)), None, "a page table starts empty");
        free_tables(&mut tables, root.root(), root.levels().root());
        assert_eq!(tables.in_use(), 0);
    }

    #[test]
    fn one_page_of_a_large_one_changes_its_rights_and_the_others_keep_theirs() {
        let mut tables = FakeTables::new(8);
        let root = root_of(&mut tables);
        map_page(&mut tables, root, Gpa(0), PageSize::Size1G, identity(Gpa(0), PageSize::Size1G)).unwrap();
        set_rights(&mut tables, root, Gpa(0x20_3000), Rights::READ).unwrap();
        let rights = |address| {
            lookup(&tables, root, Gpa(address))
                .map(|mapping| (mapping.leaf.rights(ExecuteControl::UNIFORM), mapping.leaf.address()))
        };
        assert_eq!(rights(0x20_3000), Some((Rights::READ, Hpa(0x20_3000))));
        assert_eq!(rights(0x20_4000), Some((Rights::ALL, Hpa(0x20_4000))));
        assert_eq!(rights(0x40_0000), Some((Rights::ALL, Hpa(0x40_0000))));
        assert_eq!(tables.in_use(), 4);
        set_rights(&mut tables, root, Gpa(1 << 40), Rights::READ).unwrap();
        assert_eq!(tables.in_use(), 4, "nothing is mapped there");
    }

    #[test]
    fn a_spent_budget_is_an_error() {
        let mut tables = FakeTables::new(2);
        let root = root_of(&mut tables);
        assert_eq!(
            map_page(&mut tables, root, Gpa(0), PageSize::Size4K, Entry::from_bits(7)),
            Err(MapError::OutOfTables)
        );
    }

    #[test]
    fn a_gap_is_filled_at_the_level_where_the_walk_ends() {
        let mut tables = FakeTables::new(8);
        let root = root_of(&mut tables);
        assert_eq!(gap(&tables, root, Gpa(0x1000)), Some(4));
        map_page(&mut tables, root, Gpa(0x1000), PageSize::Size4K, identity(Gpa(0x1000), PageSize::Size4K)).unwrap();
        assert_eq!(
            [0x1000, 0x2000, 2 << 20, 1 << 30].map(|at| gap(&tables, root, Gpa(at))),
            [None, Some(1), Some(2), Some(3)]
        );
        // One directory for every GiB that is not mapped.
        let directory = tables.allocate().unwrap();
        (0..ENTRIES).for_each(|at| tables.write(directory, at, identity(Gpa(0), PageSize::Size2M)));
        for gib in [1, 2] {
            fill_gap(&mut tables, root, Gpa(gib << 30), |level| {
                assert_eq!(level, 3);
                Entry::table(directory)
            });
            assert_eq!(lookup(&tables, root, Gpa(gib << 30 | 0x1234)).map(|found| found.leaf.address()), Some(Hpa(0)));
        }
        fill_gap(&mut tables, root, Gpa(0x1000), |_| unreachable!("it is mapped"));
        assert_eq!(gap(&tables, root, Gpa(1 << 48)), None);
    }

    #[test]
    fn an_address_beyond_the_levels_changes_nothing() {
        const BEYOND: Gpa = Gpa(1 << 48 | 0x1000);
        let mut tables = FakeTables::new(8);
        let root = root_of(&mut tables);
        let near = identity(Gpa(0x1000), PageSize::Size4K);
        map_page(&mut tables, root, Gpa(0x1000), PageSize::Size4K, near).unwrap();
        let in_use = tables.in_use();
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            assert_eq!(map_page(&mut tables, root, BEYOND, size, identity(BEYOND, size)), Err(MapError::OutOfReach));
        }
        set_rights(&mut tables, root, BEYOND, Rights::NONE).unwrap();
        unmap(&mut tables, root, BEYOND);
        assert_eq!(lookup(&tables, root, Gpa(0x1000)).map(|mapping| mapping.leaf), Some(near));
        assert_eq!((lookup(&tables, root, BEYOND), tables.in_use()), (None, in_use));
    }
}
