//! Multiboot 1 images, loaded as GRUB loads them.
//!
//! Reference: Multiboot Specification version 0.6.96, 3.1 "OS image format" to 3.4. Images with address fields are
//! copied as one piece; others are ELF, 32-bit or 64-bit, loaded by their program headers' physical addresses and
//! always entered in 32-bit mode. Modules stay where they are staged, on pages. All strings, the loader's name too, are
//! those of the loader that loaded l1hv, which decides whether they begin with the file's name.

use super::{GuestEntry, GuestInput, LoadError, LoadPlan, LowBlock, PlanBuilder, word};
use crate::memory_map::MemoryMap;
use crate::multiboot::{Framebuffer, LOADER_MAGIC, info_flags, info_offset};

const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// The header lies within this many bytes, on a multiple of four.
pub(super) const SEARCH_BYTES: usize = 8192;
/// Flags 0 to 15 are demands that a loader must meet or refuse. Page-aligned modules and memory information are always
/// provided.
const FLAGS_MET: u32 = 1 << 0 | 1 << 1;
const FLAG_VIDEO: u32 = 1 << 2;
const FLAGS_REQUIRED: u32 = 0xffff;
const FLAG_ADDRESSES: u32 = 1 << 16;

const INFO_BYTES: u64 = 120;
const MODULE_BYTES: u64 = 16;
const MAP_ENTRY_BYTES: u64 = 24;
const STACK_BYTES: u64 = 4096;
const STACK_ALIGN: u64 = 16;

/// A multiboot header, and its offset in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    offset: usize,
    flags: u32,
}

impl Header {
    /// Searches the file's beginning for a header.
    pub fn find(file: &[u8]) -> Option<Self> {
        (0..file.len().min(SEARCH_BYTES)).step_by(4).find_map(|offset| {
            let [magic, flags, checksum] = [0, 4, 8].map(|field| long(file, offset + field));
            let (flags, checksum) = (flags?, checksum?);
            let valid = magic? == HEADER_MAGIC && HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0;
            valid.then_some(Self { offset, flags })
        })
    }

    fn field(&self, file: &[u8], field: usize) -> Result<u32, LoadError> {
        long(file, self.offset + field).ok_or(LoadError::Truncated("multiboot header"))
    }

    /// Refuses demands that cannot be met. A demand for text mode is met: the firmware left the screen so.
    fn check_demands(&self, file: &[u8]) -> Result<(), LoadError> {
        const MODE_TYPE: usize = 32;
        const MODE_TEXT: u32 = 1;
        if self.flags & FLAG_VIDEO != 0 && self.field(file, MODE_TYPE)? != MODE_TEXT {
            return Err(LoadError::Unsupported("its multiboot header demands a graphics mode: build it for text mode"));
        }
        if self.flags & FLAGS_REQUIRED & !(FLAGS_MET | FLAG_VIDEO) != 0 {
            return Err(LoadError::Unsupported(
                "its multiboot header demands an unknown feature: build it for multiboot 0.6.96",
            ));
        }
        Ok(())
    }
}

fn long(bytes: &[u8], offset: usize) -> Option<u32> {
    word(bytes, offset).map(u32::from_le_bytes)
}

/// Plans the loading of a multiboot 1 image.
///
/// # Errors
///
/// The image is damaged or of an unsupported kind, or there is no room for it.
pub(crate) fn plan<'a>(
    input: &GuestInput<'a>,
    header: &Header,
    scratch: &'a mut [u8],
) -> Result<LoadPlan<'a>, LoadError> {
    let file = input.image.bytes;
    header.check_demands(file)?;
    let mut builder = PlanBuilder::new(input)?;
    let rip = if header.flags & FLAG_ADDRESSES != 0 {
        load_by_addresses(&mut builder, header, file)?
    } else {
        load_elf(&mut builder, file)?
    };
    let (mut low, info) = build_info(&mut builder, input, scratch)?;
    let (stack, _) = low.alloc(STACK_BYTES, STACK_ALIGN)?;
    let esp = (stack + STACK_BYTES) as u32;
    builder.finish(low, GuestEntry::Protected32 { rip, eax: LOADER_MAGIC, ebx: info as u32, esp })
}

/// Copies the file's bytes from `file_offset` to `start` and zeroes the rest up to `memory_bytes`.
fn load_segment<'a>(
    builder: &mut PlanBuilder<'a>,
    bytes: &'a [u8],
    start: u64,
    memory_bytes: u64,
) -> Result<(), LoadError> {
    if memory_bytes == 0 {
        return Ok(());
    }
    let range = builder.claim_at(start, memory_bytes)?;
    if !bytes.is_empty() {
        builder.copy(start, bytes)?;
    }
    builder.zero(start + bytes.len() as u64..range.end)
}

/// Loads an image whose header gives the addresses of its bytes.
fn load_by_addresses<'a>(builder: &mut PlanBuilder<'a>, header: &Header, file: &'a [u8]) -> Result<u32, LoadError> {
    let [header_address, load, load_end, bss_end, entry] = [12, 16, 20, 24, 28].map(|field| header.field(file, field));
    let (header_address, load, load_end) = (header_address?, load?, load_end?);
    let absurd = LoadError::Unsupported("its multiboot header's addresses contradict each other: link it again");
    let before_header = header_address.checked_sub(load).ok_or(absurd)? as usize;
    let start = header.offset.checked_sub(before_header).ok_or(absurd)?;
    let bytes = match load_end {
        0 => &file[start..],
        end => {
            let length = end.checked_sub(load).ok_or(absurd)? as usize;
            file.get(start..start + length).ok_or(LoadError::Truncated("loaded part"))?
        }
    };
    let memory_end = match bss_end? {
        0 => u64::from(load) + bytes.len() as u64,
        end => u64::from(end),
    };
    let memory_bytes = memory_end.checked_sub(u64::from(load)).ok_or(absurd)?;
    if memory_bytes < bytes.len() as u64 {
        return Err(absurd);
    }
    load_segment(builder, bytes, u64::from(load), memory_bytes)?;
    entry
}

/// Reads ELF headers and program headers of either class: the fields are the same, at other offsets and widths.
struct ElfReader<'a> {
    file: &'a [u8],
    is_64: bool,
}

impl<'a> ElfReader<'a> {
    fn new(file: &'a [u8]) -> Result<Self, LoadError> {
        const CLASS: usize = 4;
        const MACHINE: usize = 18;
        const LITTLE_ENDIAN: u8 = 1;
        let not_elf = LoadError::Unsupported(
            "it is multiboot without address fields and not an ELF file for x86: link it as ELF",
        );
        if word(file, 0) != Some(*b"\x7fELF") || word(file, CLASS + 1) != Some([LITTLE_ENDIAN]) {
            return Err(not_elf);
        }
        let machine = word(file, MACHINE).map(u16::from_le_bytes);
        match (word(file, CLASS), machine) {
            (Some([1]), Some(3)) => Ok(Self { file, is_64: false }),
            (Some([2]), Some(62)) => Ok(Self { file, is_64: true }),
            _ => Err(not_elf),
        }
    }

    /// The word at `offset_32` of a 32-bit file or at `offset_64` of a 64-bit one.
    fn native(&self, base: u64, offset_32: u64, offset_64: u64) -> Result<u64, LoadError> {
        let truncated = LoadError::Truncated("ELF headers");
        let at = base.checked_add(if self.is_64 { offset_64 } else { offset_32 }).ok_or(truncated)?;
        let value = match self.is_64 {
            true => word(self.file, at as usize).map(u64::from_le_bytes),
            false => long(self.file, at as usize).map(u64::from),
        };
        value.ok_or(truncated)
    }

    fn half(&self, offset_32: usize, offset_64: usize) -> Result<u64, LoadError> {
        let at = if self.is_64 { offset_64 } else { offset_32 };
        word(self.file, at).map(|bytes| u64::from(u16::from_le_bytes(bytes))).ok_or(LoadError::Truncated("ELF headers"))
    }
}

/// Loads an ELF image by its program headers. The entry is a virtual address; the segment that contains it gives the
/// physical one.
fn load_elf<'a>(builder: &mut PlanBuilder<'a>, file: &'a [u8]) -> Result<u32, LoadError> {
    const PT_LOAD: u32 = 1;
    let truncated = LoadError::Truncated("segments");
    let elf = ElfReader::new(file)?;
    let entry = elf.native(0, 24, 24)?;
    let table = elf.native(0, 28, 32)?;
    let entry_bytes = elf.half(42, 54)?;
    let mut rip = None;
    for index in 0..elf.half(44, 56)? {
        let at = table.checked_add(index * entry_bytes).ok_or(truncated)?;
        if long(file, at as usize).ok_or(LoadError::Truncated("ELF headers"))? != PT_LOAD {
            continue;
        }
        let offset = elf.native(at, 4, 8)?;
        let virt = elf.native(at, 8, 16)?;
        let phys = elf.native(at, 12, 24)?;
        let file_bytes = elf.native(at, 16, 32)?;
        let memory_bytes = elf.native(at, 20, 40)?;
        let end = offset.checked_add(file_bytes).ok_or(truncated)?;
        let bytes = file.get(offset as usize..end as usize).ok_or(truncated)?;
        if file_bytes > memory_bytes {
            return Err(LoadError::Unsupported("an ELF segment is larger in the file than in memory: link it again"));
        }
        load_segment(builder, bytes, phys, memory_bytes)?;
        if entry.checked_sub(virt).is_some_and(|offset| offset < memory_bytes) {
            rip = Some(phys + (entry - virt));
        }
    }
    // Claimed segments are below 4 GiB.
    rip.map(|rip| rip as u32).ok_or(LoadError::Unsupported("its ELF entry is in none of its segments: link it again"))
}

/// Composes the information structure; returns its block, with room for the stack, and its address.
fn build_info<'a>(
    builder: &mut PlanBuilder<'a>,
    input: &GuestInput<'a>,
    scratch: &'a mut [u8],
) -> Result<(LowBlock<'a>, u64), LoadError> {
    let strings = core::iter::once(&input.image).chain(input.modules).map(|module| module.string.len() as u64 + 1);
    let modules_bytes = input.modules.len() as u64 * MODULE_BYTES;
    let map_bytes = input.memory_map.regions().len() as u64 * MAP_ENTRY_BYTES;
    let strings = strings.sum::<u64>() + input.loader_name.len() as u64 + 1;
    let total = INFO_BYTES + modules_bytes + map_bytes + strings + STACK_BYTES + STACK_ALIGN;
    let mut low = builder.low_block(total, scratch)?;

    let (info, _) = low.alloc(INFO_BYTES, 8)?;
    let (modules, _) = low.alloc(modules_bytes, 8)?;
    let (map, entries) = low.alloc(map_bytes, 8)?;
    fill_map(entries, input.memory_map);
    for (i, module) in input.modules.iter().enumerate() {
        let string = low.string(module.string)?;
        let range = module.range();
        for (field, value) in [range.start, range.end, string].into_iter().enumerate() {
            low.put(modules, i * MODULE_BYTES as usize + field * 4, &(value as u32).to_le_bytes());
        }
    }
    let command_line = low.string(input.image.string)?;
    let loader_name = low.string(input.loader_name)?;
    let flags = info_flags::MEMORY
        | info_flags::COMMAND_LINE
        | info_flags::MODULES
        | info_flags::MEMORY_MAP
        | info_flags::LOADER_NAME
        | input.boot_device.map_or(0, |_| info_flags::BOOT_DEVICE)
        | input.framebuffer.map_or(0, |_| info_flags::FRAMEBUFFER);
    let (lower_kib, upper_kib) = memory_sizes_kib(input.memory_map);
    for (field, value) in [
        (info_offset::FLAGS, u64::from(flags)),
        (info_offset::MEM_LOWER, lower_kib),
        (info_offset::MEM_UPPER, upper_kib),
        (info_offset::BOOT_DEVICE, input.boot_device.unwrap_or(0).into()),
        (info_offset::COMMAND_LINE, command_line),
        (info_offset::MODULE_COUNT, input.modules.len() as u64),
        (info_offset::MODULE_ADDRESS, modules),
        (info_offset::MAP_LENGTH, map_bytes),
        (info_offset::MAP_ADDRESS, map),
        (info_offset::LOADER_NAME, loader_name),
    ] {
        low.put(info, field as usize, &(value as u32).to_le_bytes());
    }
    if let Some(Framebuffer(bytes)) = &input.framebuffer {
        low.put(info, info_offset::FRAMEBUFFER as usize, bytes);
    }
    Ok((low, info))
}

fn fill_map(entries: &mut [u8], map: &MemoryMap) {
    const SIZE_WITHOUT_ITSELF: u32 = MAP_ENTRY_BYTES as u32 - 4;
    for (entry, region) in entries.chunks_exact_mut(MAP_ENTRY_BYTES as usize).zip(map.regions()) {
        entry[0..4].copy_from_slice(&SIZE_WITHOUT_ITSELF.to_le_bytes());
        entry[4..12].copy_from_slice(&region.start.to_le_bytes());
        entry[12..20].copy_from_slice(&(region.end - region.start).to_le_bytes());
        entry[20..24].copy_from_slice(&region.kind.0.to_le_bytes());
    }
}

/// KiB of usable memory from 0 (at most 640) and from 1 MiB, each up to the first hole.
fn memory_sizes_kib(map: &MemoryMap) -> (u64, u64) {
    const MIB: u64 = 1 << 20;
    const LOWER_KIB: u64 = 640;
    let up_to_hole = |start| map.usable_from(start) / 1024;
    (up_to_hole(0).min(LOWER_KIB), up_to_hole(MIB).min(u64::from(u32::MAX)))
}

#[cfg(test)]
#[path = "multiboot_tests.rs"]
mod tests;
