//! The memory of the host's tables.

use crate::addr::Address;
use crate::{Entry, Hpa};

/// Entries in a table.
pub const ENTRIES: u64 = 512;

/// The host's memory for tables.
///
/// Laws: `allocate` returns a page of entries that are not present and that no table points to; `free` takes such a
/// page back. Reads return what was written last.
pub trait TableMemory {
    /// An entry of a table.
    fn read(&self, table: Hpa, index: u64) -> Entry;
    /// Sets an entry, in one store: the processor may be walking the table.
    fn write(&mut self, table: Hpa, index: u64, entry: Entry);
    /// Index of the first entry of a table, from `from` on, that is not zero; [`ENTRIES`] if there is none. Tables are
    /// mostly empty, so an implementation should test several entries at once if it can.
    fn next_used(&self, table: Hpa, from: u64) -> u64 {
        (from..ENTRIES).find(|&at| self.read(table, at) != Entry::NOT_PRESENT).unwrap_or(ENTRIES)
    }
    /// A new table, or `None` when the budget is spent.
    fn allocate(&mut self) -> Option<Hpa>;
    /// Gives a table back.
    fn free(&mut self, table: Hpa);
}

/// Index of an address in a table of a level: 4 is the PML4, 1 a page table.
#[inline]
pub fn index(address: impl Address, level: u32) -> u64 {
    address.raw() >> (12 + 9 * (level - 1)) & (ENTRIES - 1)
}

/// Calls `act` for each entry of a table that is not zero. Each entry is read when its turn comes, so `act` may write
/// entries.
pub(crate) fn for_each_used<T: TableMemory>(memory: &mut T, table: Hpa, mut act: impl FnMut(&mut T, u64, Entry)) {
    let mut at = memory.next_used(table, 0);
    while at < ENTRIES {
        let entry = memory.read(table, at);
        act(memory, at, entry);
        at = memory.next_used(table, at + 1);
    }
}
