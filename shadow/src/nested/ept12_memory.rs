//! EPT12 as page walks read it.

use ept::Gpa;
use ept::walk::GuestTables;

use crate::hw::GuestMemory;

/// EPT12, read through EPT01.
pub struct Ept12Memory<'a, Memory>(pub &'a Memory);

impl<Memory: GuestMemory> GuestTables for Ept12Memory<'_, Memory> {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.read_u64(entry)
    }

    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
        self.0.compare_exchange_u64(entry, seen, seen | flags)
    }
}

/// EPT12 for a walk without an access of the nested guest. Such a walk sets no flags: it stops at an entry whose flags
/// are still clear.
pub struct Ept12Unflagged<'a, Memory>(pub Ept12Memory<'a, Memory>);

impl<Memory: GuestMemory> GuestTables for Ept12Unflagged<'_, Memory> {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.read(entry)
    }

    fn set_flags(&mut self, _: Gpa, _: u64, _: u64) -> bool {
        false
    }
}
