//! Where the host's tables live.

use crate::{Entry, Hpa};

/// Entries in a table.
pub const ENTRIES: u64 = 512;

/// The host's memory for tables.
///
/// Laws: `allocate` returns a page of entries that are not present and that no table points to; `free` takes such a page back. Reads
/// return what was written last.
pub trait TableMemory {
    /// An entry of a table.
    fn read(&self, table: Hpa, index: u64) -> Entry;
    /// Sets an entry, in one store: the processor may be walking the table.
    fn write(&mut self, table: Hpa, index: u64, entry: Entry);
    /// A new table, or `None` when the budget is spent.
    fn allocate(&mut self) -> Option<Hpa>;
    /// Gives a table back.
    fn free(&mut self, table: Hpa);
}

/// Index of an address in a table of a level: 4 is the PML4, 1 a page table.
pub const fn index(address: u64, level: u32) -> u64 {
    address >> (12 + 9 * (level - 1)) & (ENTRIES - 1)
}
