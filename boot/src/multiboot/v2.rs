//! The information of a multiboot 2 loader: tags, one after the other.
//!
//! Reference: Multiboot2 Specification version 2.0, 3.6 "Boot information format".

use arrayvec::ArrayVec;

use super::{BootInfo, BootInfoError, Framebuffer};
use crate::efi;
use crate::memory_map::{MAX_REGIONS, MemoryMap, Region, RegionKind};
use crate::phys::PhysMemory;

/// The value that the loader leaves in EAX.
pub const LOADER_MAGIC: u32 = 0x36D7_6289;

/// Kinds of tags.
mod tag {
    pub const END: u32 = 0;
    pub const COMMAND_LINE: u32 = 1;
    pub const LOADER_NAME: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const BOOT_DEVICE: u32 = 5;
    pub const MEMORY_MAP: u32 = 6;
    pub const FRAMEBUFFER: u32 = 8;
    pub const EFI_64: u32 = 12;
}

/// The most bytes of all tags: more than the longest strings and maps that the host takes need.
const MOST_BYTES: u32 = 1 << 20;

/// Reads the tags at physical `info`.
pub(super) fn parse(memory: &impl PhysMemory, info: u64) -> Result<BootInfo, BootInfoError> {
    const FIRST_TAG: u64 = 8;
    const HEADER: u64 = 8;
    const ALIGN: u64 = 8;
    let total = memory.read_u32(info)?;
    if total > MOST_BYTES {
        return Err(BootInfoError::BadTag(info));
    }
    let end = info + u64::from(total);
    let mut boot_info = BootInfo::empty();
    let mut memory_map = None;
    let mut modules = ArrayVec::<u64, { super::MAX_MODULES }>::new();
    let mut module_count = 0;
    let mut command_line = None;
    let mut at = info + FIRST_TAG;
    while at + HEADER <= end {
        let (kind, size) = (memory.read_u32(at)?, u64::from(memory.read_u32(at + 4)?));
        if size < HEADER || at + size > end {
            return Err(BootInfoError::BadTag(at));
        }
        match kind {
            tag::END => break,
            tag::COMMAND_LINE => command_line = Some(at + 8),
            // What is before the words of other strings depends on the loader's name.
            tag::LOADER_NAME => boot_info.loader_name = boot_info.keep_string(memory, at + 8)?,
            tag::MODULE => {
                module_count += 1;
                // One that is too many is counted only.
                let _ = modules.try_push(at);
            }
            tag::BOOT_DEVICE => {
                let [drive, partition] = [memory.read_u32(at + 8)?, memory.read_u32(at + 12)?];
                boot_info.boot_device = Some(drive << 24 | (partition & 0xff) << 16 | 0xffff);
            }
            tag::MEMORY_MAP => memory_map = Some(read_map(memory, at, size)?),
            tag::FRAMEBUFFER => boot_info.framebuffer = read_framebuffer(memory, at, size)?,
            tag::EFI_64 => {
                boot_info.is_efi = true;
                boot_info.acpi_rsdp = efi::acpi_rsdp(memory, memory.read_u64(at + 8)?);
            }
            _ => {}
        }
        at += size.next_multiple_of(ALIGN);
    }
    if module_count > modules.len() as u32 {
        return Err(BootInfoError::TooManyModules(module_count));
    }
    if let Some(string) = command_line {
        boot_info.command_line = boot_info.keep_string(memory, string)?;
    }
    for module in modules {
        let range = u64::from(memory.read_u32(module + 8)?)..u64::from(memory.read_u32(module + 12)?);
        boot_info.add_module(memory, range, module + 16)?;
    }
    boot_info.memory_map = memory_map.ok_or(BootInfoError::NoMemoryMap)?;
    Ok(boot_info)
}

fn read_map(memory: &impl PhysMemory, tag: u64, size: u64) -> Result<MemoryMap, BootInfoError> {
    const FIRST: u64 = 16;
    const LEAST_ENTRY: u64 = 20;
    let entry_bytes = u64::from(memory.read_u32(tag + 8)?);
    if entry_bytes < LEAST_ENTRY {
        return Err(BootInfoError::BadMapEntry(tag));
    }
    let mut claims = ArrayVec::<Region, MAX_REGIONS>::new();
    let mut entry = tag + FIRST;
    while entry + entry_bytes <= tag + size {
        let (start, length) = (memory.read_u64(entry)?, memory.read_u64(entry + 8)?);
        let kind = RegionKind(memory.read_u32(entry + 16)?);
        let claim = Region { start, end: start.saturating_add(length), kind };
        claims.try_push(claim).map_err(|_| BootInfoError::TooManyRegions)?;
        entry += entry_bytes;
    }
    Ok(MemoryMap::sanitize(claims)?)
}

/// The same fields as in multiboot 1, but for two bytes before the colours.
fn read_framebuffer(memory: &impl PhysMemory, tag: u64, size: u64) -> Result<Option<Framebuffer>, BootInfoError> {
    const COMMON: usize = 22;
    const COLOURS: u64 = 32;
    let mut bytes = [0; 28];
    if size < COLOURS {
        return Err(BootInfoError::BadTag(tag));
    }
    let (common, colours) = bytes.split_at_mut(COMMON);
    memory.read(tag + 8, common)?;
    if size >= COLOURS + colours.len() as u64 {
        memory.read(tag + COLOURS, colours)?;
    }
    Ok(Some(Framebuffer(bytes)).filter(|framebuffer| !framebuffer.has_palette()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phys::FakePhys;
    use proptest::prelude::*;
    use std::string::ToString;
    use std::vec;
    use std::vec::Vec;

    const BASE: u64 = 0x9000;
    const SYSTEM_TABLE: u64 = BASE + 0x800;

    fn tag(kind: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [kind, content.len() as u32 + 8].into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn module(start: u32, end: u32, string: &str) -> Vec<u8> {
        tag(3, &[&words(&[start, end])[..], string.as_bytes(), b"\0"].concat())
    }

    /// What GRUB passes on a PC with EFI firmware.
    fn tags() -> Vec<Vec<u8>> {
        let map =
            words(&[24, 0, 0, 0, 0xa_0000, 0, 1, 0, 0x10_0000, 0, 0x700_0000, 0, 1, 0, 0x710_0000, 0, 0x1000, 0, 3, 0]);
        vec![
            tag(1, b"log=debug boot=disk\0"),
            tag(2, b"GRUB 2.06\0"),
            module(0x20_0000, 0x20_0123, "console=ttyS0"),
            module(0x30_0000, 0x30_0001, ""),
            tag(5, &words(&[0x80, 1, u32::MAX])),
            tag(6, &map),
            tag(8, &[&words(&[0xc000_0000, 0, 4096, 1024, 768])[..], &[32, 1, 0, 0, 16, 8, 8, 8, 0, 8]].concat()),
            tag(12, &SYSTEM_TABLE.to_le_bytes()),
            tag(0, &[]),
        ]
    }

    fn memory(tags: &[Vec<u8>]) -> FakePhys {
        let tags = tags.concat();
        let mut bytes = words(&[tags.len() as u32 + 8, 0]);
        bytes.extend(tags);
        bytes.resize(0x1000, 0);
        let fixture = efi::fixtures::system_table(SYSTEM_TABLE, 0x712_0014);
        bytes[0x800..0x800 + fixture.len()].copy_from_slice(&fixture);
        FakePhys { base: BASE, bytes }
    }

    fn parse(memory: &FakePhys) -> Result<BootInfo, BootInfoError> {
        BootInfo::parse(memory, LOADER_MAGIC, BASE as u32)
    }

    #[test]
    fn everything_that_grub_passes_is_read() {
        let info = parse(&memory(&tags())).unwrap();
        assert_eq!((info.command_line(), info.loader_name()), (&b"log=debug boot=disk"[..], &b"GRUB 2.06"[..]));
        let modules: Vec<_> = info.modules.iter().map(|m| (m.range.clone(), info.module_arguments(m))).collect();
        assert_eq!(modules, [(0x20_0000..0x20_0123, &b"console=ttyS0"[..]), (0x30_0000..0x30_0001, &b""[..])]);
        assert_eq!(info.boot_device, Some(0x8001_ffff));
        assert_eq!((info.is_efi, info.acpi_rsdp), (true, Some(0x712_0014)));
        assert_eq!(info.memory_map.usable_bytes(), 0xa_0000 + 0x700_0000);
        let Framebuffer(bytes) = info.framebuffer.unwrap();
        assert_eq!(bytes[20..], [32, 1, 16, 8, 8, 8, 0, 8]);
    }

    #[test]
    fn a_file_name_before_the_words_is_removed_whatever_the_order_of_the_tags() {
        let mut tags = tags();
        tags[0] = tag(1, b"/l1hv stats\0");
        tags.swap(0, 1);
        assert_eq!(parse(&memory(&tags)).unwrap().command_line(), b"stats");
    }

    #[test]
    fn a_machine_without_efi_is_not_one_with_it() {
        let mut tags = tags();
        tags.remove(7);
        let info = parse(&memory(&tags)).unwrap();
        assert_eq!((info.is_efi, info.acpi_rsdp), (false, None));
    }

    #[test]
    fn what_is_damaged_or_too_much_is_refused() {
        let refused = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
            let mut tags = tags();
            change(&mut tags);
            parse(&memory(&tags)).unwrap_err()
        };
        assert_eq!(refused(&|tags| _ = tags.remove(5)), BootInfoError::NoMemoryMap);
        assert_eq!(refused(&|tags| tags[0][4] = 7), BootInfoError::BadTag(BASE + 8));
        assert_eq!(refused(&|tags| tags[0][6] = 1), BootInfoError::BadTag(BASE + 8));
        assert!(matches!(refused(&|tags| tags[5][8] = 19), BootInfoError::BadMapEntry(_)));
        assert_eq!(refused(&|tags| tags[2] = module(0x20_0010, 0x20_0123, "")), BootInfoError::BadModule { index: 0 });
        let many = |tags: &mut Vec<Vec<u8>>| {
            tags.splice(2..2, (0..31).map(|_| module(0x20_0000, 0x20_0000, "")));
        };
        assert_eq!(refused(&many), BootInfoError::TooManyModules(33));
        let mut endless = memory(&tags());
        endless.bytes[2] = 0x11;
        assert_eq!(parse(&endless).unwrap_err(), BootInfoError::BadTag(BASE));
    }

    proptest! {
        #[test]
        fn no_tags_panic(changes in prop::collection::vec((0usize..0xa00, any::<u8>()), 1..40)) {
            let mut memory = memory(&tags());
            for (offset, byte) in changes {
                memory.bytes[offset] = byte;
            }
            if let Err(error) = parse(&memory) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
