//! Walks of a guest hypervisor's paging structures.

use ept::Gpa;
use shadow::hw::GuestMemory;
use shadow::linear::{AccessMode, Paging};
use shadow::msr::Access;
use shadow::outcome::Fault;
use shadow::registers::*;

use super::machine::Ram;
use crate::Input;

const PML4: u64 = 0x1000;
const ENTRIES: usize = 12;
const FLAGS: u64 = 0x60;

/// Registers of one of the paging modes, with edits.
fn paging(input: &mut Input<'_>) -> Paging {
    let (cr4, efer) = [
        (CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE),
        (CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA),
        (CR4_PAE, EFER_NXE),
        (CR4_PSE, 0),
    ][input.below(4)];
    let style = input.byte();
    let with = |bit: u32, flag: u64| if style >> bit & 1 != 0 { flag } else { 0 };
    Paging {
        cr0: CR0_PE | if style & 1 == 0 { CR0_PG } else { 0 } | with(1, CR0_WP),
        cr3: input.neighbour(PML4),
        cr4: cr4 | with(2, CR4_SMAP) | with(3, CR4_PKE) | with(4, CR4_PKS),
        efer,
        rflags: 2 | with(5, RFLAGS_AC),
        physical_bits: 32 + u32::from(input.byte() % 21),
        pkru: input.long(),
        pkrs: input.long(),
        mode: if style & 0x40 == 0 { AccessMode::Supervisor } else { AccessMode::User },
    }
}

/// Paging structures with arbitrary entries near the way of one address, and operands there.
///
/// The input: registers, the address and the size, and entries: the table and the index of each, and its value.
pub fn linear(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let paging = paging(&mut input);
    let address = input.neighbour(0x0000_0020_1234_5ff8);
    let address = if paging.efer & EFER_LMA == 0 { address & 0xffff_ffff } else { address };
    let size = 1 + usize::from(input.byte() & 0xf);
    let memory = Ram::new();
    for _ in 0..ENTRIES {
        if input.is_at_end() {
            break;
        }
        let number = input.byte();
        let table = 0x1000 + u64::from(number & 3) * 0x1000;
        // The index of one of the levels, or one beside.
        let shift = 12 + 9 * u32::from(number >> 2 & 7).min(4);
        let index = (address >> shift).wrapping_add(u64::from(number >> 5 & 1)) & 511;
        let usual = (table + 0x1000) & 0x3fff | 0x27;
        memory.write_u64(Gpa(table % 0x4000 + 8 * index), input.neighbour(usual));
    }
    check(&paging, memory, address, size);
}

fn check(paging: &Paging, mut memory: Ram, address: u64, size: usize) {
    let before = *memory.bytes();
    for access in [Access::Read, Access::Write] {
        let seen = *memory.bytes();
        let found = paging.translate(&memory, address, access);
        let sets_flags = seen != *memory.bytes();
        match found {
            Ok(translated) => {
                let bits = paging.physical_bits.max(40);
                assert!(translated.0 >> bits == 0 && translated.0 & 0xfff == address & 0xfff, "{translated:?}");
            }
            Err(fault) => check_fault(fault, address, access, paging.mode),
        }
        // A flag of an entry at one level may be a reserved bit of the same entry at another.
        assert!(sets_flags || paging.translate(&memory, address, access) == found);
    }
    only_flags_are_set(&before, memory.bytes());

    let seen = *memory.bytes();
    let mut operand = vec![0; size];
    match paging.read(&memory, address, &mut operand) {
        Ok(()) if seen != *memory.bytes() => (),
        Ok(()) => {
            let at = paging.translate(&memory, address, Access::Read).expect("its first byte was read");
            let mut first = [0];
            memory.read(at, &mut first);
            assert_eq!(first[0], operand[0]);
        }
        Err(_) => assert_eq!(operand, vec![0; size], "a fault reads nothing"),
    }
    only_flags_are_set(&before, memory.bytes());
    if paging.write(&memory, address, &operand).is_err() {
        only_flags_are_set(&before, memory.bytes());
    }
}

fn check_fault(fault: Fault, address: u64, access: Access, mode: AccessMode) {
    match fault {
        Fault::Page { address: reported, error_code } => {
            assert_eq!(reported, address);
            assert_eq!(error_code >> 1 & 1 != 0, matches!(access, Access::Write));
            assert_eq!(error_code >> 2 & 1 != 0, mode == AccessMode::User);
        }
        other => panic!("{other:?}"),
    }
}

/// A walk changes nothing but accessed and dirty flags, and clears none.
fn only_flags_are_set(before: &[u8], after: &[u8]) {
    const LINE: usize = 64;
    let lines = before.chunks(LINE).zip(after.chunks(LINE)).filter(|(old, new)| old != new);
    for (old, new) in lines.flat_map(|(old, new)| old.iter().zip(new)) {
        assert!(old & new == *old && u64::from(old ^ new) & !FLAGS == 0);
    }
}
