//! The DMAR: the firmware's list of the units that remap the devices' memory accesses (Intel Virtualization Technology for
//! Directed I/O, revision 5.10, November 2025, 8.1 "DMA Remapping Reporting Structure").

use core::ops::Range;

use arrayvec::ArrayVec;

use super::tables::{first, table_length};
use super::{TableError, read_u8, read_u16, sums_to_zero};
use crate::phys::PhysMemory;

/// The most units.
pub const MAX_UNITS: usize = 32;
/// The most ranges that the firmware's own devices access.
pub const MAX_RESERVED: usize = 32;

const PAGE: u64 = 4096;
/// Offset of the width of the machine's addresses, less one.
const HOST_ADDRESS_WIDTH: u64 = 36;
/// Offset of the first structure.
const STRUCTURES: u64 = 48;

/// Types of structures. There are others, which say nothing about where units are.
const REMAPPING_UNIT: u16 = 0;
const RESERVED_MEMORY: u16 = 1;

/// Flag of a unit: it remaps all devices of its segment that no other unit names.
const INCLUDE_PCI_ALL: u8 = 1 << 0;

/// What the firmware says of one unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListedUnit {
    /// The pages of its registers.
    pub registers: Range<u64>,
    /// The PCI segment of its devices.
    pub segment: u16,
    /// Whether it remaps all devices of the segment that no other unit names.
    pub includes_all: bool,
}

/// The table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dmar {
    /// Its address.
    pub table: u64,
    /// The width of the addresses that devices can use.
    pub address_bits: u32,
    /// All units.
    pub units: ArrayVec<ListedUnit, MAX_UNITS>,
    /// Memory that devices access for the firmware.
    pub reserved: ArrayVec<Range<u64>, MAX_RESERVED>,
}

impl Dmar {
    /// The table of the machine with this root pointer; `None` if it has none.
    ///
    /// # Errors
    ///
    /// The table is damaged.
    pub fn find(memory: &impl PhysMemory, rsdp: u64) -> Result<Option<Self>, TableError> {
        first(memory, rsdp, *b"DMAR")?.map(|table| Self::read(memory, table)).transpose()
    }

    fn read(memory: &impl PhysMemory, table: u64) -> Result<Self, TableError> {
        let length = u64::from(table_length(memory, table)?);
        if length < STRUCTURES {
            return Err(TableError::BadEntry(table));
        }
        if !sums_to_zero(memory, table, length) {
            return Err(TableError::BadChecksum(table));
        }
        let address_bits = u32::from(read_u8(memory, table + HOST_ADDRESS_WIDTH)?) + 1;
        let mut dmar = Self { table, address_bits, units: ArrayVec::new(), reserved: ArrayVec::new() };
        let (mut at, end) = (table + STRUCTURES, table + length);
        while at < end {
            let is_whole = end - at >= 4;
            let length = if is_whole { u64::from(read_u16(memory, at + 2)?) } else { 0 };
            if length < 4 || length > end - at {
                return Err(TableError::BadEntry(at));
            }
            dmar.add(memory, at, read_u16(memory, at)?, length)?;
            at += length;
        }
        Ok(dmar)
    }

    /// Adds what the structure at `at` describes.
    fn add(&mut self, memory: &impl PhysMemory, at: u64, kind: u16, length: u64) -> Result<(), TableError> {
        match (kind, length) {
            (REMAPPING_UNIT, 16..) => {
                let start = memory.read_u64(at + 8)?;
                let pages = 1 << (read_u8(memory, at + 5)? & 0xf);
                let end = start.checked_add(pages * PAGE).filter(|_| start != 0 && start.is_multiple_of(PAGE));
                let unit = ListedUnit {
                    registers: start..end.ok_or(TableError::BadEntry(at))?,
                    segment: read_u16(memory, at + 6)?,
                    includes_all: read_u8(memory, at + 4)? & INCLUDE_PCI_ALL != 0,
                };
                self.units.try_push(unit).map_err(|_| TableError::TooMany("units"))
            }
            (RESERVED_MEMORY, 24..) => {
                let (start, last) = (memory.read_u64(at + 8)?, memory.read_u64(at + 16)?);
                let end = last.checked_add(1).filter(|&end| start < end).ok_or(TableError::BadEntry(at))?;
                self.reserved.try_push(start..end).map_err(|_| TableError::TooMany("ranges of reserved memory"))
            }
            (REMAPPING_UNIT | RESERVED_MEMORY, _) => Err(TableError::BadEntry(at)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::fixtures::{RSDP, RSDT, machine_with, seal, table};
    use crate::acpi::tables::each;
    use crate::acpi::{TableError, hide};
    use crate::phys::FakePhys;
    use proptest::prelude::*;
    use std::vec::Vec;

    const DMAR: u64 = 0x3000;
    const OTHERS: [u64; 2] = [0x5000, 0x5100];
    const XSDT: u64 = 0x6000;

    fn unit(flags: u8, size: u8, segment: u16, base: u64) -> Vec<u8> {
        let mut bytes = std::vec![0, 0, 24, 0, flags, size];
        bytes.extend(segment.to_le_bytes());
        bytes.extend(base.to_le_bytes());
        // The scope: one endpoint.
        bytes.extend([1, 8, 0, 0, 0, 0, 2, 0]);
        bytes
    }

    fn reserved(start: u64, last: u64) -> Vec<u8> {
        let mut bytes = std::vec![1, 0, 24, 0, 0, 0, 0, 0];
        bytes.extend(start.to_le_bytes());
        bytes.extend(last.to_le_bytes());
        bytes
    }

    fn machine(structures: &[Vec<u8>]) -> FakePhys {
        let body = [&[38, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &structures.concat()].concat();
        let others = OTHERS.map(|at| (at, table(b"SSDT", 36, &[at as u8])));
        let dmar = table(b"DMAR", 36, &body);
        machine_with(
            &[(DMAR, &dmar), (OTHERS[0], &others[0].1), (OTHERS[1], &others[1].1)],
            &[OTHERS[0], DMAR, OTHERS[1]],
        )
    }

    /// Two units, an unknown structure and a reserved range.
    fn usual() -> FakePhys {
        machine(&[
            unit(0, 0, 0, 0xfed9_0000),
            std::vec![2, 0, 8, 0, 1, 2, 3, 4],
            unit(INCLUDE_PCI_ALL, 1, 0, 0xfed9_2000),
            reserved(0x7000_0000, 0x701f_ffff),
        ])
    }

    #[test]
    fn units_and_reserved_memory_are_found_and_unknown_structures_are_skipped() {
        let units = [
            ListedUnit { registers: 0xfed9_0000..0xfed9_1000, segment: 0, includes_all: false },
            ListedUnit { registers: 0xfed9_2000..0xfed9_4000, segment: 0, includes_all: true },
        ];
        let dmar = Dmar::find(&usual(), RSDP).unwrap().unwrap();
        assert_eq!((&dmar.units[..], &dmar.reserved[..]), (&units[..], &[0x7000_0000..0x7020_0000][..]));
        assert_eq!((dmar.table, dmar.address_bits), (DMAR, 39));
        assert_eq!(Dmar::find(&machine_with(&[], &[]), RSDP), Ok(None));
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        let first = DMAR + STRUCTURES;
        for damaged in [
            std::vec![0, 0, 3, 0],
            std::vec![0, 0, 8, 0, 0, 0, 0, 0],
            std::vec![9, 0, 5, 0],
            std::vec![9, 0],
            unit(1, 0, 0, 0),
            unit(1, 0, 0, 0xfed9_0010),
            unit(1, 1, 0, 0xffff_ffff_ffff_f000),
            reserved(0x2000, 0x1fff),
            reserved(0, u64::MAX),
        ] {
            let found = Dmar::find(&machine(core::slice::from_ref(&damaged)), RSDP);
            assert_eq!(found, Err(TableError::BadEntry(first)), "{damaged:x?}");
        }
        let mut flipped = usual();
        flipped.bytes[first as usize + 8] ^= 0x10;
        assert_eq!(Dmar::find(&flipped, RSDP), Err(TableError::BadChecksum(DMAR)));
        let many = std::vec![unit(1, 0, 0, 0xfed9_0000); MAX_UNITS + 1];
        assert_eq!(Dmar::find(&machine(&many), RSDP), Err(TableError::TooMany("units")));
        assert_eq!(Dmar::find(&machine(&many[1..]), RSDP).unwrap().unwrap().units.len(), MAX_UNITS);
        let mut short = usual();
        short.bytes[DMAR as usize + 4] = 40;
        short.bytes[DMAR as usize + 5] = 0;
        assert_eq!(Dmar::find(&short, RSDP), Err(TableError::BadEntry(DMAR)));
    }

    /// Applies the writes of [`hide`].
    fn hidden(memory: &FakePhys) -> FakePhys {
        let mut after = memory.clone();
        let put = |at: u64, bytes: &[u8]| after.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        hide(memory, RSDP, DMAR, put).unwrap();
        after
    }

    fn named(memory: &FakePhys) -> Vec<u64> {
        let mut tables = Vec::new();
        each(memory, RSDP, |_, table| {
            tables.push(table);
            Ok(())
        })
        .unwrap();
        tables
    }

    fn is_sealed(memory: &FakePhys, table: u64) -> bool {
        sums_to_zero(memory, table, table_length(memory, table).unwrap().into())
    }

    #[test]
    fn the_hidden_table_is_in_neither_root_table_and_the_others_keep_their_order() {
        let mut memory = usual();
        let old = hidden(&memory);
        assert_eq!((named(&old), is_sealed(&old, RSDT)), (OTHERS.to_vec(), true));
        assert_eq!(Dmar::find(&old, RSDP), Ok(None));

        let pointers: Vec<u8> =
            [DMAR, OTHERS[0], OTHERS[1], DMAR].iter().flat_map(|table| table.to_le_bytes()).collect();
        let xsdt = table(b"XSDT", 36, &pointers);
        memory.bytes[XSDT as usize..][..xsdt.len()].copy_from_slice(&xsdt);
        memory.bytes[RSDP as usize + 15] = 2;
        memory.bytes[RSDP as usize + 24..][..8].copy_from_slice(&XSDT.to_le_bytes());
        let new = hidden(&memory);
        assert_eq!((named(&new), is_sealed(&new, XSDT)), (OTHERS.to_vec(), true));
        assert_eq!((table_length(&new, RSDT), is_sealed(&new, RSDT)), (Ok(36 + 8), true));
        assert_eq!(hidden(&new).bytes, new.bytes, "nothing is left to hide");
    }

    proptest! {
        #[test]
        fn no_damaged_table_panics_or_hangs(
            changes in prop::collection::vec((0usize..0xa0, any::<u8>()), 1..8), area in 0usize..3, sealed: bool,
        ) {
            let mut memory = usual();
            let area = [RSDP, RSDT, DMAR][area] as usize;
            for (offset, byte) in changes {
                memory.bytes[area + offset] = byte;
            }
            if sealed {
                let length = u32::from_le_bytes(memory.bytes[DMAR as usize + 4..][..4].try_into().unwrap());
                let end = DMAR as usize + (length as usize).clamp(10, 0x1000);
                seal(&mut memory.bytes[DMAR as usize..end], 9);
            }
            let _ = Dmar::find(&memory, RSDP);
            let _ = hide(&memory, RSDP, DMAR, |_, _| ());
        }
    }
}
