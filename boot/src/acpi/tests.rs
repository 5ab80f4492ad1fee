use super::fixtures::{RSDP, RSDT, machine_with, seal, table};
use super::*;
use crate::phys::FakePhys;
use proptest::prelude::*;
use std::vec::Vec;

const MADT: u64 = 0x3000;
const MP_POINTER: u64 = 0xf_0050;
const MP_TABLE: u64 = 0x4000;

fn local_apic(id: u8, flags: u8) -> Vec<u8> {
    std::vec![0, 8, id, id, flags, 0, 0, 0]
}

fn local_x2apic(id: u32, flags: u8) -> Vec<u8> {
    let mut entry = std::vec![9, 16, 0, 0];
    entry.extend_from_slice(&id.to_le_bytes());
    entry.extend_from_slice(&[flags, 0, 0, 0, 0, 0, 0, 0]);
    entry
}

fn mp_processor(id: u8, flags: u8) -> Vec<u8> {
    let mut entry = std::vec![0; 20];
    entry[1] = id;
    entry[3] = flags;
    entry
}

/// A machine with an RSDP, an RSDT that names an unrelated table and the MADT, and an MP table.
fn machine(madt_entries: &[Vec<u8>], mp_entries: &[Vec<u8>]) -> FakePhys {
    let tables = [(0x5000, table(b"FACP", 36, &[])), (MADT, table(b"APIC", 44, &madt_entries.concat()))];
    let tables = tables.each_ref().map(|(at, bytes)| (*at, &bytes[..]));
    let mut memory = machine_with(&tables, &[0x5000, MADT]);
    let mut put = |at: u64, bytes: &[u8]| memory.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(MP_TABLE as u32).to_le_bytes());
    seal(&mut pointer, 10);
    put(MP_POINTER, &pointer);
    let mut mp = std::vec![0; 44];
    mp.extend_from_slice(&mp_entries.concat());
    mp[..4].copy_from_slice(b"PCMP");
    let length = mp.len() as u16;
    mp[4..6].copy_from_slice(&length.to_le_bytes());
    mp[34..36].copy_from_slice(&(mp_entries.len() as u16).to_le_bytes());
    seal(&mut mp, 7);
    put(MP_TABLE, &mp);
    memory
}

fn four_processors() -> FakePhys {
    let io_apic = std::vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    machine(
        &[local_apic(0, 1), local_apic(1, 1), io_apic, local_apic(2, 2), local_x2apic(300, 1), local_apic(5, 0)],
        &[mp_processor(0, 0b11), mp_processor(1, 0b01), std::vec![1; 8], mp_processor(2, 0b01)],
    )
}

#[test]
fn the_madt_is_found_through_the_root_pointer() {
    let memory = four_processors();
    assert_eq!(find_rsdp(&memory), Some(RSDP));
    assert_eq!(madt::find(&memory, RSDP), Ok(Some(MADT)));
}

#[test]
fn the_madt_is_found_through_the_64_bit_root_table_where_there_is_one() {
    const XSDT: u64 = 0x6000;
    let mut memory = four_processors();
    memory.bytes[RSDP as usize + 15] = 2;
    memory.bytes[RSDP as usize + 24..][..8].copy_from_slice(&XSDT.to_le_bytes());
    let xsdt = table(b"XSDT", 36, &MADT.to_le_bytes());
    memory.bytes[XSDT as usize..][..xsdt.len()].copy_from_slice(&xsdt);
    memory.bytes[RSDT as usize..][..8].fill(0xff);
    assert_eq!(madt::find(&memory, RSDP), Ok(Some(MADT)));
}

#[test]
fn a_root_pointer_with_a_wrong_checksum_is_not_one() {
    let mut memory = four_processors();
    memory.bytes[RSDP as usize + 9] ^= 1;
    assert_eq!(find_rsdp(&memory), None);
}

#[test]
fn the_madt_names_each_enabled_processor_once() {
    let mut memory = four_processors();
    assert_eq!(
        madt::processors(&memory, MADT).unwrap()[..],
        [0, 1, 300],
        "online-capable and disabled ones do not run"
    );
    let again = machine(&[local_apic(1, 1), local_x2apic(1, 1), local_x2apic(0, 1)], &[]);
    assert_eq!(processors(&again, Some(RSDP)).unwrap().unwrap()[..], [1, 0]);
    memory.bytes[MADT as usize + 44 + 4] = 0;
    assert_eq!(processors(&memory, Some(RSDP)).unwrap().unwrap()[..], [1, 300]);
}

#[test]
fn a_madt_with_too_many_processors_is_an_error() {
    let many: Vec<_> = (0..=MAX_PROCESSORS as u32).map(|id| local_x2apic(id, 1)).collect();
    let with = |entries: &[Vec<u8>]| {
        let mut memory = machine(&[], &[]);
        let bytes = table(b"APIC", 44, &entries.concat());
        memory.bytes[0x8000..0x8000 + bytes.len()].copy_from_slice(&bytes);
        madt::processors(&memory, 0x8000)
    };
    assert_eq!(with(&many[1..]).unwrap().len(), MAX_PROCESSORS);
    assert_eq!(with(&many), Err(TableError::TooManyProcessors));
}

#[test]
fn a_processor_is_held_whether_it_is_listed_or_answers() {
    assert_eq!(union(3, &[0, 3, 1], [1, 3, 7]).unwrap()[..], [3, 0, 1, 7]);
    assert_eq!(union(0, &[], [0]).unwrap()[..], [0]);
    let most = MAX_PROCESSORS as u32;
    assert_eq!(union(0, &[], 1..most).unwrap().len(), MAX_PROCESSORS);
    assert_eq!(union(0, &[], 1..=most), Err(TableError::TooManyProcessors));
}

#[test]
fn a_madt_entry_of_length_zero_is_an_error_instead_of_a_loop() {
    let mut memory = four_processors();
    memory.bytes[MADT as usize + 44 + 8 + 1] = 0;
    assert_eq!(madt::processors(&memory, MADT).unwrap_err(), TableError::BadEntry(MADT + 52));
}

#[test]
fn without_a_madt_the_mp_table_names_the_processors() {
    let memory = four_processors();
    assert_eq!(processors(&memory, None).unwrap().unwrap()[..], [0, 1, 2]);
}

#[test]
fn a_machine_without_tables_has_no_list() {
    let memory = FakePhys { base: 0, bytes: std::vec![0; 0x10_0000] };
    assert_eq!(find_rsdp(&memory), None);
    assert_eq!(processors(&memory, None), Ok(None));
}

proptest! {
    #[test]
    fn no_damaged_table_panics_or_hangs(
        changes in prop::collection::vec((0usize..0x80, any::<u8>()), 1..12), area in 0usize..4,
    ) {
        let mut memory = four_processors();
        let area = [RSDP, RSDT, MADT, MP_TABLE][area] as usize;
        for (offset, byte) in changes {
            memory.bytes[area + offset] = byte;
        }
        for rsdp in [find_rsdp(&memory), Some(RSDP), None] {
            if let Some(rsdp) = rsdp {
                let _ = sleep::SleepControl::find(&memory, rsdp);
            }
            if let Ok(Some(found)) = processors(&memory, rsdp) {
                prop_assert!((1..found.len()).all(|at| !found[..at].contains(&found[at])), "each once");
            }
        }
    }
}
