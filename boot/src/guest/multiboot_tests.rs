use super::*;
use crate::guest::fixtures::{MIB, check_plan, input, map, module};
use crate::guest::{GuestModule, PlannedCopy, SCRATCH_BYTES};
use crate::phys::FakePhys;
use ept::Gpa;
use proptest::prelude::*;
use std::string::ToString;
use std::vec::Vec;

const HEADER_AT: usize = 0x100;

fn header(flags: u32, fields: &[u32]) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags);
    [HEADER_MAGIC, flags, checksum].iter().chain(fields).flat_map(|word| word.to_le_bytes()).collect()
}

/// An image of 16 KiB. Its header loads all bytes from the header on at 1 MiB, followed by `bss` bytes of zeros.
fn flat_image(bss: u32) -> Vec<u8> {
    let load = MIB as u32;
    let end = load + 0x4000 - HEADER_AT as u32;
    let mut file = std::vec![0x90; 0x4000];
    let header = header(FLAG_ADDRESSES | 0b11, &[load, load, end, end + bss, load + 0x40]);
    file[HEADER_AT..HEADER_AT + header.len()].copy_from_slice(&header);
    file
}

/// An ELF file of either class: one segment at 1 MiB, virtual 3 GiB higher, twice as large in memory as in the file.
fn elf_image(is_64: bool) -> Vec<u8> {
    let mut file = std::vec![0x90; 0x2000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF");
    put(4, &[1 + u8::from(is_64), 1]);
    put(18, &if is_64 { 62u16 } else { 3 }.to_le_bytes());
    let native = |value: u64| if is_64 { value.to_le_bytes().to_vec() } else { (value as u32).to_le_bytes().to_vec() };
    let pick = |narrow: usize, wide: usize| if is_64 { wide } else { narrow };
    let virt = 0xc000_0000 + MIB;
    put(24, &native(virt + 0x20));
    put(pick(28, 32), &native(0x40));
    put(pick(42, 54), &(pick(32, 56) as u16).to_le_bytes());
    put(pick(44, 56), &1u16.to_le_bytes());
    put(0x40, &1u32.to_le_bytes());
    for (narrow, wide, value) in [(4, 8, 0x1000), (8, 16, virt), (12, 24, MIB), (16, 32, 0x1000), (20, 40, 0x2000)] {
        put(0x40 + pick(narrow, wide), &native(value));
    }
    put(HEADER_AT, &header(0b11, &[]));
    file
}

fn flat_plan<'a>(file: &'a [u8], memory_map: &'a MemoryMap, scratch: &'a mut [u8]) -> Result<LoadPlan<'a>, LoadError> {
    crate::guest::plan(&input(module(60 * MIB, file, b"smp=1"), &[], memory_map), scratch)
}

fn machine() -> MemoryMap {
    map(&[0..0x9_fc00, MIB..64 * MIB])
}

#[test]
fn an_image_with_address_fields_is_copied_as_one_piece_with_zeros_behind() {
    let (file, map) = (flat_image(0x3000), machine());
    let mut scratch = std::vec![0xcc; SCRATCH_BYTES];
    let plan = flat_plan(&file, &map, &mut scratch).unwrap();
    assert_eq!(plan.copies[0].to, Gpa(MIB));
    assert_eq!(plan.copies[0].bytes, &file[HEADER_AT..]);
    let end = MIB + 0x3f00;
    assert_eq!(plan.zeros.as_slice(), core::slice::from_ref(&(end..end + 0x3000)));
    let GuestEntry::Protected32 { rip, eax, ebx, esp } = plan.entry else { panic!("{plan:?}") };
    assert_eq!((rip, eax, ebx), (0x10_0040, LOADER_MAGIC, 0x1_0000));
    let low = plan.copies.last().unwrap();
    let stack = (u64::from(esp) - STACK_BYTES - low.to.0) as usize;
    assert!(esp % 16 == 0 && low.bytes[stack..][..STACK_BYTES as usize].iter().all(|&byte| byte == 0));
    check_plan(&plan, &map, &[module(60 * MIB, &file, b"")]);
}

#[test]
fn elf_images_of_both_classes_are_loaded_by_physical_address_and_entered_there() {
    for is_64 in [false, true] {
        let (file, map) = (elf_image(is_64), machine());
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let plan = flat_plan(&file, &map, &mut scratch).unwrap();
        let PlannedCopy { to, bytes } = plan.copies[0];
        assert_eq!((to, bytes), (Gpa(MIB), &file[0x1000..0x2000]));
        assert_eq!(plan.zeros.as_slice(), core::slice::from_ref(&(MIB + 0x1000..MIB + 0x2000)));
        assert!(matches!(plan.entry, GuestEntry::Protected32 { rip: 0x10_0020, .. }), "{plan:?}");
    }
}

/// Our own parser reads the plan's low memory as a loader's information, as an l1hv inside l1hv does.
#[test]
fn the_information_that_the_guest_gets_is_what_our_own_parser_reads() {
    let (file, map) = (flat_image(0), machine().with_reserved(50 * MIB..52 * MIB).unwrap());
    let modules = [module(40 * MIB, &[1; 10], b"log=debug quiet"), module(41 * MIB, &[2; 5000], b"")];
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let framebuffer = Framebuffer(core::array::from_fn(|at| at as u8));
    let input = input(module(60 * MIB, &file, b"stats"), &modules, &map);
    let input = GuestInput { boot_device: Some(0x80ff_ffff), framebuffer: Some(framebuffer), ..input };
    let plan = crate::guest::plan(&input, &mut scratch).unwrap();
    let GuestEntry::Protected32 { eax, ebx, .. } = plan.entry else { panic!("{plan:?}") };
    let low = plan.copies.iter().find(|copy| copy.to.0 < MIB).unwrap();
    let memory = FakePhys { base: low.to.0, bytes: low.bytes.to_vec() };
    let info = crate::multiboot::BootInfo::parse(&memory, eax, ebx).unwrap();
    assert_eq!(info.loader_name(), b"GRUB 2.06");
    assert_eq!(info.command_line(), b"stats");
    assert_eq!(info.memory_map, map);
    assert_eq!((info.boot_device, info.framebuffer), (input.boot_device, input.framebuffer));
    let seen: Vec<_> = info.modules.iter().map(|m| (m.range.clone(), info.module_arguments(m))).collect();
    let given: Vec<_> = modules.iter().map(|m: &GuestModule<'_>| (m.range(), m.arguments)).collect();
    assert_eq!(seen, given);
    let field = |offset: u64| memory.bytes[offset as usize..][..4].try_into().map(u32::from_le_bytes).unwrap();
    assert_eq!((field(info_offset::MEM_LOWER), field(info_offset::MEM_UPPER)), (0x9_fc00 / 1024, 49 * 1024));
}

#[test]
fn generated_structures_keep_clear_of_an_image_in_low_memory() {
    let mut file = elf_image(false);
    file[0x40 + 12..][..4].copy_from_slice(&0x1_0000u32.to_le_bytes());
    let map = machine();
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let plan = flat_plan(&file, &map, &mut scratch).unwrap();
    assert!(matches!(plan.entry, GuestEntry::Protected32 { ebx: 0x1_2000, .. }), "{plan:?}");
    check_plan(&plan, &map, &[module(60 * MIB, &file, b"")]);
}

#[test]
fn an_image_for_memory_that_is_not_free_is_refused_with_the_addresses() {
    for start in [0x9_f000u32, 60 << 20, 0xffff_f000] {
        let mut file = elf_image(false);
        file[0x40 + 12..][..4].copy_from_slice(&start.to_le_bytes());
        let map = machine();
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let error = flat_plan(&file, &map, &mut scratch).unwrap_err();
        let start = u64::from(start);
        assert_eq!(error, LoadError::NotFree { start, end: start + 0x2000 });
    }
}

#[test]
fn demands_that_cannot_be_met_are_refused_and_text_mode_is_met() {
    let with_flags = |flags: u32, mode: u32| {
        let mut file = elf_image(false);
        let header = header(flags, &[0, 0, 0, 0, 0, mode]);
        file[HEADER_AT..HEADER_AT + header.len()].copy_from_slice(&header);
        let map = machine();
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        flat_plan(&file, &map, &mut scratch).map(|_| ()).map_err(|error| error.to_string())
    };
    assert!(with_flags(FLAG_VIDEO, 0).unwrap_err().contains("graphics mode"));
    assert!(with_flags(1 << 3, 0).unwrap_err().contains("unknown feature"));
    assert_eq!(with_flags(FLAG_VIDEO, 1), Ok(()));
}

#[test]
fn a_header_with_a_wrong_checksum_or_beyond_8_kib_is_not_one() {
    let mut file = flat_image(0);
    assert!(Header::find(&file).is_some());
    file[HEADER_AT + 8] ^= 1;
    assert_eq!(Header::find(&file), None);
    let mut late = std::vec![0; SEARCH_BYTES];
    late.extend(header(0, &[]));
    assert_eq!(Header::find(&late), None);
}

#[test]
fn addresses_that_contradict_each_other_are_refused() {
    for (field, value) in [(12, 0), (16, 0x20_0000), (20, 0x1000), (24, 0x10_1000)] {
        let mut file = flat_image(0);
        file[HEADER_AT + field..][..4].copy_from_slice(&u32::to_le_bytes(value));
        let map = machine();
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let error = flat_plan(&file, &map, &mut scratch).unwrap_err();
        assert!(error.to_string().contains("contradict"), "field {field}: {error}");
    }
}

#[test]
fn an_elf_file_that_ends_within_its_segment_is_truncated() {
    let file = elf_image(true);
    let map = machine();
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let error = flat_plan(&file[..0x1fff], &map, &mut scratch).unwrap_err();
    assert_eq!(error, LoadError::Truncated("segments"));
}

#[test]
fn a_file_of_neither_kind_is_refused() {
    let map = machine();
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    assert_eq!(flat_plan(b"#!/bin/sh\n", &map, &mut scratch).unwrap_err(), LoadError::UnknownFormat);
}

proptest! {
    #[test]
    fn no_multiboot_image_panics_or_breaks_the_plans_promises(
        kind in 0usize..3,
        changes in prop::collection::vec((0usize..0x140, any::<u8>()), 0..6),
        length in 0usize..0x4000,
        keep_header in any::<bool>(),
    ) {
        let mut file = [flat_image(0x1000), elf_image(false), elf_image(true)][kind].clone();
        for (at, byte) in changes {
            // The magic and the checksum would otherwise stop nearly every case at once.
            if !keep_header || !(HEADER_AT..HEADER_AT + 12).contains(&at) {
                file[at] = byte;
            }
        }
        file.truncate(length.max(0x140));
        let map = machine().with_reserved(20 * MIB..21 * MIB).unwrap();
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let modules = [module(59 * MIB, &[7; 1001], b"one")];
        let image = module(60 * MIB, &file, b"quiet");
        match crate::guest::plan(&input(image, &modules, &map), &mut scratch) {
            Ok(plan) => check_plan(&plan, &map, &[image, modules[0]]),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
