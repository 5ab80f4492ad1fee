//! Paging structures of nested guests that are not in 64-bit mode.

use crate::memory::Page;
use crate::nested_paging;

static DIRECTORY_32: Page = Page::new();
static PDPT_PAE: Page = Page::new();

/// Page directory of 32-bit paging: pages of 4 MiB.
pub fn directory_32() -> u64 {
    DIRECTORY_32.address()
}

/// Page-directory-pointer table of PAE paging.
pub fn pdpt_pae() -> u64 {
    PDPT_PAE.address()
}

/// The entries of [`pdpt_pae`]: the page directories of 64-bit mode serve PAE paging as well.
pub fn pdptes() -> [u64; 4] {
    core::array::from_fn(|number| (nested_paging::first_page_directory() + number as u64 * 4096) | 1)
}

/// Writes the tables.
pub fn init() {
    /// Present, writable, user, accessed, dirty, large.
    const LARGE_PAGE: u64 = 0xe7;
    for pair in 0..512 {
        let first = pair << 23 | LARGE_PAGE;
        DIRECTORY_32.set(pair as usize, first | (first | 1 << 22) << 32);
    }
    for (index, entry) in pdptes().into_iter().enumerate() {
        PDPT_PAE.set(index, entry);
    }
}
