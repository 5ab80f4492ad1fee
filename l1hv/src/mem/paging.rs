//! The host's own page tables.
//!
//! ```text
//!   0xFFFF_8000_0000_0000 + p   all of physical memory: supervisor, writable, never executable; 1 GiB or 2 MiB pages;
//!                               but for pages of devices that the host holds: there is a page without another use
//!   0xFFFF_FE00_0000_0000 + p   the pages of devices that the host holds, uncacheable
//!   0xFFFF_FF00_0000_0000       stacks of the processors but the first, each above a page that is not mapped
//!   0xFFFF_FFFF_8010_0000       the image, backed by the host's region: text read+execute, constants read, data read+write
//! ```
//!
//! Nothing else is mapped: a null pointer, a guest's pointer or a jump into guest memory faults. SDM Vol. 3A, 4.5.4
//! "Linear-Address Translation with 4-Level Paging and 5-Level Paging".

use core::ops::Range;

use ept::{Hpa, PageSize};

use super::alloc::OutOfHostMemory;
use super::{HeldPages, HostPages, PAGE_BYTES, PhysAllocator};
use crate::arch::phys::DIRECT_MAP_BASE;
use crate::arch::relocate::{Access, ImagePart};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The bytes that one entry of the top table maps.
const TOP_ENTRY_BYTES: u64 = 512 << 30;

/// Tables under construction. They are in one piece of memory, so that an entry leads to its table by an index.
struct Tables {
    base: Hpa,
    tables: &'static mut [[u64; 512]],
    used: usize,
}

impl Tables {
    fn new(pages: HostPages) -> Self {
        Self { base: pages.phys(), tables: pages.into_tables(), used: 1 }
    }

    fn phys(&self, table: usize) -> u64 {
        self.base.0 + table as u64 * PAGE_BYTES
    }

    /// The table that `tables[table][index]` leads to, made if there is none.
    fn child(&mut self, table: usize, index: usize) -> usize {
        let entry = self.tables[table][index];
        if entry != 0 {
            return (((entry & ADDRESS) - self.base.0) / PAGE_BYTES) as usize;
        }
        let child = self.used;
        self.used += 1;
        self.tables[table][index] = self.phys(child) | PRESENT | WRITABLE;
        child
    }

    /// A top table with the same mappings as the first one.
    fn copy_of_root(&mut self) -> usize {
        let copy = self.used;
        self.used += 1;
        self.tables[copy] = self.tables[0];
        copy
    }

    /// Maps one page. `virt` and `phys` are multiples of its size, and nothing is mapped there yet.
    fn map(&mut self, virt: u64, phys: Hpa, size: PageSize, flags: u64) {
        self.map_from(0, virt, phys, size, flags);
    }

    /// Maps a page of the direct map. In place of pages that the host holds, `nothing` is mapped.
    fn map_directly(&mut self, phys: Hpa, size: PageSize, held: &HeldPages, nothing: Hpa) {
        let is_free = !held.touch(phys.0, phys.0 + size.bytes());
        let smaller = match size {
            _ if is_free => None,
            PageSize::Size1G => Some(PageSize::Size2M),
            PageSize::Size2M => Some(PageSize::Size4K),
            PageSize::Size4K => None,
        };
        let Some(smaller) = smaller else {
            let to = if is_free { phys } else { nothing };
            return self.map(DIRECT_MAP_BASE + phys.0, to, size, WRITABLE | NO_EXECUTE);
        };
        for at in (0..size.bytes()).step_by(smaller.bytes() as usize) {
            self.map_directly(phys + at, smaller, held, nothing);
        }
    }

    /// Maps one page below another top table.
    fn map_from(&mut self, root: usize, virt: u64, phys: Hpa, size: PageSize, flags: u64) {
        let index = |shift: u32| (virt >> shift & 511) as usize;
        let large = if size == PageSize::Size4K { 0 } else { LARGE };
        let mut table = root;
        for shift in [39, 30, 21, 12] {
            if shift == size.shift() {
                self.tables[table][index(shift)] = phys.0 | PRESENT | large | flags;
                return;
            }
            table = self.child(table, index(shift));
        }
    }
}

/// Where the stacks begin, of the processors but the first.
const STACKS: u64 = 0xFFFF_FF00_0000_0000;
/// Pages of one.
const STACK_PAGES: u64 = 32;
/// The same with the page below it, which nothing is mapped to: what overflows faults.
const STACK_SLOT_BYTES: u64 = (STACK_PAGES + 1) * PAGE_BYTES;

/// The end of a stack; the first one is of the second processor.
pub const fn stack_end(number: usize) -> u64 {
    STACKS + (number as u64 + 1) * STACK_SLOT_BYTES
}

/// Where the pages of devices begin that the host holds.
const DEVICES: u64 = 0xFFFF_FE00_0000_0000;

/// The address of a register in a page of a device that the host holds.
pub const fn held_to_virt(hpa: Hpa) -> u64 {
    DEVICES + hpa.0
}

/// What the host's tables map.
#[derive(Clone, Copy, Debug)]
pub struct HostMap<'a> {
    /// The end of the direct map: a multiple of 1 GiB.
    pub direct_map_end: Hpa,
    /// The size of its pages.
    pub direct_page: PageSize,
    /// The image's virtual addresses.
    pub image: &'a Range<u64>,
    /// What backs the image's first byte; the others follow.
    pub image_start: Hpa,
    /// The image's parts.
    pub parts: &'a [ImagePart],
    /// The number of new stacks.
    pub stacks: usize,
    /// Pages of devices that the host holds: what it does for guests does not reach them.
    pub held: &'a HeldPages,
}

/// The most tables that [`build_host_tables`] needs.
fn tables_needed(map: &HostMap<'_>) -> u64 {
    let HostMap { direct_map_end, direct_page, image, stacks, held, .. } = *map;
    let (image_bytes, stacks) = (image.end - image.start, stacks as u64);
    let pdpts = direct_map_end.0.div_ceil(TOP_ENTRY_BYTES);
    let pds = if direct_page == PageSize::Size1G { 0 } else { direct_map_end.0.div_ceil(PageSize::Size1G.bytes()) };
    // The image: a PDPT, a page directory, and page tables of 2 MiB each, the first and the last of them in part.
    let image = 2 + image_bytes / PageSize::Size2M.bytes() + 2;
    // The other top table, and the tables above one page of 2 MiB.
    let start = 3;
    // The stacks: as for the image.
    let stacks = 2 + stacks * STACK_SLOT_BYTES / PageSize::Size2M.bytes() + 2;
    // A range of pages of a device that lies across a border of 1 GiB: for the hole in the direct map, and for itself.
    let held =
        held.ranges().iter().map(|range| 4 + 6 + 2 * (range.end - range.start) / PageSize::Size2M.bytes()).sum::<u64>();
    1 + pdpts + pds + image + start + stacks + held
}

/// The roots of the host's tables.
#[derive(Clone, Copy, Debug)]
pub struct HostTables {
    /// The root that the host runs on.
    pub root: Hpa,
    /// The root that a processor starts on: the same mappings, and the low 2 MiB mapped to themselves.
    pub start_root: Hpa,
}

/// Builds the host's tables.
///
/// # Errors
///
/// The region is too small for the tables.
pub fn build_host_tables(allocator: &mut PhysAllocator, map: &HostMap<'_>) -> Result<HostTables, OutOfHostMemory> {
    let HostMap { direct_map_end, direct_page, image, image_start, parts, stacks, held } = *map;
    let mut tables = Tables::new(allocator.alloc_pages(tables_needed(map))?);
    let nothing = allocator.alloc_pages(1)?;
    let nothing_at = nothing.phys();
    // The page reads as ones, as a bus without a device does.
    nothing.into_bytes().fill(0xff);
    for phys in (0..direct_map_end.0).step_by(direct_page.bytes() as usize) {
        tables.map_directly(Hpa(phys), direct_page, held, nothing_at);
    }
    for page in held.ranges().iter().flat_map(|range| range.clone().step_by(PAGE_BYTES as usize)) {
        let flags = WRITABLE | NO_EXECUTE | WRITE_THROUGH | CACHE_DISABLE;
        tables.map(held_to_virt(Hpa(page)), Hpa(page), PageSize::Size4K, flags);
    }
    for part in parts {
        let flags = match part.access {
            Access::ReadExecute => 0,
            Access::Read => NO_EXECUTE,
            Access::ReadWrite => WRITABLE | NO_EXECUTE,
        };
        for virt in part.range.clone().step_by(PAGE_BYTES as usize) {
            tables.map(virt, image_start + (virt - image.start), PageSize::Size4K, flags);
        }
    }
    for stack in 0..stacks {
        let pages = allocator.alloc_pages(STACK_PAGES)?;
        for page in (0..pages.bytes()).step_by(PAGE_BYTES as usize) {
            let virt = stack_end(stack) - pages.bytes() + page;
            tables.map(virt, pages.phys() + page, PageSize::Size4K, WRITABLE | NO_EXECUTE);
        }
    }
    let start = tables.copy_of_root();
    tables.map_from(start, 0, Hpa(0), PageSize::Size2M, WRITABLE);
    Ok(HostTables { root: tables.base, start_root: Hpa(tables.phys(start)) })
}
