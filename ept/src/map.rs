//! Writing the host's own tables: pages, ranges, and taking tables down.

use crate::table::{ENTRIES, TableMemory, index};
use crate::{Entry, Hpa, PageSize};

/// The table budget is spent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfTables;

const ROOT_LEVEL: u32 = 4;

/// The level at which pages of a size are mapped.
pub const fn leaf_level(size: PageSize) -> u32 {
    match size {
        PageSize::Size4K => 1,
        PageSize::Size2M => 2,
        PageSize::Size1G => 3,
    }
}

const fn page_size(level: u32) -> PageSize {
    match level {
        1 => PageSize::Size4K,
        2 => PageSize::Size2M,
        _ => PageSize::Size1G,
    }
}

/// Maps the page of `size` that holds `address`. What was mapped there before is replaced, tables included.
pub fn map_page(
    memory: &mut impl TableMemory,
    root: Hpa,
    address: u64,
    size: PageSize,
    leaf: Entry,
) -> Result<(), OutOfTables> {
    let (mut table, mut level) = (root, ROOT_LEVEL);
    while level > leaf_level(size) {
        let at = index(address, level);
        let entry = memory.read(table, at);
        table = if entry.is_present() && !entry.is_leaf(level) {
            Hpa(entry.address())
        } else {
            let new = memory.allocate().ok_or(OutOfTables)?;
            memory.write(table, at, Entry::table(new.0));
            new
        };
        level -= 1;
    }
    let at = index(address, level);
    let old = memory.read(table, at);
    memory.write(table, at, leaf);
    if old.is_present() && !old.is_leaf(level) {
        free_tables(memory, Hpa(old.address()), level - 1);
    }
    Ok(())
}

/// Maps `[start, end)` (both page-aligned) with the largest pages up to `largest`. `leaf` gives the entry for an address and a size.
pub fn map_range(
    memory: &mut impl TableMemory,
    root: Hpa,
    start: u64,
    end: u64,
    largest: PageSize,
    leaf: impl Fn(u64, PageSize) -> Entry,
) -> Result<(), OutOfTables> {
    let mut address = start;
    while address < end {
        let fits =
            |size: PageSize| size <= largest && address & (size.bytes() - 1) == 0 && end - address >= size.bytes();
        let size =
            [PageSize::Size1G, PageSize::Size2M].into_iter().find(|&size| fits(size)).unwrap_or(PageSize::Size4K);
        map_page(memory, root, address, size, leaf(address, size))?;
        address += size.bytes();
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

/// What an address is mapped to.
#[inline]
pub fn lookup(memory: &impl TableMemory, root: Hpa, address: u64) -> Option<Mapping> {
    if address >> 48 != 0 {
        return None;
    }
    let (mut table, mut level) = (root, ROOT_LEVEL);
    loop {
        let entry = memory.read(table, index(address, level));
        if !entry.is_present() {
            return None;
        }
        if entry.is_leaf(level) {
            return Some(Mapping { leaf: entry, size: page_size(level) });
        }
        (table, level) = (Hpa(entry.address()), level - 1);
    }
}

/// Gives back a table of `level` and all below it.
pub fn free_tables(memory: &mut impl TableMemory, table: Hpa, level: u32) {
    if level > 1 {
        for at in 0..ENTRIES {
            let entry = memory.read(table, at);
            if entry.is_present() && !entry.is_leaf(level) {
                free_tables(memory, Hpa(entry.address()), level - 1);
            }
        }
    }
    memory.free(table);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeTables;
    use crate::{MemoryType, Rights};

    fn identity(address: u64, size: PageSize) -> Entry {
        Entry::leaf(address, size, Rights::ALL, MemoryType::WRITE_BACK, false)
    }

    #[test]
    fn a_range_is_mapped_with_the_largest_pages_that_fit() {
        let mut tables = FakeTables::new(16);
        let root = tables.allocate().unwrap();
        map_range(&mut tables, root, 0x1f_f000, 0x8020_0000, PageSize::Size1G, identity).unwrap();
        let size = |address| lookup(&tables, root, address).map(|mapping| mapping.size);
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
        let root = tables.allocate().unwrap();
        map_page(&mut tables, root, 0x1000, PageSize::Size4K, identity(0x1000, PageSize::Size4K)).unwrap();
        assert_eq!(tables.in_use(), 4);
        map_page(&mut tables, root, 0, PageSize::Size2M, identity(0, PageSize::Size2M)).unwrap();
        assert_eq!(tables.in_use(), 3);
        map_page(&mut tables, root, 0x1000, PageSize::Size4K, identity(0x1000, PageSize::Size4K)).unwrap();
        assert_eq!(lookup(&tables, root, 0), None, "a page table starts empty");
        free_tables(&mut tables, root, ROOT_LEVEL);
        assert_eq!(tables.in_use(), 0);
    }

    #[test]
    fn a_spent_budget_is_an_error() {
        let mut tables = FakeTables::new(2);
        let root = tables.allocate().unwrap();
        assert_eq!(map_page(&mut tables, root, 0, PageSize::Size4K, Entry(7)), Err(OutOfTables));
    }
}
