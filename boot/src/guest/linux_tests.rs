use super::*;
use crate::guest::SCRATCH_BYTES;
use crate::guest::fixtures::{MIB, check_plan, input, map, module};
use crate::multiboot::Framebuffer;
use proptest::prelude::*;
use std::string::ToString;
use std::vec::Vec;

const KERNEL_BYTES: usize = 0x5000;

/// A bzImage with two setup sectors whose kernel counts upward.
fn bzimage() -> Vec<u8> {
    let mut file = std::vec![0; 3 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::SETUP_SECTS, &[2]);
    put(offset::SYSSIZE, &(KERNEL_BYTES as u32 / 16).to_le_bytes());
    put(offset::BOOT_FLAG, &BOOT_FLAG.to_le_bytes());
    put(offset::JUMP_LENGTH, &[0x6a]);
    put(offset::MAGIC, &MAGIC);
    put(offset::VERSION, &0x20fu16.to_le_bytes());
    put(offset::INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
    put(offset::KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
    put(offset::RELOCATABLE_KERNEL, &[1]);
    put(offset::XLOADFLAGS, &(XLF_KERNEL_64 | XLF_CAN_BE_LOADED_ABOVE_4G).to_le_bytes());
    put(offset::CMDLINE_SIZE, &2047u32.to_le_bytes());
    put(offset::PREF_ADDRESS, &(16 * MIB).to_le_bytes());
    put(offset::INIT_SIZE, &0x10_0000u32.to_le_bytes());
    file.extend((0..KERNEL_BYTES).map(|i| i as u8));
    file
}

fn low_block<'a>(plan: &LoadPlan<'a>) -> (u64, &'a [u8]) {
    let low = plan.copies.iter().find(|copy| copy.to.0 < MIB).unwrap();
    (low.to.0, low.bytes)
}

fn zero_page_word<const N: usize>(plan: &LoadPlan<'_>, at: usize) -> [u8; N] {
    word(low_block(plan).1, at).unwrap()
}

fn initrd(plan: &LoadPlan<'_>) -> Range<u64> {
    let start = u64::from(u32::from_le_bytes(zero_page_word(plan, offset::RAMDISK_IMAGE)));
    start..start + u64::from(u32::from_le_bytes(zero_page_word(plan, offset::RAMDISK_SIZE)))
}

#[test]
fn the_kernel_goes_to_its_preferred_address_and_starts_at_its_64_bit_entry() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut scratch = std::vec![0xcc; SCRATCH_BYTES];
    let image = module(60 * MIB, &file, b"console=ttyS0");
    let plan = plan(&input(image, &[], &map), &mut scratch).unwrap();
    let GuestEntry::Linux64 { cr3, gdt_base, gdt_limit, rip, rsi, rsp } = plan.entry else { panic!("{plan:?}") };
    assert_eq!((rip, rsi, gdt_limit), (16 * MIB + 0x200, 0x1_0000, 31));
    assert_eq!(plan.copies[0].to, Gpa(16 * MIB));
    assert_eq!(plan.copies[0].bytes, &file[3 * SECTOR..]);
    let (base, low) = low_block(&plan);
    let at = |address: u64| (address - base) as usize;
    assert_eq!(rsi, base);
    assert!((base..base + low.len() as u64).contains(&(rsp - 1)) && rsp % 16 == 0);
    let quad = |address: u64| u64::from_le_bytes(word(low, at(address)).unwrap());
    assert_eq!(quad(gdt_base.0 + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(quad(gdt_base.0 + 0x18), 0x00cf_9300_0000_ffff);
    let command_line = u64::from(u32::from_le_bytes(zero_page_word(&plan, offset::CMD_LINE_PTR)));
    assert_eq!(&low[at(command_line)..][..14], b"console=ttyS0\0");
    assert_eq!(zero_page_word(&plan, offset::TYPE_OF_LOADER), [UNDEFINED_LOADER]);
    assert_eq!(zero_page_word(&plan, offset::MAGIC), MAGIC);
    // The page tables map each of the four GiB to itself.
    for address in [0, 0x1234_5678, 0x8000_0000, 0xffff_ffff_u64] {
        let pdpte = quad((quad(cr3.0) & !0xfff) + (address >> 30) * 8);
        let pde = quad((pdpte & !0xfff) + (address >> 21 & 511) * 8);
        assert_eq!(pde, address & !0x1f_ffff | 0x83);
    }
    check_plan(&plan, &map, &[image]);
}

#[test]
fn the_memory_map_and_the_root_pointer_are_in_the_zero_page() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]).with_reserved(32 * MIB..34 * MIB).unwrap());
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let input = GuestInput { acpi_rsdp: Some(0xf_1234), ..input(module(60 * MIB, &file, b""), &[], &map) };
    let plan = plan(&input, &mut scratch).unwrap();
    assert_eq!(u64::from_le_bytes(zero_page_word(&plan, offset::ACPI_RSDP)), 0xf_1234);
    assert_eq!(zero_page_word(&plan, offset::E820_ENTRIES), [4]);
    let entry = offset::E820_TABLE + 2 * 20;
    assert_eq!(u64::from_le_bytes(zero_page_word(&plan, entry)), 32 * MIB);
    assert_eq!(u64::from_le_bytes(zero_page_word(&plan, entry + 8)), 2 * MIB);
    assert_eq!(u32::from_le_bytes(zero_page_word(&plan, entry + 16)), 2);
}

#[test]
fn the_screen_is_text_with_a_bios_and_what_the_loader_says_with_efi() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut fields = [0; 28];
    for (at, value) in [(0, 0xc000_0000u32), (4, 1), (8, 4096), (12, 1024), (16, 768)] {
        fields[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    fields[20..].copy_from_slice(&[32, 1, 16, 8, 8, 7, 0, 6]);
    let screen = |is_efi, framebuffer| {
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let input = input(module(60 * MIB, &file, b""), &[], &map);
        let plan = plan(&GuestInput { is_efi, framebuffer, ..input }, &mut scratch).unwrap();
        zero_page_word::<0x40>(&plan, offset::SCREEN_INFO)
    };
    let text = screen(false, None);
    assert_eq!((text[0x06], text[0x07], text[0x0e], text[0x0f]), (3, 80, 25, 1));
    assert_eq!(screen(true, None), [0; 0x40]);
    let pixels = screen(true, Some(Framebuffer(fields)));
    let half = |at: usize| u16::from_le_bytes([pixels[at], pixels[at + 1]]);
    let long = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    assert_eq!((pixels[0x0f], half(0x12), half(0x14), half(0x16), half(0x24)), (0x70, 1024, 768, 32, 4096));
    assert_eq!((long(0x18), long(0x1c), long(0x36), long(0x3a)), (0xc000_0000, 4096 * 768, 2, 1));
    assert_eq!(pixels[0x26..0x2c], [8, 16, 7, 8, 6, 0]);
}

#[test]
fn a_kernel_whose_preferred_address_is_taken_goes_to_the_next_aligned_one() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let image = module(16 * MIB + 0x8_0000, &file, b"");
    let plan = plan(&input(image, &[], &map), &mut scratch).unwrap();
    assert_eq!(plan.copies[0].to, Gpa(18 * MIB));
    check_plan(&plan, &map, &[image]);
}

#[test]
fn one_initrd_is_used_where_it_is() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let modules = [module(59 * MIB, &[7; 1001], b"")];
    let plan = plan(&input(module(60 * MIB, &file, b""), &modules, &map), &mut scratch).unwrap();
    assert_eq!(initrd(&plan), 59 * MIB..59 * MIB + 1001);
}

#[test]
fn several_initrds_are_joined_at_multiples_of_four_with_zeros_between() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let modules = [module(59 * MIB, &[7; 1001], b""), module(58 * MIB, &[8; 4], b"")];
    let image = module(60 * MIB, &file, b"");
    let plan = plan(&input(image, &modules, &map), &mut scratch).unwrap();
    let joined = initrd(&plan);
    assert_eq!(joined.end - joined.start, 1004 + 4);
    let copies: Vec<_> = plan.copies[1..3].iter().map(|copy| (copy.to.0 - joined.start, copy.bytes[0])).collect();
    assert_eq!(copies, [(0, 7), (1004, 8)]);
    assert_eq!(plan.zeros.as_slice(), core::slice::from_ref(&(joined.start + 1001..joined.start + 1004)));
    check_plan(&plan, &map, &[image, modules[0], modules[1]]);
}

#[test]
fn an_initrd_above_what_the_kernel_reaches_is_moved_below() {
    let (mut file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    file[offset::XLOADFLAGS] = XLF_KERNEL_64 as u8;
    file[offset::INITRD_ADDR_MAX..][..4].copy_from_slice(&(48 * MIB as u32 - 1).to_le_bytes());
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let modules = [module(59 * MIB, &[7; 4096], b"")];
    let plan = plan(&input(module(60 * MIB, &file, b""), &modules, &map), &mut scratch).unwrap();
    assert_eq!(initrd(&plan), 48 * MIB - 4096..48 * MIB);
}

#[test]
fn every_damaged_or_unsupported_header_is_refused_with_a_reason() {
    let cases: [(usize, &[u8], &str); 8] = [
        (offset::BOOT_FLAG, &[0], "neither"),
        (offset::VERSION, &[0x0b, 0x02], "no 64-bit entry"),
        (offset::XLOADFLAGS, &[0], "no 64-bit entry"),
        (offset::RELOCATABLE_KERNEL, &[0], "not relocatable"),
        (offset::KERNEL_ALIGNMENT, &[1], "alignment"),
        (offset::SYSSIZE, &[0, 0, 1, 0], "ends within its kernel"),
        (offset::SETUP_SECTS, &[255], "ends within its kernel"),
        (offset::INIT_SIZE, &[0, 0, 0, 0], "init_size"),
    ];
    let map = map(&[0..0x9_fc00, MIB..64 * MIB]);
    for (at, bytes, reason) in cases {
        let mut file = bzimage();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let error = plan(&input(module(60 * MIB, &file, b""), &[], &map), &mut scratch).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn every_truncation_of_a_bzimage_is_an_error() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    // The last paragraph may be cut short, anything before it may not.
    for length in 0..=file.len() - 16 {
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let image = module(60 * MIB, &file[..length], b"");
        assert!(crate::guest::plan(&input(image, &[], &map), &mut scratch).is_err(), "{length} bytes");
    }
}

#[test]
fn a_command_line_that_the_kernel_cannot_take_is_refused() {
    let (file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let error = plan(&input(module(60 * MIB, &file, &[b'x'; 2048]), &[], &map), &mut scratch).unwrap_err();
    assert_eq!(error, LoadError::CommandLineTooLong { limit: 2047 });
}

#[test]
fn a_machine_without_room_for_the_kernel_is_too_small_not_the_image_bad() {
    let (mut file, map) = (bzimage(), map(&[0..0x9_fc00, MIB..64 * MIB]));
    file[offset::INIT_SIZE..][..4].copy_from_slice(&(128 * MIB as u32).to_le_bytes());
    let mut scratch = std::vec![0; SCRATCH_BYTES];
    let error = plan(&input(module(60 * MIB, &file, b""), &[], &map), &mut scratch).unwrap_err();
    assert_eq!(error.kind(), crate::stop::StopKind::LowMemory);
}

proptest! {
    #[test]
    fn no_bzimage_panics_or_breaks_the_plans_promises(
        changes in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 0..8),
        length in 0x200usize..0x5600,
    ) {
        let mut file = bzimage();
        for (at, byte) in changes {
            file[at] = byte;
        }
        file.truncate(length.max(0x270));
        let map = map(&[0..0x9_fc00, MIB..64 * MIB]).with_reserved(20 * MIB..21 * MIB).unwrap();
        let mut scratch = std::vec![0; SCRATCH_BYTES];
        let modules = [module(59 * MIB, &[7; 1001], b"one"), module(58 * MIB, &[8; 4], b"")];
        let image = module(60 * MIB, &file, b"quiet");
        match crate::guest::plan(&input(image, &modules, &map), &mut scratch) {
            Ok(plan) => check_plan(&plan, &map, &[image, modules[0], modules[1]]),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
