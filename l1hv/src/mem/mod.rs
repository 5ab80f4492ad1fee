//! The host's memory: its region, its page tables, and its view of the guest's memory.

mod alloc;
pub mod heap;
mod held;
mod paging;

pub use crate::arch::phys::{GuestRam, phys_to_virt};
pub use alloc::{HostPages, OutOfHostMemory, PhysAllocator};
pub use held::HeldPages;
pub use paging::{HostMap, HostTables, build_host_tables, held_to_virt, stack_end};

use core::ops::Range;

use ept::Hpa;

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;

/// The host's physical memory, which EPT01 does not map: one piece, aligned to 2 MiB at both ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRegion {
    /// First byte.
    pub start: Hpa,
    /// The byte after the last.
    pub end: Hpa,
}

impl HostRegion {
    /// The addresses as a range.
    pub const fn range(&self) -> Range<Hpa> {
        self.start..self.end
    }
}
