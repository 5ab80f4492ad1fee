//! Guest images.

use std::ops::Range;
use std::sync::LazyLock;

use boot::guest::{GuestEntry, GuestInput, GuestModule, LoadPlan, SCRATCH_BYTES, plan};
use boot::memory_map::{MemoryMap, Region, RegionKind, overlap};

use super::{are_apart, page_range};
use crate::input::edit;
use crate::{Input, is_one_line};

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn put_longs<const N: usize>(bytes: &mut [u8], at: usize, longs: [u32; N]) {
    longs.into_iter().enumerate().for_each(|(number, long)| put(bytes, at + 4 * number, &long.to_le_bytes()));
}

/// A bzImage: a boot sector, a sector of setup code, and a small kernel.
static BZIMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut image = vec![0x90; 2 * 512 + 0x240];
    image[0x1f1..0x290].fill(0);
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &0x24_u32.to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put_longs(&mut image, 0x22c, [0x7fff_ffff, 0x20_0000, 0x0003_0001, 2047]);
    put(&mut image, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut image, 0x260, &0x3000_u32.to_le_bytes());
    image
});

const MAGIC: u32 = 0x1bad_b002;

/// Puts a multiboot header into an image, without address fields.
fn multiboot_header(image: &mut [u8], at: usize, flags: u32) {
    put_longs(image, at, [MAGIC, flags, 0_u32.wrapping_sub(MAGIC).wrapping_sub(flags)]);
}

/// A multiboot image that is loaded by the addresses of its header.
static FLAT: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut image = vec![0x90; 0x100];
    multiboot_header(&mut image, 0x10, 0x1_0003);
    put_longs(&mut image, 0x1c, [0x40_0010, 0x40_0000, 0x40_00f0, 0x40_2000, 0x40_0020]);
    image
});

/// A multiboot image of ELF with two segments.
fn elf(is_64: bool) -> Vec<u8> {
    let (header, entry_bytes) = if is_64 { (64, 56) } else { (52, 32) };
    let mut image = vec![0; 0x180];
    put(&mut image, 0, if is_64 { b"\x7fELF\x02\x01\x01" } else { b"\x7fELF\x01\x01\x01" });
    put(&mut image, 16, &[2, 0, if is_64 { 62 } else { 3 }]);
    let count_at = if is_64 { 54 } else { 42 };
    put(&mut image, count_at, &[entry_bytes as u8, 0, 2, 0]);
    let (width, table_at) = if is_64 { (8, 32) } else { (4, 28) };
    let mut native = |at: usize, value: u64| put(&mut image, at, &value.to_le_bytes()[..width]);
    native(24, 0xc010_0000);
    native(table_at, header as u64);
    for (number, (offset, physical, in_file, in_memory)) in
        [(0x100, 0x10_0000, 0x40, 0x2000), (0x140, 0x20_0000, 0x40, 0x40)].into_iter().enumerate()
    {
        let at = header + number * entry_bytes;
        let fields = if is_64 { [8, 16, 24, 32, 40] } else { [4, 8, 12, 16, 20] };
        let values = [offset, physical + 0xc000_0000, physical, in_file, in_memory];
        fields.into_iter().zip(values).for_each(|(field, value)| native(at + field, value));
        native(at, 1);
    }
    multiboot_header(&mut image, 0xd8, 3);
    image
}

static ELF_32: LazyLock<Vec<u8>> = LazyLock::new(|| elf(false));
static ELF_64: LazyLock<Vec<u8>> = LazyLock::new(|| elf(true));

fn machine(holes: &[Range<u64>]) -> MemoryMap {
    let usable = [0..0x9_f000, 0x10_0000..0x400_0000];
    let regions = usable.iter().map(|range| (range, RegionKind::USABLE));
    let regions = regions.chain(holes.iter().map(|range| (range, RegionKind::RESERVED)));
    let regions = regions.map(|(range, kind)| Region { start: range.start, end: range.end, kind });
    MemoryMap::sanitize(regions).expect("they are few")
}

/// An image with modules on a machine with holes in its memory.
///
/// The input: the kind of the image, holes, modules, a length, and edits of the image.
pub fn guest_image(bytes: &[u8]) {
    const MODULE: [u8; 300] = [7; 300];
    let mut input = Input::new(bytes);
    let kind = input.byte();
    let mut image = match kind & 3 {
        0 => BZIMAGE.clone(),
        1 => FLAT.clone(),
        2 => ELF_32.clone(),
        _ => ELF_64.clone(),
    };
    let holes: Vec<Range<u64>> = (0..kind >> 2 & 3).map(|_| page_range(&mut input)).collect();
    let memory_map = machine(&holes);
    let arguments = &b"quiet splash"[..];
    let module = |address: u64, bytes| GuestModule { address, bytes, string: arguments, arguments };
    let modules: Vec<_> = (0..kind >> 4 & 3)
        .map(|_| module(page_range(&mut input).start + 0x100_0000, &MODULE[..usize::from(input.byte()) + 1]))
        .collect();
    if kind >> 6 & 1 != 0 {
        image.truncate(usize::from(input.half()) % (image.len() + 1));
    }
    edit(&mut input, &mut image);

    let guest = GuestInput {
        image: module(0x300_0000, &image),
        modules: &modules,
        memory_map: &memory_map,
        is_efi: false,
        boot_device: Some(0x80ff_ffff),
        framebuffer: None,
        loader_name: b"GRUB 2.06",
        acpi_rsdp: Some(0xe_0000),
    };
    let mut scratch = vec![0; SCRATCH_BYTES];
    match plan(&guest, &mut scratch) {
        Ok(plan) => check_plan(&plan, &guest),
        Err(error) => is_one_line(error),
    }
}

/// The promises of a plan.
fn check_plan(plan: &LoadPlan<'_>, guest: &GuestInput<'_>) {
    let copies = plan.copies.iter().map(|copy| copy.to.0..copy.to.0 + copy.bytes.len() as u64);
    let destinations: Vec<Range<u64>> = copies.chain(plan.zeros.iter().cloned()).collect();
    assert!(are_apart(&destinations));
    let sources: Vec<Range<u64>> = [guest.image].iter().chain(guest.modules).map(GuestModule::range).collect();
    for range in &destinations {
        assert!(range.end <= 1 << 32 && guest.memory_map.is_usable(range), "{range:x?} is not usable");
        assert!(!sources.iter().any(|source| overlap(source, range)), "{range:x?} is a source");
    }
    let is_written = |address: u64| destinations.iter().any(|range| range.contains(&address));
    match plan.entry {
        GuestEntry::Linux64 { cr3, gdt_base, gdt_limit, rip, rsi, rsp } => {
            assert!(
                [cr3.0, gdt_base.0, gdt_base.0 + u64::from(gdt_limit), rip, rsi, rsp - 1].into_iter().all(is_written)
            );
        }
        // A header with address fields may name any entry.
        GuestEntry::Protected32 { rip, ebx, .. } => {
            assert!(is_written(ebx.into()) && (may_have_addresses(guest.image.bytes) || is_written(rip.into())));
        }
    }
}

/// Whether there is what could be a multiboot header with address fields.
fn may_have_addresses(image: &[u8]) -> bool {
    const ADDRESSES: u32 = 1 << 16;
    let (longs, _) = image.as_chunks::<4>();
    let mut pairs = longs.windows(2).map(|pair| [u32::from_le_bytes(pair[0]), u32::from_le_bytes(pair[1])]);
    pairs.any(|[magic, flags]| magic == MAGIC && flags & ADDRESSES != 0)
}
