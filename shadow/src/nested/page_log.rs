//! Page-modification logging of EPT12 (SDM 29.3.6 "Page-Modification Logging").
//!
//! The host sets EPT12's accessed and dirty flags, so the host writes the log. vmcs02 does not use PML: a page is
//! writable in EPT02 only once it is dirty in EPT12, so the processor would log it after EPT12's dirty flag is set, and
//! a drop of EPT02 in between would lose the log entry.

use ept::walk::GuestTables;
use ept::{Gpa, NestedGpa, PageSize};

use super::ept12_memory::Ept12Memory;
use super::machine::WatchedMemory;
use crate::fields::PML_INDEX;
use crate::hw::VmcsAccess;

/// Entries of the log.
const ENTRIES: u16 = 512;

/// EPT12 for one access of a nested guest whose dirty pages are logged.
pub struct Logged<'a, Memory, Vmcs> {
    memory: &'a Memory,
    vmcs02: &'a mut Vmcs,
    area: Gpa,
    address: NestedGpa,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The walk has not had to set a flag yet.
    Unasked,
    /// The log has room for this access.
    Room,
    /// The log has no room, and no flag is set.
    Full,
}

impl<'a, Memory: WatchedMemory, Vmcs: VmcsAccess> Logged<'a, Memory, Vmcs> {
    /// EPT12 for an access to `address`. The log is at `area`, its index in vmcs02.
    pub fn new(memory: &'a Memory, vmcs02: &'a mut Vmcs, area: Gpa, address: NestedGpa) -> Self {
        Self { memory, vmcs02, area, address, state: State::Unasked }
    }

    /// Whether the walk had to set a flag and the log was full.
    pub fn is_full(&self) -> bool {
        self.state == State::Full
    }

    fn log(&mut self) {
        let index = self.vmcs02.read(PML_INDEX);
        let page = self.address.0 & !(PageSize::Size4K.bytes() - 1);
        self.memory.write_u64(self.area + u64::from(index) * 8, page);
        self.vmcs02.write(PML_INDEX, index.wrapping_sub(1));
    }
}

impl<Memory: WatchedMemory, Vmcs: VmcsAccess> GuestTables for Logged<'_, Memory, Vmcs> {
    fn read(&self, entry: Gpa) -> u64 {
        Ept12Memory(self.memory).read(entry)
    }

    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
        if self.state == State::Unasked {
            self.state = if self.vmcs02.read(PML_INDEX) < ENTRIES { State::Room } else { State::Full };
        }
        if self.state == State::Full || !Ept12Memory(self.memory).set_flags(entry, seen, flags) {
            return false;
        }
        if !seen & flags & ept::entry::DIRTY != 0 {
            self.log();
        }
        true
    }
}
