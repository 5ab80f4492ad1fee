//! EPT01: an identity map, except that the host's region and the pages that it holds lead to one scratch page. All
//! processors share it. The host's region is mapped when a guest first goes there, so that it does not go unnoticed.
//!
//! Code that changes EPT01 holds its lock, for a few stores; walks take no lock. EPT01 only grows: none of its tables
//! is ever given back.

use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};

use boot::memory_map::{MemoryMap, RegionKind};
use ept::map::{MapError, Mapping, OutOfTables, fill_gap, gap, leaf_level, lookup, map_page, map_range, set_rights};
use ept::table::{ENTRIES, TableMemory};
use ept::{Caching, Entry, Eptp01, ExecuteControl, Gpa, Hpa, Levels, MemoryType, PageSize, Rights};
use spin::Mutex;

use crate::mem::{HeldPages, HostRegion, PAGE_BYTES};
use crate::stop::stop_internal;
use crate::tables::{RoomForEpt01, TableArea, TablePool};

/// EPT01.
#[derive(Debug)]
pub struct Ept01 {
    area: TableArea,
    root: Eptp01,
    writer: Mutex<()>,
    /// The largest pages.
    largest: PageSize,
    /// A page table, a page directory and a PDPT that map everything to the scratch page.
    nothing: [Hpa; 3],
    /// The host's memory.
    hole: HostRegion,
    /// How many times a guest has come to a part of the hole that was not mapped yet.
    hole_accesses: AtomicU32,
    /// Addresses from this one on are never mapped.
    limit: Gpa,
}

/// The addresses at which the guest hypervisor finds the scratch page.
#[derive(Clone, Copy, Debug)]
pub struct Withheld<'a> {
    /// The host's memory.
    pub region: HostRegion,
    /// Pages of devices, below 4 GiB and outside memory.
    pub held: &'a HeldPages,
    /// The page.
    pub scratch: Hpa,
}

/// The right to change EPT01, and the list of watched pages, which belongs to it.
pub struct Writer<'a> {
    ept01: &'a Ept01,
    _exclusive: spin::MutexGuard<'a, ()>,
}

/// A function that returns entries that map addresses to themselves.
fn identity(memory_type: MemoryType) -> impl Fn(Gpa, PageSize) -> Entry {
    move |address, size| Entry::leaf(Hpa(address.0), size, Rights::ALL, Caching::new(memory_type))
}

impl Ept01 {
    /// Memory write-back and devices uncacheable. The scratch page is plain memory without another use, all ones until a
    /// guest writes to it: whatever the guest hypervisor does to what is withheld reaches nothing of the host's. Nothing
    /// is mapped from `limit` on, the end of what guests can address.
    ///
    /// # Errors
    ///
    /// `pool` has too few tables, or the machine has memory that four levels do not reach.
    pub fn build(
        area: TableArea,
        pool: &mut TablePool,
        largest: PageSize,
        map: &MemoryMap,
        withheld: Withheld<'_>,
        limit: Gpa,
    ) -> Result<Self, MapError> {
        const LOW_END: u64 = 1 << 32;
        let Withheld { region: hole, scratch, .. } = withheld;
        let nothing = |_, size| Entry::leaf(scratch, size, Rights::ALL, Caching::new(MemoryType::WRITE_BACK));
        let root = Eptp01::new(pool.allocate().ok_or(OutOfTables)?, Levels::Four);
        let mut next = 0;
        let end = map.memory_end().min(limit.0).max(LOW_END).next_multiple_of(PageSize::Size2M.bytes());
        for region in map.regions() {
            let (start, stop) =
                (region.start.next_multiple_of(PAGE_BYTES), region.end.min(limit.0) & !(PAGE_BYTES - 1));
            let is_memory = region.kind != RegionKind::RESERVED;
            if !is_memory || start >= stop || start < next {
                continue;
            }
            map_devices(pool, root, next..start, largest, &withheld, &nothing)?;
            map_range(pool, root, Gpa(start)..Gpa(stop), largest, identity(MemoryType::WRITE_BACK))?;
            next = stop;
        }
        map_devices(pool, root, next..end, largest, &withheld, &nothing)?;
        let nothing = tables_of_nothing(pool, scratch)?;
        Ok(Self { area, root, writer: Mutex::new(()), largest, nothing, hole, hole_accesses: AtomicU32::new(0), limit })
    }

    /// How many parts of the host's region, of 2 MiB or more, guests have come to.
    pub fn hole_accesses(&self) -> u32 {
        self.hole_accesses.load(Ordering::Relaxed)
    }

    /// Where the addresses end that guests can have.
    pub const fn limit(&self) -> Gpa {
        self.limit
    }

    /// The EPTP of EPT01.
    pub const fn root(&self) -> Eptp01 {
        self.root
    }

    /// Whether an address is mapped and read-only: then its page is watched.
    pub fn is_protected(&self, address: Gpa) -> bool {
        self.lookup(address).is_some_and(|mapping| !mapping.leaf.rights(ExecuteControl::UNIFORM).contain(Rights::WRITE))
    }

    /// Takes the lock.
    pub fn writer(&self) -> Writer<'_> {
        Writer { ept01: self, _exclusive: self.writer.lock() }
    }

    fn lookup(&self, address: Gpa) -> Option<Mapping> {
        lookup(&self.area.without_room(), self.root, address)
    }
}

/// Maps addresses without memory, but for the host's region, and for pages that the host holds, where `nothing` gives the
/// entries.
fn map_devices(
    pool: &mut TablePool,
    root: Eptp01,
    range: Range<u64>,
    largest: PageSize,
    &Withheld { region: hole, held, .. }: &Withheld<'_>,
    nothing: &impl Fn(Gpa, PageSize) -> Entry,
) -> Result<(), MapError> {
    let mut next = range.start;
    if hole.start.0 < range.end && range.start < hole.end.0 {
        map_devices_around(pool, root, range.start..hole.start.0, largest, held, nothing)?;
        next = hole.end.0;
    }
    map_devices_around(pool, root, next..range.end, largest, held, nothing)
}

/// Maps addresses without memory, but for pages that the host holds.
fn map_devices_around(
    pool: &mut TablePool,
    root: Eptp01,
    range: Range<u64>,
    largest: PageSize,
    held: &HeldPages,
    nothing: &impl Fn(Gpa, PageSize) -> Entry,
) -> Result<(), MapError> {
    let mut next = range.start;
    let within = held.ranges().iter().map(|held| held.start.max(range.start)..held.end.min(range.end));
    for held in within.filter(|held| !held.is_empty()) {
        map_range(pool, root, Gpa(next)..Gpa(held.start), largest, identity(MemoryType::UNCACHEABLE))?;
        map_range(pool, root, Gpa(held.start)..Gpa(held.end), PageSize::Size4K, nothing)?;
        // The ranges of two units may overlap.
        next = next.max(held.end);
    }
    map_range(pool, root, Gpa(next)..Gpa(range.end), largest, identity(MemoryType::UNCACHEABLE))
}

/// Tables that map everything to the scratch page, by level from 1 on.
fn tables_of_nothing(pool: &mut TablePool, scratch: Hpa) -> Result<[Hpa; 3], OutOfTables> {
    let mut entry = Entry::leaf(scratch, PageSize::Size4K, Rights::ALL, Caching::new(MemoryType::WRITE_BACK));
    let mut tables = [scratch; 3];
    for table in &mut tables {
        *table = pool.allocate().ok_or(OutOfTables)?;
        (0..ENTRIES).for_each(|at| pool.write(*table, at, entry));
        entry = Entry::table(*table);
    }
    Ok(tables)
}

impl Writer<'_> {
    /// Makes a page read-only.
    ///
    /// # Errors
    ///
    /// `pool` has too few tables.
    pub fn protect(&self, pool: &mut TablePool, page: Gpa) -> Result<(), OutOfTables> {
        set_rights(&mut RoomForEpt01(pool), self.ept01.root, page, Rights::READ.or(Rights::EXECUTE))
    }

    /// Makes a page that was read-only writable again.
    pub fn permit_writes(&self, page: Gpa) {
        // Protecting the page has split the large page, so this needs no new table.
        let _ = set_rights(&mut self.ept01.area.without_room(), self.ept01.root, page, Rights::ALL);
    }

    /// Maps the large page around an address that is not mapped yet: of a device with a 64-bit window, of nothing at all,
    /// or of the host's region, to the scratch page. Returns whether the address was not mapped.
    ///
    /// # Errors
    ///
    /// `pool` has too few tables.
    pub fn map_beyond(&self, pool: &mut TablePool, address: Gpa) -> Result<bool, OutOfTables> {
        let gap = gap(&self.ept01.area.without_room(), self.ept01.root, address);
        let Some(level) = gap.filter(|_| address < self.ept01.limit) else { return Ok(false) };
        if self.ept01.hole.range().contains(&Hpa(address.0)) {
            self.map_to_nothing(address);
            if self.ept01.hole_accesses.fetch_add(1, Ordering::Relaxed) == 0 {
                log::warn!("a guest accesses {address}, which is the host's: it finds one page without a use there");
            }
            return Ok(true);
        }
        let size = if level > leaf_level(PageSize::Size2M) { self.ept01.largest } else { PageSize::Size2M };
        let leaf = identity(MemoryType::UNCACHEABLE)(address, size);
        match map_page(&mut RoomForEpt01(pool), self.ept01.root, address, size, leaf) {
            Ok(_) => Ok(true),
            Err(MapError::OutOfTables) => Err(OutOfTables),
            Err(MapError::OutOfReach) => stop_internal!("{address} is beyond what EPT01 can map"),
        }
    }

    /// Maps an address that is not mapped yet to the scratch page, and all others below the entry that is missing.
    /// Needs no table.
    pub fn map_to_nothing(&self, address: Gpa) {
        let Ept01 { area, root, nothing: [table, directory, pdpt], .. } = *self.ept01;
        fill_gap(&mut area.without_room(), root, address, |level| match level {
            1 => area.read(table, 0),
            2 => Entry::table(table),
            3 => Entry::table(directory),
            _ => Entry::table(pdpt),
        });
    }
}
