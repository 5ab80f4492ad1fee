//! MSR areas, and the MSRs of programs.

use crate::cpu::{rdmsr, wrmsr};
use crate::memory::{MSR_AREAS, Page};
use crate::nested_paging;
use crate::random::Random;

/// Entries of each area.
pub const ENTRIES: usize = 4;

/// MSRs that a nested guest, or an MSR area, may load with any of their values: no exit depends on them.
pub const FREE_MSRS: [u32; 7] = [0xc000_0081, 0xc000_0082, 0xc000_0084, 0xc000_0102, 0xc000_0103, 0x175, 0x176];

/// MSRs that a nested guest reads. Not those that count time, and not the capabilities, which differ by what l1hv hides.
pub const READABLE: [u32; 14] = [
    0xc000_0080,
    0xc000_0081,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x175,
    0x277,
    0x1d9,
    0x1b,
    0x3a,
    0x17a,
];

/// MSRs that the host holds, or that are its copies: memory types, the APIC's base, some that do not exist.
pub const OF_HYPERVISOR: [u32; 8] = [0xfe, 0x2ff, 0x200, 0x201, 0x250, 0x26f, 0x570, 0x4000_0000];

/// MSRs that a nested guest writes.
pub const WRITABLE: [u32; 14] = [
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x175,
    0x176,
    0x277,
    0x1d9,
    0x485,
];

/// MSRs whose values are observed at the end of a program, with the value that each program begins with.
pub const OBSERVED: [(u32, u64); 13] = [
    (0xc000_0080, 0xd00),
    (0xc000_0081, 0),
    (0xc000_0082, 0),
    (0xc000_0084, 0),
    (0xc000_0100, 0),
    (0xc000_0101, 0),
    (0xc000_0102, 0),
    (0xc000_0103, 0),
    (0x174, 0),
    (0x175, 0),
    (0x176, 0),
    (0x277, 0x0007_0406_0007_0406),
    (0x1d9, 0),
];

/// Values that MSRs take, or refuse.
pub const VALUES: [u64; 8] =
    [0, 1, 0xd01, 0x0007_0406_0007_0406, 0x7fff_ffff_ffff, 1 << 47, 0xffff_8000_0000_0000, 0x1234_5678];

/// The lists in `MSR_AREAS`: stored by exits, loaded by exits, loaded by entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Area {
    /// VM-exit MSR-store area.
    ExitStore,
    /// VM-exit MSR-load area.
    ExitLoad,
    /// VM-entry MSR-load area.
    EntryLoad,
}

/// An entry of an area: MSR and value.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The MSR, with whatever is in the reserved half of the quadword.
    pub msr: u64,
    /// Its value.
    pub value: u64,
}

impl Area {
    /// A random entry. An exit that cannot load or store an MSR ends the machine, so that only entries may fail.
    pub fn entry(self, random: &mut Random) -> Entry {
        let msr = random.pick(&FREE_MSRS).into();
        let value = random.pick(&[0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, 0x1234]);
        if self != Self::EntryLoad || random.one_in(2) {
            let has_32_bits = matches!(msr, 0xc000_0084 | 0xc000_0103);
            return Entry { msr, value: if has_32_bits { value & 0xffff_ffff } else { value } };
        }
        let wrong = [0xc000_0100, 0xc000_0101, 0x277, 0x1d9, 0xc000_0080, 0x8 << 32 | msr, 0x802, msr, 0x480];
        Entry { msr: random.pick(&wrong), value: random.pick(&VALUES) }
    }

    /// Writes an entry.
    pub fn set(self, index: usize, Entry { msr, value }: Entry) {
        let first = self as usize * 0x80 + index * 2;
        MSR_AREAS.set(first, msr);
        MSR_AREAS.set(first + 1, value);
    }
}

static EPTP_LIST: Page = Page::new();

static APIC_ACCESSES: Page = Page::new();

/// A page that is nothing but the APIC-access page.
pub fn apic_access_page() -> u64 {
    APIC_ACCESSES.address()
}

/// The list of EPTPs: the first is valid, the second with accessed and dirty flags, the third no EPTP.
pub fn eptp_list() -> u64 {
    EPTP_LIST.address()
}

/// Writes valid entries everywhere.
pub fn init() {
    for area in [Area::ExitStore, Area::ExitLoad, Area::EntryLoad] {
        for (index, msr) in FREE_MSRS.into_iter().take(ENTRIES).enumerate() {
            area.set(index, Entry { msr: msr.into(), value: 0x1000 + index as u64 });
        }
    }
    EPTP_LIST.set(0, nested_paging::eptp());
    EPTP_LIST.set(1, nested_paging::eptp() | 1 << 6);
    EPTP_LIST.set(2, nested_paging::eptp() | 1 << 45);
}

/// Gives the observed MSRs the values that programs begin with. Passes each value before to `observe`.
pub fn restore(mut observe: impl FnMut(u32, u64)) {
    for (msr, value) in OBSERVED {
        let old = rdmsr(msr).unwrap_or(u64::MAX);
        observe(msr, old);
        if old != value {
            let _ = wrmsr(msr, value);
        }
    }
}
