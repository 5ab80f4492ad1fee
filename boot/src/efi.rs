//! EFI firmware, as it is after its boot services have ended: the system table, from which ACPI's tables are found.
//!
//! Reference: UEFI Specification 2.10, 4.3 "EFI System Table" and 4.6 "EFI Configuration Table & Properties Table".

use crate::phys::PhysMemory;

/// "IBI SYST".
const SIGNATURE: u64 = 0x5453_5953_2049_4249;

/// Offsets in the system table of 64-bit firmware.
mod offset {
    pub const TABLE_COUNT: u64 = 104;
    pub const TABLES: u64 = 112;
}

/// A table's name, then its address.
const ENTRY_BYTES: u64 = 24;

/// The most tables: firmware has about ten.
const MOST_TABLES: u64 = 256;

/// The root pointers of ACPI 2.0 and of ACPI 1.0, by name: the newer one has the 64-bit tables.
const ACPI_2: [u8; 16] = *b"\x71\xe8\x68\x88\xf1\xe4\xd3\x11\xbc\x22\x00\x80\xc7\x3c\x88\x81";
const ACPI_1: [u8; 16] = *b"\x30\x2d\x9d\xeb\x88\x2d\xd3\x11\x9a\x16\x00\x90\x27\x3f\xc1\x4d";

/// The address of ACPI's root pointer, if the system table at `system_table` names one.
pub fn acpi_rsdp(memory: &impl PhysMemory, system_table: u64) -> Option<u64> {
    if memory.read_u64(system_table).ok()? != SIGNATURE {
        return None;
    }
    let count = memory.read_u64(system_table.checked_add(offset::TABLE_COUNT)?).ok()?.min(MOST_TABLES);
    let tables = memory.read_u64(system_table.checked_add(offset::TABLES)?).ok()?;
    let find = |name: [u8; 16]| {
        (0..count).find_map(|number| {
            let entry = tables.checked_add(number * ENTRY_BYTES)?;
            let mut found = [0; 16];
            memory.read(entry, &mut found).ok()?;
            (found == name).then(|| memory.read_u64(entry + 16).ok()).flatten()
        })
    };
    find(ACPI_2).or_else(|| find(ACPI_1))
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::{ACPI_1, ACPI_2, SIGNATURE, offset};
    use std::vec;
    use std::vec::Vec;

    /// A system table for the address `at`, with the tables behind it: another, ACPI 1.0 and ACPI 2.0 at `rsdp`.
    pub fn system_table(at: u64, rsdp: u64) -> Vec<u8> {
        const TABLES: usize = 120;
        let mut bytes = vec![0; TABLES];
        let mut put = |offset: u64, value: u64| {
            bytes[offset as usize..offset as usize + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(0, SIGNATURE);
        put(offset::TABLE_COUNT, 3);
        put(offset::TABLES, at + TABLES as u64);
        for (name, address) in [([7; 16], 0x1000), (ACPI_1, 0x2000), (ACPI_2, rsdp)] {
            bytes.extend(name);
            bytes.extend(u64::to_le_bytes(address));
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phys::FakePhys;

    const AT: u64 = 0x7f00_0018;

    fn find(change: impl FnOnce(&mut [u8])) -> Option<u64> {
        let mut bytes = fixtures::system_table(AT, 0x7e00_0014);
        change(&mut bytes);
        acpi_rsdp(&FakePhys { base: AT, bytes }, AT)
    }

    #[test]
    fn the_newer_root_pointer_is_preferred_to_the_older_one() {
        assert_eq!(find(|_| ()), Some(0x7e00_0014));
        assert_eq!(find(|table| table[120 + 2 * 24] ^= 1), Some(0x2000));
    }

    #[test]
    fn a_table_that_is_none_or_ends_early_has_no_root_pointer() {
        assert_eq!(find(|table| table[0] ^= 1), None);
        assert_eq!(find(|table| table[104..112].fill(0)), None);
        assert_eq!(find(|table| table[112..120].fill(0xff)), None);
        assert_eq!(acpi_rsdp(&FakePhys { base: AT, bytes: std::vec![0; 8] }, u64::MAX - 4), None);
    }
}
