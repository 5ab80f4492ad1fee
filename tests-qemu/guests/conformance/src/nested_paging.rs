//! EPT12 and the nested guest's page tables.
//!
//! ```text
//!   nested guest-physical   0 .. 1 GiB            identity, 2 MiB pages
//!                           WINDOW .. + 2 MiB     one page table; page n is page n of PAGES
//!                           3 .. 4 GiB            identity, 2 MiB pages: the local APIC
//!   nested linear           0 .. 4 GiB            identity, supervisor and user
//!                           LINEAR .. + 2 MiB     one page table; page n is WINDOW + n pages
//! ```

use crate::memory::{Page, Table, poke};

/// Nested guest-physical address of the pages with an EPT entry each.
pub const WINDOW: u64 = 1 << 30;
/// Linear address of the same pages through a page table of their own.
pub const LINEAR: u64 = 5 << 30;
/// Pages of the window.
pub const WINDOW_PAGES: usize = 8;

/// Read, write, execute, write-back.
pub const LEAF: u64 = 7 | 6 << 3;
const TABLE: u64 = 7;
const LARGE: u64 = 1 << 7;
const GUEST_TABLE: u64 = 7;

/// EPT PML4 table, PDPT, the two page directories, the page table.
pub static PML4: Page = Page::new();
/// EPT page-directory-pointer table.
pub static PDPT: Page = Page::new();
static LOW_PD: Page = Page::new();
static HIGH_PD: Page = Page::new();
/// EPT page directory of the window.
pub static WINDOW_PD: Page = Page::new();
/// EPT page table of the window.
pub static WINDOW_PT: Page = Page::new();
/// The pages that the window maps.
pub static PAGES: Table<{ 512 * WINDOW_PAGES }> = Table::new();

/// Physical address of unused memory, for a page of 2 MiB.
pub const LARGE_PAGE: u64 = 256 << 20;

static GUEST_PML4: Page = Page::new();
static GUEST_PDPT: Page = Page::new();
static GUEST_PDS: Table<2048> = Table::new();
static GUEST_LINEAR_PD: Page = Page::new();
/// The guest's page table of [`LINEAR`].
pub static GUEST_PT: Page = Page::new();

/// CR3 of the nested guest.
pub fn guest_cr3() -> u64 {
    GUEST_PML4.address()
}

/// Writes all tables; returns the EPTP: write-back, four levels, no accessed and dirty flags.
pub fn reset() -> u64 {
    if GUEST_PML4.get(0) == 0 {
        large_pages();
    }
    PML4.set(0, PDPT.address() | TABLE);
    PDPT.set(0, LOW_PD.address() | TABLE);
    PDPT.set(1, WINDOW_PD.address() | TABLE);
    PDPT.set(2, 0);
    PDPT.set(3, HIGH_PD.address() | TABLE);
    WINDOW_PD.set(0, WINDOW_PT.address() | TABLE);
    WINDOW_PD.set(1, 0);
    GUEST_PML4.set(0, GUEST_PDPT.address() | GUEST_TABLE);
    GUEST_PDPT.set(5, GUEST_LINEAR_PD.address() | GUEST_TABLE);
    GUEST_LINEAR_PD.set(0, GUEST_PT.address() | GUEST_TABLE);
    for page in 0..WINDOW_PAGES {
        WINDOW_PT.set(page, (PAGES.address() + page as u64 * 4096) | LEAF);
        GUEST_PT.set(page, (WINDOW + page as u64 * 4096) | GUEST_TABLE);
    }
    eptp()
}

/// The EPTP without accessed and dirty flags.
pub fn eptp() -> u64 {
    const WRITE_BACK: u64 = 6;
    const FOUR_LEVELS: u64 = 3 << 3;
    PML4.address() | WRITE_BACK | FOUR_LEVELS
}

/// Clears the accessed and dirty flags of EPT12.
pub fn clear_accessed_and_dirty() {
    const FLAGS: u64 = 3 << 8;
    for table in [&PML4, &PDPT, &LOW_PD, &HIGH_PD, &WINDOW_PD, &WINDOW_PT] {
        for index in 0..512 {
            table.set(index, table.get(index) & !FLAGS);
        }
    }
}

/// Writes the tables that no case changes.
fn large_pages() {
    for index in 0..512 {
        LOW_PD.set(index, (index as u64) << 21 | LARGE | LEAF);
        HIGH_PD.set(index, 3 << 30 | (index as u64) << 21 | LARGE | 7);
    }
    for index in 0..4 {
        GUEST_PDPT.set(index, (GUEST_PDS.address() + index as u64 * 4096) | GUEST_TABLE);
    }
    for index in 0..2048 {
        GUEST_PDS.set(index, (index as u64) << 21 | LARGE | GUEST_TABLE);
    }
    answer_calls();
}

/// The instruction, little-endian.
pub const VMCALL: u64 = 0xc1010f;

/// Puts VMCALL at the start of every page of the window, so that a call to a page exits, and every kind of access can
/// be tried.
pub fn answer_calls() {
    for page in 0..WINDOW_PAGES {
        PAGES.set(page * 512, VMCALL);
    }
}

/// Puts VMCALL and the page's number into the first pages of [`LARGE_PAGE`].
pub fn fill_large_page() {
    for page in 0..WINDOW_PAGES as u64 {
        for (word, value) in [(0, VMCALL), (1, 0), (2, 0x100 + page)] {
            poke(LARGE_PAGE + page * 4096 + word * 8, value);
        }
    }
}

/// Sets the guest's page table of [`LINEAR`], for a case that has its own.
pub fn guest_linear_table(address: u64) {
    GUEST_LINEAR_PD.set(0, address | GUEST_TABLE);
}

/// Sets an entry of the guest's PML4 table. Entry 0 belongs to the identity map.
pub fn set_guest_pml4(index: usize, entry: u64) {
    GUEST_PML4.set(index, entry);
}

/// Undoes a group's changes of tables that [`reset`] leaves alone.
pub fn reset_guest() {
    PAGES.fill(0);
    answer_calls();
    for index in 1..512 {
        GUEST_PML4.set(index, 0);
    }
}

/// Sets bit 10 in the entries above the code and the window, which permits fetches from user-mode linear addresses.
/// Without mode-based execute control the bit is ignored. Leaves of the window do not have the bit.
pub fn allow_user_execution() {
    const USER_EXECUTE: u64 = 1 << 10;
    for index in 0..512 {
        LOW_PD.set(index, LOW_PD.get(index) | USER_EXECUTE);
    }
    for (table, index) in [(&PML4, 0), (&PDPT, 0), (&PDPT, 1), (&WINDOW_PD, 0)] {
        table.set(index, table.get(index) | USER_EXECUTE);
    }
}

/// EPT page directory of the first GiB, for other EPTs.
pub fn low_directory() -> u64 {
    LOW_PD.address()
}

/// The page directory of the guest's first GiB.
pub fn first_page_directory() -> u64 {
    GUEST_PDS.address()
}

/// Sets the accessed and dirty flags in all tables but those of the window, whose flags then are the only ones that the
/// processor changes.
pub fn set_all_flags() {
    const EPT: u64 = 3 << 8;
    const GUEST: u64 = 3 << 5;
    let set = |table: &Page, flags| {
        for index in (0..512).filter(|&index| table.get(index) != 0) {
            table.set(index, table.get(index) | flags);
        }
    };
    [&PML4, &PDPT, &LOW_PD, &HIGH_PD, &WINDOW_PD].iter().for_each(|table| set(table, EPT));
    [&GUEST_PML4, &GUEST_PDPT, &GUEST_LINEAR_PD].iter().for_each(|table| set(table, GUEST));
    for index in 0..2048 {
        GUEST_PDS.set(index, GUEST_PDS.get(index) | GUEST);
    }
}
