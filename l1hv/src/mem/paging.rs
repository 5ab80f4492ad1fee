//! The host's own page tables.
//!
//! ```text
//!   0xFFFF_8000_0000_0000 + p   all of physical memory: supervisor, writable, never executable; 1 GiB or 2 MiB pages
//!   0xFFFF_FF00_0000_0000       stacks of the processors but the first, each above a page that is not mapped
//!   0xFFFF_FFFF_8010_0000       the image, backed by the host's region: text read+execute, constants read, data read+write
//! ```
//!
//! Nothing else is mapped: a null pointer, a guest's pointer or a jump into guest memory faults. SDM Vol. 3A, 4.5.4
//! "Linear-Address Translation with 4-Level Paging and 5-Level Paging".

use core::ops::Range;

use ept::{Hpa, PageSize};

use super::alloc::OutOfHostMemory;
use super::{HostPages, PAGE_BYTES, PhysAllocator};
use crate::arch::phys::DIRECT_MAP_BASE;
use crate::arch::relocate::{Access, ImagePart};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
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

/// The most tables that [`build_host_tables`] needs.
fn tables_needed(direct_map_end: Hpa, direct_page: PageSize, image_bytes: u64, stacks: u64) -> u64 {
    let pdpts = direct_map_end.0.div_ceil(TOP_ENTRY_BYTES);
    let pds = if direct_page == PageSize::Size1G { 0 } else { direct_map_end.0.div_ceil(PageSize::Size1G.bytes()) };
    // The image: a PDPT, a page directory, and page tables of 2 MiB each, the first and the last of them in part.
    let image = 2 + image_bytes / PageSize::Size2M.bytes() + 2;
    // The other top table, and the tables above one page of 2 MiB.
    let start = 3;
    // The stacks: as for the image.
    let stacks = 2 + stacks * STACK_SLOT_BYTES / PageSize::Size2M.bytes() + 2;
    1 + pdpts + pds + image + start + stacks
}

/// The roots of the host's tables.
#[derive(Clone, Copy, Debug)]
pub struct HostTables {
    /// The root that the host runs on.
    pub root: Hpa,
    /// The root that a processor starts on: the same mappings, and the low 2 MiB mapped to themselves.
    pub start_root: Hpa,
}

/// Builds the host's tables: the direct map up to `direct_map_end` (a multiple of 1 GiB), `parts` of the image, whose
/// first part is backed by `image_start` and the others by what follows it at the same distances, and so many new
/// `stacks`.
///
/// # Errors
///
/// The region is too small for the tables.
pub fn build_host_tables(
    allocator: &mut PhysAllocator,
    direct_map_end: Hpa,
    direct_page: PageSize,
    image: &Range<u64>,
    image_start: Hpa,
    parts: &[ImagePart],
    stacks: usize,
) -> Result<HostTables, OutOfHostMemory> {
    let count = tables_needed(direct_map_end, direct_page, image.end - image.start, stacks as u64);
    let mut tables = Tables::new(allocator.alloc_pages(count)?);
    for phys in (0..direct_map_end.0).step_by(direct_page.bytes() as usize) {
        tables.map(DIRECT_MAP_BASE + phys, Hpa(phys), direct_page, WRITABLE | NO_EXECUTE);
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
