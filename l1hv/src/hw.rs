//! The seams of `shadow` and `ept`, on the real machine.

use ept::table::TableMemory;
use ept::walk::GuestTables;
use ept::{Entry, Gpa, Hpa};
use shadow::hw::GuestMemory;

use crate::mem::{GuestRam, HostPages, HostRegion, PAGE_BYTES};
use crate::watch::Watches;

/// The guest hypervisor's physical memory. EPT01 is an identity map with a hole, and behind the hole is one scratch page.
#[derive(Debug)]
pub struct GuestPhysical {
    ram: GuestRam,
    hole: HostRegion,
    scratch: Hpa,
    /// Pages that the host has merged as MSR bitmaps.
    pub watches: Watches,
    /// Those that it has merged as VMREAD bitmaps, and as VMWRITE bitmaps.
    pub field_watches: [Watches; 2],
}

impl GuestPhysical {
    /// `scratch` is what the guest hypervisor finds wherever it looks into `hole`.
    pub fn new(ram: GuestRam, hole: HostRegion, scratch: Hpa) -> Self {
        Self { ram, hole, scratch, watches: Watches::default(), field_watches: Default::default() }
    }

    /// The watched pages, whatever they are merged as.
    pub fn all_watches(&self) -> [&Watches; 3] {
        let [vmread, vmwrite] = &self.field_watches;
        [&self.watches, vmread, vmwrite]
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
        for watches in self.all_watches() {
            watches.note_write(to, from.len());
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

/// The tables of EPT01 and EPT02: a pool of fixed size in the host's region.
#[derive(Debug)]
pub struct TablePool {
    base: Hpa,
    tables: &'static mut [[u64; 512]],
    /// Tables from this one on were never handed out.
    fresh: usize,
    /// The first table of the list of those given back; its first word is the number of the next.
    free: Option<usize>,
    /// Tables handed out and not given back.
    in_use: usize,
    /// The most that there were of these.
    most_in_use: usize,
}

const END_OF_LIST: u64 = u64::MAX;

impl TablePool {
    /// All of `pages` as tables.
    pub fn new(pages: HostPages) -> Self {
        Self { base: pages.phys(), tables: pages.into_tables(), fresh: 0, free: None, in_use: 0, most_in_use: 0 }
    }

    /// How many tables there are: the budget.
    pub const fn budget(&self) -> usize {
        self.tables.len()
    }

    /// How many are in use.
    pub const fn in_use(&self) -> usize {
        self.in_use
    }

    /// The most that were ever in use.
    pub const fn most_in_use(&self) -> usize {
        self.most_in_use
    }

    fn number(&self, table: Hpa) -> usize {
        ((table.0 - self.base.0) / PAGE_BYTES) as usize
    }
}

impl TableMemory for TablePool {
    #[inline]
    fn read(&self, table: Hpa, index: u64) -> Entry {
        Entry(self.tables[self.number(table)][index as usize])
    }

    #[inline]
    fn write(&mut self, table: Hpa, index: u64, entry: Entry) {
        let number = self.number(table);
        self.tables[number][index as usize] = entry.0;
    }

    fn allocate(&mut self) -> Option<Hpa> {
        let number = match self.free {
            Some(number) => {
                let next = self.tables[number][0];
                self.free = (next != END_OF_LIST).then_some(next as usize);
                self.tables[number].fill(0);
                number
            }
            None if self.fresh < self.tables.len() => {
                self.fresh += 1;
                self.fresh - 1
            }
            None => return None,
        };
        self.in_use += 1;
        self.most_in_use = self.most_in_use.max(self.in_use);
        Some(self.base + number as u64 * PAGE_BYTES)
    }

    fn free(&mut self, table: Hpa) {
        let number = self.number(table);
        self.in_use -= 1;
        self.tables[number][0] = self.free.map_or(END_OF_LIST, |next| next as u64);
        self.free = Some(number);
    }
}
