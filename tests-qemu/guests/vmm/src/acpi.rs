//! The firmware's description of a machine with several processors: ACPI tables.
//!
//! Reference: ACPI Specification 6.5, 5.2 "ACPI System Description Tables".
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT (empty)
//!                -> MADT: local APICs, I/O APIC
//! ```

use anyhow::Result;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// An address where an operating system looks for the RSDP.
const RSDP: u64 = 0xe_0000;
const TABLES: u64 = RSDP + 0x40;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// Flag: the machine also has the two 8259s.
const PCAT_COMPAT: u32 = 1;
const ENABLED: u32 = 1;
const ALL_PROCESSORS: u8 = 0xff;

/// Types of MADT entries.
const PROCESSOR_LOCAL_APIC: u8 = 0;
const IO_APIC_ENTRY: u8 = 1;
const LOCAL_APIC_NMI: u8 = 4;

/// The I/O ports of power management. The VMM does not have them, so reads give ones.
const PM1_EVENT: u32 = 0x600;
const PM1_CONTROL: u32 = 0x604;
const SCI: u16 = 9;

/// WBINVD and C1 work; no power button, no sleep button, no RTC alarm; a reset register.
const FADT_FLAGS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10;
/// Devices of the ISA bus and an 8042, but no VGA.
const BOOT_ARCHITECTURE: u16 = 0b111;

/// Writes the tables of a machine with `processors`, whose APIC IDs count from 0, and with KVM's interrupt controllers.
/// Writing `reset_value` to `reset_port` resets it.
pub fn write(memory: &GuestMemoryMmap, processors: u8, (reset_port, reset_value): (u16, u8)) -> Result<()> {
    let mut next = TABLES;
    let mut put = |table: Vec<u8>| -> Result<u64> {
        let address = next;
        memory.write_slice(&table, GuestAddress(address))?;
        next = (address + table.len() as u64).next_multiple_of(16);
        Ok(address)
    };
    let dsdt = put(table(b"DSDT", 2, &[]))?;
    let fadt = put(fadt(dsdt, reset_port, reset_value))?;
    let madt = put(madt(processors))?;
    let xsdt = put(table(b"XSDT", 1, &[fadt.to_le_bytes(), madt.to_le_bytes()].concat()))?;
    Ok(memory.write_slice(&rsdp(xsdt), GuestAddress(RSDP))?)
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut rsdp = b"RSD PTR \0L1HV  \x02\0\0\0\0".to_vec();
    rsdp[8] = checksum(&rsdp);
    rsdp.extend(36_u32.to_le_bytes());
    rsdp.extend(xsdt.to_le_bytes());
    rsdp.extend([0; 4]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

fn fadt(dsdt: u64, reset_port: u16, reset_value: u8) -> Vec<u8> {
    const LENGTH: usize = 276;
    const HEADER: usize = 36;
    let mut body = vec![0; LENGTH - HEADER];
    // Offsets are those of the whole table.
    let mut put = |offset: usize, bytes: &[u8]| body[offset - HEADER..][..bytes.len()].copy_from_slice(bytes);
    put(46, &SCI.to_le_bytes());
    put(56, &PM1_EVENT.to_le_bytes());
    put(64, &PM1_CONTROL.to_le_bytes());
    // Lengths of the event and of the control block.
    put(88, &[4, 2]);
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FADT_FLAGS.to_le_bytes());
    // The reset register: a byte in I/O space.
    put(116, &[1, 8, 0, 1]);
    put(120, &u64::from(reset_port).to_le_bytes());
    put(128, &[reset_value]);
    put(140, &dsdt.to_le_bytes());
    table(b"FACP", 6, &body)
}

fn madt(processors: u8) -> Vec<u8> {
    let mut body = [LOCAL_APIC.to_le_bytes(), PCAT_COMPAT.to_le_bytes()].concat();
    for id in 0..processors {
        body.extend([PROCESSOR_LOCAL_APIC, 8, id, id]);
        body.extend(ENABLED.to_le_bytes());
    }
    body.extend([IO_APIC_ENTRY, 12, processors, 0]);
    body.extend([IO_APIC.to_le_bytes(), [0; 4]].concat());
    body.extend([LOCAL_APIC_NMI, 6, ALL_PROCESSORS, 0, 0, 1]);
    table(b"APIC", 4, &body)
}

/// A table with its header (5.2.6 "System Description Table Header").
fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = signature.to_vec();
    table.extend((body.len() as u32 + 36).to_le_bytes());
    table.extend([revision, 0]);
    table.extend(b"L1HV  VMM     \x01\0\0\0L1HV\x01\0\0\0");
    table.extend(body);
    table[9] = checksum(&table);
    table
}

/// The byte that makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_sub(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_checksums_are_right() {
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte));
        let rsdp = rsdp(0x1234);
        assert_eq!((rsdp.len(), sum(&rsdp[..20]), sum(&rsdp)), (36, 0, 0));
        for (table, length) in [(fadt(1, 2, 3), 276), (madt(4), 36 + 8 + 4 * 8 + 12 + 6)] {
            assert_eq!((table.len(), sum(&table)), (length, 0));
            assert_eq!(table[4..8], (length as u32).to_le_bytes());
        }
    }
}
