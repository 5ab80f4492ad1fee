//! The seams of `shadow` and `ept`, on the real machine.

use ept::walk::GuestTables;
use ept::{Gpa, Hpa, PageSize};
use shadow::hw::GuestMemory;

use crate::ept01::Ept01;
use crate::mem::{GuestRam, HostRegion, PAGE_BYTES};
use crate::watch::{self, WatchedPages, Watches};

/// The guest hypervisor's physical memory. EPT01 is an identity map with a hole, and behind the hole is one scratch page.
#[derive(Debug)]
pub struct GuestPhysical {
    ram: GuestRam,
    hole: HostRegion,
    scratch: Hpa,
    ept01: &'static Ept01,
    /// Pages that the host has merged as MSR bitmaps.
    pub watches: Watches,
    /// Those that it has merged as VMREAD bitmaps, and as VMWRITE bitmaps.
    pub field_watches: [Watches; 2],
}

impl GuestPhysical {
    /// `scratch` is what the guest hypervisor finds wherever it looks into `hole`; `watched` is where the pages that this processor
    /// merges are noted.
    pub const fn new(
        ram: GuestRam,
        hole: HostRegion,
        scratch: Hpa,
        ept01: &'static Ept01,
        [msr, vmread, vmwrite]: &'static [WatchedPages; WatchedPages::KINDS],
    ) -> Self {
        let field_watches = [Watches::new(vmread), Watches::new(vmwrite)];
        Self { ram, hole, scratch, ept01, watches: Watches::new(msr), field_watches }
    }

    /// Lets everybody write to the page of an address again: somebody is about to. Nothing happens if it is not watched.
    pub fn unwatch(&self, address: Gpa) {
        if self.ept01.is_protected(address) {
            let page = address.align_down(PageSize::Size4K);
            let writer = self.ept01.writer();
            watch::strike(page);
            writer.permit_writes(page);
        }
    }

    /// Whether an address is the host's.
    pub fn is_host(&self, address: Gpa) -> bool {
        self.hole.range().contains(&Hpa(address.0))
    }
}

impl GuestMemory for GuestPhysical {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        self.ram.read(Hpa(from.0), to);
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        self.ram.write(Hpa(to.0), from);
        // What the host writes does not meet EPT01.
        let end = to.0.saturating_add(from.len() as u64);
        for page in (to.align_down(PageSize::Size4K).0..end).step_by(PAGE_BYTES as usize) {
            self.unwatch(Gpa(page));
        }
    }

    fn translate(&self, address: Gpa) -> Hpa {
        if self.is_host(address) { self.scratch + address.0 % PAGE_BYTES } else { Hpa(address.0) }
    }

    fn read_u64(&self, from: Gpa) -> u64 {
        if from.0.is_multiple_of(8) {
            return self.ram.read_u64(Hpa(from.0));
        }
        let mut bytes = [0; 8];
        self.ram.read(Hpa(from.0), &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// EPT12, read through EPT01.
pub struct Ept12Memory<'a>(pub &'a GuestPhysical);

impl GuestTables for Ept12Memory<'_> {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.read_u64(entry)
    }

    fn set_flags(&mut self, entry: Gpa, seen: u64, flags: u64) -> bool {
        self.0.ram.compare_exchange_u64(Hpa(entry.0), seen, seen | flags)
    }
}

/// EPT12 for a walk that no access of the nested guest has asked for: it finds no entry whose flags are still to be set.
pub struct Ept12Unflagged<'a>(pub Ept12Memory<'a>);

impl GuestTables for Ept12Unflagged<'_> {
    fn read(&self, entry: Gpa) -> u64 {
        self.0.read(entry)
    }

    fn set_flags(&mut self, _: Gpa, _: u64, _: u64) -> bool {
        false
    }
}
