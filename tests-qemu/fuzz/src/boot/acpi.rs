//! ACPI tables and the MP table.

use std::sync::LazyLock;

use boot::acpi::sleep::SleepControl;
use boot::acpi::{MAX_PROCESSORS, Processors, find_rsdp, processors, union};

use super::Memory;
use crate::input::edit;
use crate::{Input, is_one_line};

/// The word that says where the extended BIOS data area is. Both pointers are there, so that a search ends soon.
const EBDA_SEGMENT: u64 = 0x40e;
const EBDA: u64 = 0x9_fc00;
const RSDP: u64 = EBDA + 0x20;
const FLOATING_POINTER: u64 = EBDA + 0x50;
/// All tables lie here.
const TABLES: u64 = 0x8000;
const XSDT: usize = 0x40;
const MADT: usize = 0x80;
const FADT: usize = 0x100;
const DSDT: usize = 0x240;
const SSDT: usize = 0x2a0;
const MP_TABLE: usize = 0x300;
const TABLES_END: usize = 0x380;

/// SLP_EN and WAK_STS.
const SLEEP: u32 = 1 << 5;
const WAKE: u32 = 1 << 7;

fn address(table: usize) -> [u8; 4] {
    (TABLES as u32 + table as u32).to_le_bytes()
}

/// Makes the bytes add up to zero.
fn seal(bytes: &mut [u8], checksum_at: usize) {
    bytes[checksum_at] = 0;
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[checksum_at] = sum.wrapping_neg();
}

fn put(tables: &mut [u8], at: usize, bytes: &[u8]) {
    tables[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A table's header.
fn begin(tables: &mut [u8], at: usize, signature: &[u8; 4], length: usize) {
    put(tables, at, signature);
    put(tables, at + 4, &(length as u32).to_le_bytes());
}

/// A machine with two processors in each list, and the registers of an old machine and of one with reduced hardware.
static MACHINE: LazyLock<Memory> = LazyLock::new(|| {
    let mut rsdp = vec![0; 36];
    put(&mut rsdp, 0, b"RSD PTR ");
    put(&mut rsdp, 16, &address(0));
    put(&mut rsdp, 24, &(TABLES + XSDT as u64).to_le_bytes());

    let mut tables = vec![0; TABLES_END];
    begin(&mut tables, 0, b"RSDT", 36 + 12);
    begin(&mut tables, XSDT, b"XSDT", 36 + 24);
    for (number, table) in [MADT, FADT, SSDT].into_iter().enumerate() {
        put(&mut tables, 36 + 4 * number, &address(table));
        put(&mut tables, XSDT + 36 + 8 * number, &address(table));
    }
    begin(&mut tables, MADT, b"APIC", 44 + 8 + 16);
    put(&mut tables, MADT + 44, &[0, 8, 0, 0, 1, 0, 0, 0]);
    put(&mut tables, MADT + 52, &[9, 16, 0, 0, 44, 1, 0, 0, 1]);

    begin(&mut tables, FADT, b"FACP", 268);
    put(&mut tables, FADT + 40, &address(DSDT));
    for (offset, port) in [(56, 0x600_u32), (60, 0x680), (64, 0x604), (68, 0x684)] {
        put(&mut tables, FADT + offset, &port.to_le_bytes());
    }
    for (offset, port) in [(148, 0x600_u32), (172, 0x604), (244, 0x700), (256, 0x701)] {
        put(&mut tables, FADT + offset, &[1, 8, 0, 1]);
        put(&mut tables, FADT + offset + 4, &port.to_le_bytes());
    }
    begin(&mut tables, DSDT, b"DSDT", 0x50);
    put(&mut tables, DSDT + 40, b"\x08_S5_\x12\x06\x04\x0a\x05\x0a\x05\x00\x00");
    begin(&mut tables, SSDT, b"SSDT", 0x50);
    put(&mut tables, SSDT + 36, b"\x08\\_S5_\x12\x08\x02\x0b\x07\x00\x01");

    let mut pointer = vec![0; 16];
    put(&mut pointer, 0, b"_MP_");
    put(&mut pointer, 4, &address(MP_TABLE));
    begin(&mut tables, MP_TABLE, b"PCMP", 44 + 20 + 8 + 20);
    put(&mut tables, MP_TABLE + 34, &[3]);
    for (offset, id) in [(0, 0), (28, 7)] {
        put(&mut tables, MP_TABLE + 44 + offset, &[0, id, 0, 1]);
    }
    put(&mut tables, MP_TABLE + 64, &[1]);
    let segment = ((EBDA >> 4) as u16).to_le_bytes().to_vec();
    Memory(vec![(RSDP, rsdp), (FLOATING_POINTER, pointer), (TABLES, tables), (EBDA_SEGMENT, segment)])
});

fn are_different(found: &Processors) -> bool {
    (1..found.len()).all(|at| !found[..at].contains(&found[at]))
}

/// A machine whose firmware has left other tables than it should.
///
/// The input: the revision of the root pointer and which pointers have wrong checksums, then edits of the tables and of
/// the pointers.
pub fn acpi(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut memory = MACHINE.clone();
    let style = input.byte();
    memory.0[0].1[15] = style & 3;
    let in_pointers = input.byte() % 8;
    for (area, share) in [(0, in_pointers / 2), (1, in_pointers % 2)] {
        edit(&mut Input::new(input.take(4 * usize::from(share))), &mut memory.0[area].1);
    }
    edit(&mut input, &mut memory.0[2].1);
    if style & 0x1c != 4 {
        seal(&mut memory.0[0].1[..20], 8);
    }
    if style & 0xe0 != 0x20 {
        seal(&mut memory.0[1].1, 10);
    }

    let rsdp = find_rsdp(&memory);
    assert!(rsdp.is_none_or(|rsdp| rsdp == RSDP));
    for rsdp in [rsdp, None] {
        match processors(&memory, rsdp) {
            Ok(Some(found)) => {
                assert!(are_different(&found));
                check_union(&found);
            }
            Ok(None) => (),
            Err(error) => is_one_line(error),
        }
    }
    if let Some(Ok(control)) = rsdp.map(|rsdp| SleepControl::find(&memory, rsdp)) {
        check_sleep(&control);
    }
}

fn check_union(found: &Processors) {
    let all = union(3, found, found.iter().map(|id| id ^ 1));
    match all {
        Ok(all) => {
            assert!(are_different(&all) && all[0] == 3 && found.iter().all(|id| all.contains(id)));
            assert!(found.iter().all(|id| all.contains(&(id ^ 1))));
        }
        Err(_) => assert!(2 * found.len() + 1 > MAX_PROCESSORS),
    }
}

/// A write that puts the machine to sleep never reaches the port, however it is split into bytes.
fn check_sleep(control: &SleepControl) {
    for port in control.ports() {
        let is_denied = |kind: &u32| control.write(port, 1, SLEEP | kind << 2).denied.is_some();
        let denied = (0..8).filter(is_denied).count();
        let is_off = usize::from(control.knows_off());
        assert!(denied == 0 || denied + is_off >= 8, "{port:#x}: at most one sleeping state is not withheld");
        for (number, bytes) in [(0, 2), (1, 2), (3, 4)] {
            let first = port.wrapping_sub(number);
            for kind in [0_u32, 5, 7] {
                let value = (SLEEP | WAKE | kind << 2) << (8 * number) | 0x0101_0101;
                let written = control.write(first, bytes, value);
                // Only SLP_EN bits go.
                assert_eq!(written.value & !0x2020_2020, value & !0x2020_2020);
                assert_eq!(written.denied.is_some(), written.value != value);
                // Once the bits are gone, there is nothing to deny.
                let again = control.write(first, bytes, written.value);
                assert!(again.denied.is_none() && again.value == written.value);
            }
            let read = control.read_after_denial(first, bytes, 0);
            assert_eq!(read & !0x8080_8080, 0);
        }
    }
}
