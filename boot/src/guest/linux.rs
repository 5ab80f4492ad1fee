//! Linux bzImages, started at the 64-bit entry of the boot protocol.
//!
//! Reference: the kernel's Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst. The kernel gets:
//!
//! ```text
//!   low memory    zero page · page tables (identity, 4 GiB) · GDT · command line · stack
//!   kernel        at its preferred address if that is free, else at the lowest aligned free address above
//!   initrd        one module where it is staged; several are joined, each on a multiple of four
//! ```

use core::ops::Range;

use ept::Gpa;

use super::{GuestEntry, GuestInput, GuestModule, LoadError, LoadPlan, LowBlock, PlanBuilder, word};
use crate::multiboot::Pixels;

const PAGE: u64 = 4096;
const FOUR_GIB: u64 = 1 << 32;

/// Offsets within the zero page; the setup header's are the same in the file.
mod offset {
    pub const SCREEN_INFO: usize = 0x000;
    pub const ACPI_RSDP: usize = 0x070;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP_LENGTH: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE_KERNEL: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    pub const E820_TABLE: usize = 0x2d0;
}

const MAGIC: [u8; 4] = *b"HdrS";
const BOOT_FLAG: u16 = 0xaa55;
const MIN_VERSION: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
const UNDEFINED_LOADER: u8 = 0xff;
const SECTOR: usize = 512;
/// The last byte that a setup header may reach in the zero page.
const SETUP_HEADER_END: usize = 0x290;
/// The offset of the 64-bit entry within the kernel.
const ENTRY_64: u64 = 0x200;

const STACK_BYTES: u64 = PAGE;
const GDT_BYTES: u64 = 32;
const PAGE_TABLES: u64 = 6;

/// Whether the file has a setup header of protocol 2.00 or later.
pub fn is_bzimage(file: &[u8]) -> bool {
    word(file, offset::MAGIC) == Some(MAGIC)
}

/// The setup header's fields that a loader needs, checked.
struct SetupHeader<'a> {
    /// The header's bytes, for the zero page.
    raw: &'a [u8],
    /// The protected-mode kernel.
    kernel: &'a [u8],
    pref_address: u64,
    alignment: u64,
    init_size: u64,
    cmdline_size: u64,
    /// The first address that no byte of the initrd may have.
    initrd_end: u64,
}

impl<'a> SetupHeader<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, LoadError> {
        let truncated = LoadError::Truncated("setup header");
        let byte = |at| word(file, at).map(u8::from_le_bytes).ok_or(truncated);
        let half = |at| word(file, at).map(u16::from_le_bytes).ok_or(truncated);
        let long = |at| word(file, at).map(u32::from_le_bytes).ok_or(truncated);

        if half(offset::BOOT_FLAG)? != BOOT_FLAG || !is_bzimage(file) {
            return Err(LoadError::UnknownFormat);
        }
        if half(offset::VERSION)? < MIN_VERSION || half(offset::XLOADFLAGS)? & XLF_KERNEL_64 == 0 {
            return Err(LoadError::Unsupported(
                "its Linux has no 64-bit entry: use a 64-bit kernel of version 3.8 or later",
            ));
        }
        if byte(offset::RELOCATABLE_KERNEL)? == 0 {
            return Err(LoadError::Unsupported("its Linux is not relocatable: build it with CONFIG_RELOCATABLE=y"));
        }
        let alignment = u64::from(long(offset::KERNEL_ALIGNMENT)?);
        if !alignment.is_power_of_two() || alignment < PAGE {
            return Err(LoadError::Unsupported(
                "its setup header names an impossible kernel alignment: pass an undamaged file",
            ));
        }
        let kernel = Self::kernel(file, byte(offset::SETUP_SECTS)?, long(offset::SYSSIZE)?)?;
        let init_size = u64::from(long(offset::INIT_SIZE)?);
        if init_size < kernel.len() as u64 {
            return Err(LoadError::Unsupported(
                "its setup header names an init_size below the kernel's size: pass an undamaged file",
            ));
        }
        let header_end = offset::MAGIC + usize::from(byte(offset::JUMP_LENGTH)?);
        let raw = file.get(offset::SETUP_SECTS..header_end.min(SETUP_HEADER_END)).ok_or(truncated)?;
        let anywhere = half(offset::XLOADFLAGS)? & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
        let initrd_end = if anywhere { FOUR_GIB } else { u64::from(long(offset::INITRD_ADDR_MAX)?) + 1 };
        Ok(Self {
            raw,
            kernel,
            pref_address: u64::from_le_bytes(word(file, offset::PREF_ADDRESS).ok_or(truncated)?),
            alignment,
            init_size,
            cmdline_size: u64::from(long(offset::CMDLINE_SIZE)?),
            initrd_end,
        })
    }

    /// The protected-mode kernel, which follows the real-mode code. Its size is in paragraphs, and the last paragraph
    /// may be cut short.
    fn kernel(file: &[u8], setup_sects: u8, syssize: u32) -> Result<&[u8], LoadError> {
        const PARAGRAPH: usize = 16;
        let truncated = LoadError::Truncated("kernel");
        let sectors = if setup_sects == 0 { 4 } else { usize::from(setup_sects) };
        let kernel = file.get((1 + sectors) * SECTOR..).ok_or(truncated)?;
        let length = syssize as usize * PARAGRAPH;
        if kernel.len() + PARAGRAPH <= length || length <= ENTRY_64 as usize {
            return Err(truncated);
        }
        Ok(&kernel[..length.min(kernel.len())])
    }
}

/// Plans the loading of a bzImage.
///
/// # Errors
///
/// The image is damaged or of an unsupported kind, or there is no room for it.
pub(crate) fn plan<'a>(input: &GuestInput<'a>, scratch: &'a mut [u8]) -> Result<LoadPlan<'a>, LoadError> {
    let header = SetupHeader::parse(input.image.bytes)?;
    let arguments = input.image.arguments;
    if arguments.len() as u64 > header.cmdline_size {
        return Err(LoadError::CommandLineTooLong { limit: header.cmdline_size });
    }
    let mut builder = PlanBuilder::new(input)?;
    let low_bytes = PAGE + PAGE_TABLES * PAGE + STACK_BYTES + GDT_BYTES + arguments.len() as u64 + 1;
    let mut low = builder.low_block(low_bytes, scratch)?;

    let preferred = header.pref_address..header.pref_address.saturating_add(header.init_size);
    let place = if preferred.start % header.alignment == 0 && builder.is_free(&preferred) {
        builder.claim_at(preferred.start, header.init_size)?
    } else {
        builder.claim_lowest(
            "kernel",
            header.init_size,
            header.alignment,
            header.pref_address.clamp(1 << 20, 16 << 20),
        )?
    };
    builder.copy(place.start, header.kernel)?;
    let initrd = place_initrd(&mut builder, input.modules, header.initrd_end)?;

    let (zero_page, page) = low.alloc(PAGE, PAGE)?;
    fill_zero_page(page, &header, input, &initrd);
    let cr3 = build_page_tables(&mut low)?;
    let (stack, _) = low.alloc(STACK_BYTES, 16)?;
    let gdt_base = build_gdt(&mut low)?;
    let command_line = low.string(arguments)?;
    // The zero page is at the block's start. Its last field is known only now.
    low.put(zero_page, offset::CMD_LINE_PTR, &(command_line as u32).to_le_bytes());
    let entry = GuestEntry::Linux64 {
        cr3: Gpa(cr3),
        gdt_base: Gpa(gdt_base),
        gdt_limit: GDT_BYTES as u16 - 1,
        rip: place.start + ENTRY_64,
        rsi: zero_page,
        rsp: stack + STACK_BYTES,
    };
    builder.finish(low, entry)
}

/// Decides the address of the initrd. The range is empty without modules.
fn place_initrd<'a>(
    builder: &mut PlanBuilder<'a>,
    modules: &[GuestModule<'a>],
    end: u64,
) -> Result<Range<u64>, LoadError> {
    // The kernel reads cpio archives at multiples of four, and skips zeros between them.
    const ARCHIVE_ALIGN: u64 = 4;
    match modules {
        [] => return Ok(0..0),
        [module] if module.range().end <= end => return Ok(module.range()),
        _ => {}
    }
    let bytes = modules.iter().map(|module| (module.bytes.len() as u64).next_multiple_of(ARCHIVE_ALIGN)).sum();
    let place = builder.claim_highest("initrd", bytes, end)?;
    let mut next = place.start;
    for module in modules {
        builder.copy(next, module.bytes)?;
        let end = next + module.bytes.len() as u64;
        next = end.next_multiple_of(ARCHIVE_ALIGN);
        builder.zero(end..next)?;
    }
    Ok(place)
}

fn fill_zero_page(page: &mut [u8], header: &SetupHeader<'_>, input: &GuestInput<'_>, initrd: &Range<u64>) {
    let &GuestInput { memory_map: map, acpi_rsdp, .. } = input;
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::SETUP_SECTS, header.raw);
    put(offset::TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
    put(offset::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
    put(offset::RAMDISK_SIZE, &((initrd.end - initrd.start) as u32).to_le_bytes());
    put(offset::ACPI_RSDP, &acpi_rsdp.unwrap_or(0).to_le_bytes());
    match input.framebuffer.and_then(|framebuffer| framebuffer.pixels()) {
        _ if !input.is_efi => put_text_screen(&mut put),
        Some(pixels) => put_pixels(&mut put, &pixels),
        None => {}
    }
    // MAX_REGIONS is the size of the table.
    put(offset::E820_ENTRIES, &[map.regions().len() as u8]);
    for (i, region) in map.regions().iter().enumerate() {
        let at = offset::E820_TABLE + i * 20;
        put(at, &region.start.to_le_bytes());
        put(at + 8, &(region.end - region.start).to_le_bytes());
        put(at + 16, &region.kind.0.to_le_bytes());
    }
}

/// The screen as EFI firmware leaves it, with the fields of the kernel's `struct screen_info`.
fn put_pixels(put: &mut impl FnMut(usize, &[u8]), pixels: &Pixels) {
    const VIDEO_TYPE_EFI: u8 = 0x70;
    const CAPABILITY_64BIT_BASE: u32 = 1 << 1;
    let screen = |field: usize| offset::SCREEN_INFO + field;
    let Pixels { address, pitch, width, height, bytes_per_pixel, colours } = *pixels;
    put(screen(0x0f), &[VIDEO_TYPE_EFI]);
    for (field, value) in
        [(0x12, width), (0x14, height), (0x16, u32::from(bytes_per_pixel) * 8), (0x24, pitch), (0x32, 1)]
    {
        put(screen(field), &(value as u16).to_le_bytes());
    }
    put(screen(0x18), &(address as u32).to_le_bytes());
    put(screen(0x1c), &(pixels.bytes().min(u32::MAX.into()) as u32).to_le_bytes());
    for (colour, field) in colours.iter().zip([0x26, 0x28, 0x2a]) {
        put(screen(field), &[colour.bits, colour.position]);
    }
    put(screen(0x36), &CAPABILITY_64BIT_BASE.to_le_bytes());
    put(screen(0x3a), &((address >> 32) as u32).to_le_bytes());
}

/// The screen as the firmware leaves it for a boot loader: 80x25 text on a VGA. Without this the kernel assumes that
/// there is no screen.
fn put_text_screen(put: &mut impl FnMut(usize, &[u8])) {
    const ORIG_VIDEO_MODE: usize = offset::SCREEN_INFO + 0x06;
    const ORIG_VIDEO_COLS: usize = offset::SCREEN_INFO + 0x07;
    const ORIG_VIDEO_LINES: usize = offset::SCREEN_INFO + 0x0e;
    const ORIG_VIDEO_IS_VGA: usize = offset::SCREEN_INFO + 0x0f;
    const ORIG_VIDEO_POINTS: usize = offset::SCREEN_INFO + 0x10;
    put(ORIG_VIDEO_MODE, &[3]);
    put(ORIG_VIDEO_COLS, &[80]);
    put(ORIG_VIDEO_LINES, &[25]);
    put(ORIG_VIDEO_IS_VGA, &[1]);
    put(ORIG_VIDEO_POINTS, &[16]);
}

/// Identity-maps the low 4 GiB with 2 MiB pages; returns the top table's address.
fn build_page_tables(low: &mut LowBlock<'_>) -> Result<u64, LoadError> {
    const TABLE: u64 = 0x3; // present, writable
    const LARGE: u64 = 0x83; // present, writable, 2 MiB
    let (base, bytes) = low.alloc(PAGE_TABLES * PAGE, PAGE)?;
    let mut put = |index: u64, value: u64| {
        let at = index as usize * 8;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(0, (base + PAGE) | TABLE);
    for directory in 0..4 {
        put(512 + directory, (base + (2 + directory) * PAGE) | TABLE);
    }
    for page in 0..4 * 512 {
        put(1024 + page, page << 21 | LARGE);
    }
    Ok(base)
}

/// The two segments that the protocol names: __BOOT_CS at 0x10 and __BOOT_DS at 0x18.
fn build_gdt(low: &mut LowBlock<'_>) -> Result<u64, LoadError> {
    const BOOT_CS: u64 = 0x00af_9b00_0000_ffff;
    const BOOT_DS: u64 = 0x00cf_9300_0000_ffff;
    let (base, bytes) = low.alloc(GDT_BYTES, 16)?;
    bytes[16..24].copy_from_slice(&BOOT_CS.to_le_bytes());
    bytes[24..32].copy_from_slice(&BOOT_DS.to_le_bytes());
    Ok(base)
}

#[cfg(test)]
#[path = "linux_tests.rs"]
mod tests;
