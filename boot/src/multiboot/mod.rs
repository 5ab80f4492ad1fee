//! The information that a multiboot loader passes: command line, modules, memory map. It comes in two forms: multiboot 1,
//! here, from QEMU and from GRUB on a PC with a BIOS, and multiboot 2, in `v2`, from GRUB on a PC with EFI firmware.
//!
//! Reference: Multiboot Specification version 0.6.96, 3.3 "Boot information format". All of it is copied out of the
//! loader's structures at the start, because they lie in memory that becomes the guest's.

mod v2;

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;

use crate::memory_map::{MemoryMap, Region, RegionKind, TooManyRegions};
use crate::phys::{OutOfRange, PhysMemory};

/// The value that the loader leaves in EAX.
pub const LOADER_MAGIC: u32 = 0x2BAD_B002;

/// The most modules: the guest's image and the modules that belong to it.
pub const MAX_MODULES: usize = 32;

/// The most bytes of all strings together.
const STRING_BYTES: usize = 8192;

/// The flags of the information structure that this parser uses. The structure for the guest uses them too.
pub(crate) mod info_flags {
    pub const MEMORY: u32 = 1 << 0;
    pub const BOOT_DEVICE: u32 = 1 << 1;
    pub const COMMAND_LINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
    pub const FRAMEBUFFER: u32 = 1 << 12;
}

/// Offsets of the information structure's fields.
pub(crate) mod info_offset {
    pub const FLAGS: u64 = 0;
    pub const MEM_LOWER: u64 = 4;
    pub const MEM_UPPER: u64 = 8;
    pub const BOOT_DEVICE: u64 = 12;
    pub const COMMAND_LINE: u64 = 16;
    pub const MODULE_COUNT: u64 = 20;
    pub const MODULE_ADDRESS: u64 = 24;
    pub const MAP_LENGTH: u64 = 44;
    pub const MAP_ADDRESS: u64 = 48;
    pub const LOADER_NAME: u64 = 64;
    pub const FRAMEBUFFER: u64 = 88;
}

/// Why the loader's information is unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BootInfoError {
    /// EAX holds the value of neither kind of loader.
    NotMultiboot(u32),
    /// A structure is not in memory.
    OutOfRange(OutOfRange),
    /// A tag is shorter than its fields, or reaches beyond the end.
    BadTag(u64),
    /// There is no memory map.
    NoMemoryMap,
    /// A memory map entry is shorter than its fields.
    BadMapEntry(u64),
    /// The memory map is too long.
    TooManyRegions,
    /// More than [`MAX_MODULES`] modules.
    TooManyModules(u32),
    /// A module ends before it starts, or does not start on a page.
    BadModule {
        /// Its place in the loader's list.
        index: usize,
    },
    /// The strings together are too long.
    StringsTooLong,
}

impl From<OutOfRange> for BootInfoError {
    fn from(error: OutOfRange) -> Self {
        Self::OutOfRange(error)
    }
}

impl From<TooManyRegions> for BootInfoError {
    fn from(_: TooManyRegions) -> Self {
        Self::TooManyRegions
    }
}

impl fmt::Display for BootInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMultiboot(magic) => {
                write!(
                    f,
                    "eax is {magic:#x} at the entry: boot l1hv with GRUB's `multiboot` or `multiboot2` command or `qemu -kernel`"
                )
            }
            Self::OutOfRange(error) => {
                write!(f, "the boot loader's information is damaged: {error}: use GRUB 2 or QEMU")
            }
            Self::BadTag(address) => {
                write!(f, "the boot loader's information at {address:#x} is damaged: use GRUB 2")
            }
            Self::NoMemoryMap => f.write_str("the boot loader gave no memory map: use GRUB 2 or QEMU"),
            Self::BadMapEntry(address) => {
                write!(f, "the boot loader's memory map entry at {address:#x} is damaged: use GRUB 2 or QEMU")
            }
            Self::TooManyRegions => write!(f, "{TooManyRegions}: remove memory or devices"),
            Self::TooManyModules(count) => write!(f, "{count} modules: pass at most {MAX_MODULES}"),
            Self::BadModule { index } => {
                write!(f, "module {index} ends before it starts or is not page-aligned: use GRUB 2 or QEMU")
            }
            Self::StringsTooLong => {
                write!(f, "the command lines are longer than {STRING_BYTES} bytes together: shorten them")
            }
        }
    }
}

impl core::error::Error for BootInfoError {}

/// A string within [`BootInfo`].
type StringRange = Range<usize>;

/// One module as the loader placed it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// The physical addresses of its bytes; starts on a page.
    pub range: Range<u64>,
    string: StringRange,
}

/// What the loader says of the screen: the fields of the information structure from `framebuffer_addr` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Framebuffer(pub [u8; 28]);

/// A screen of pixels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pixels {
    /// The physical address of the first pixel.
    pub address: u64,
    /// Bytes from one row to the next.
    pub pitch: u32,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Bytes of a pixel.
    pub bytes_per_pixel: u8,
    /// Red, green and blue.
    pub colours: [Colour; 3],
}

/// A colour's part of a pixel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Colour {
    /// Its lowest bit.
    pub position: u8,
    /// How many bits it has.
    pub bits: u8,
}

impl Pixels {
    /// The bytes of all rows.
    pub const fn bytes(&self) -> u64 {
        self.pitch as u64 * self.height as u64
    }

    /// Where a pixel is, from the first one on.
    pub const fn offset(&self, x: u32, y: u32) -> u64 {
        y as u64 * self.pitch as u64 + x as u64 * self.bytes_per_pixel as u64
    }
}

impl Framebuffer {
    const TYPE: usize = 21;

    /// The pixels, if it is a screen of them.
    pub fn pixels(&self) -> Option<Pixels> {
        const COLOURS: u8 = 1;
        let Self(bytes) = self;
        let long = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let colour = |at: usize| Colour { position: bytes[at], bits: bytes[at + 1] };
        let pixels = Pixels {
            address: u64::from(long(0)) | u64::from(long(4)) << 32,
            pitch: long(8),
            width: long(12),
            height: long(16),
            bytes_per_pixel: bytes[20].div_ceil(8),
            colours: [colour(22), colour(24), colour(26)],
        };
        let row = u64::from(pixels.width) * u64::from(pixels.bytes_per_pixel);
        let fits = pixels.address.checked_add(pixels.bytes()).is_some() && row <= pixels.pitch.into();
        (bytes[Self::TYPE] == COLOURS && fits).then_some(pixels)
    }

    /// Whether it is a screen with a palette, which lies elsewhere and is lost.
    const fn has_palette(&self) -> bool {
        const INDEXED: u8 = 0;
        self.0[Self::TYPE] == INDEXED
    }
}

/// The loader's information.
#[derive(Debug)]
pub struct BootInfo {
    /// The BIOS' drive, in the highest byte, and the partition that the loader has loaded l1hv from.
    pub boot_device: Option<u32>,
    /// The screen.
    pub framebuffer: Option<Framebuffer>,
    /// Whether the firmware is EFI.
    pub is_efi: bool,
    /// The address of ACPI's root pointer, if the firmware tells it.
    pub acpi_rsdp: Option<u64>,
    strings: ArrayVec<u8, STRING_BYTES>,
    command_line: StringRange,
    loader_name: StringRange,
    /// The modules in the loader's order.
    pub modules: ArrayVec<Module, MAX_MODULES>,
    /// The memory map, sanitised.
    pub memory_map: MemoryMap,
}

impl BootInfo {
    /// Reads the information structure at physical `info`.
    ///
    /// # Errors
    ///
    /// `magic` is not that of a multiboot loader, or a structure is damaged.
    pub fn parse(memory: &impl PhysMemory, magic: u32, info: u32) -> Result<Self, BootInfoError> {
        match magic {
            LOADER_MAGIC => Self::parse_v1(memory, info),
            v2::LOADER_MAGIC => v2::parse(memory, info.into()),
            _ => Err(BootInfoError::NotMultiboot(magic)),
        }
    }

    const fn empty() -> Self {
        Self {
            boot_device: None,
            framebuffer: None,
            is_efi: false,
            acpi_rsdp: None,
            strings: ArrayVec::new_const(),
            command_line: 0..0,
            loader_name: 0..0,
            modules: ArrayVec::new_const(),
            memory_map: MemoryMap::empty(),
        }
    }

    fn parse_v1(memory: &impl PhysMemory, info: u32) -> Result<Self, BootInfoError> {
        let reader = Reader { memory, info: u64::from(info) };
        let flags = reader.field(info_offset::FLAGS)?;
        if flags & info_flags::MEMORY_MAP == 0 {
            return Err(BootInfoError::NoMemoryMap);
        }
        let mut boot_info = Self { memory_map: reader.memory_map()?, ..Self::empty() };
        if flags & info_flags::BOOT_DEVICE != 0 {
            boot_info.boot_device = Some(reader.field(info_offset::BOOT_DEVICE)?);
        }
        if flags & info_flags::FRAMEBUFFER != 0 {
            let mut framebuffer = Framebuffer([0; 28]);
            memory.read(reader.info + info_offset::FRAMEBUFFER, &mut framebuffer.0)?;
            boot_info.framebuffer = Some(framebuffer).filter(|framebuffer| !framebuffer.has_palette());
        }
        if flags & info_flags::LOADER_NAME != 0 {
            boot_info.loader_name = boot_info.keep_string(memory, reader.field(info_offset::LOADER_NAME)?.into())?;
        }
        if flags & info_flags::COMMAND_LINE != 0 {
            boot_info.command_line = boot_info.keep_string(memory, reader.field(info_offset::COMMAND_LINE)?.into())?;
        }
        if flags & info_flags::MODULES != 0 {
            boot_info.read_modules(&reader)?;
        }
        Ok(boot_info)
    }

    /// Where the modules are, in the loader's order.
    pub fn module_ranges(&self) -> ArrayVec<Range<u64>, MAX_MODULES> {
        self.modules.iter().map(|module| module.range.clone()).collect()
    }

    /// The host's own command line.
    pub fn command_line(&self) -> &[u8] {
        self.arguments(&self.command_line)
    }

    /// The loader's name; empty if it gave none.
    pub fn loader_name(&self) -> &[u8] {
        &self.strings[self.loader_name.clone()]
    }

    /// The string that was given with a module of this `BootInfo`, as the loader passed it.
    pub fn module_string(&self, module: &Module) -> &[u8] {
        self.strings[module.string.clone()].trim_ascii()
    }

    /// The arguments that were given with a module of this `BootInfo`, without the file's name.
    pub fn module_arguments(&self, module: &Module) -> &[u8] {
        self.arguments(&module.string)
    }

    /// The words after the file's name. GRUB Legacy and QEMU put the file's name first. GRUB 2 passes only the words
    /// that follow the name in its configuration, of which the first may be an absolute file name again.
    fn arguments(&self, string: &StringRange) -> &[u8] {
        let string = self.strings[string.clone()].trim_ascii();
        let loader = self.loader_name();
        let begins_with_name = loader.starts_with(b"qemu") || loader.starts_with(b"GNU GRUB 0.");
        if !(begins_with_name || string.starts_with(b"/")) {
            return string;
        }
        match string.iter().position(|&byte| byte == b' ') {
            Some(space) => string[space..].trim_ascii_start(),
            None => &[],
        }
    }

    fn keep_string(&mut self, memory: &impl PhysMemory, address: u64) -> Result<StringRange, BootInfoError> {
        let start = self.strings.len();
        for address in address.. {
            let mut byte = [0];
            memory.read(address, &mut byte)?;
            if byte == [0] {
                break;
            }
            self.strings.try_push(byte[0]).map_err(|_| BootInfoError::StringsTooLong)?;
        }
        Ok(start..self.strings.len())
    }

    fn read_modules(&mut self, reader: &Reader<'_, impl PhysMemory>) -> Result<(), BootInfoError> {
        const ENTRY_BYTES: u64 = 16;
        let count = reader.field(info_offset::MODULE_COUNT)?;
        let table = u64::from(reader.field(info_offset::MODULE_ADDRESS)?);
        if count as usize > MAX_MODULES {
            return Err(BootInfoError::TooManyModules(count));
        }
        for index in 0..u64::from(count) {
            let entry = table + index * ENTRY_BYTES;
            let start = u64::from(reader.memory.read_u32(entry)?);
            let end = u64::from(reader.memory.read_u32(entry + 4)?);
            let string = reader.memory.read_u32(entry + 8)?;
            self.add_module(reader.memory, start..end, string.into())?;
        }
        Ok(())
    }

    /// Adds a module, whose string is at `string`, if that is not 0.
    fn add_module(&mut self, memory: &impl PhysMemory, range: Range<u64>, string: u64) -> Result<(), BootInfoError> {
        const PAGE: u64 = 4096;
        let index = self.modules.len();
        if range.end < range.start || !range.start.is_multiple_of(PAGE) {
            return Err(BootInfoError::BadModule { index });
        }
        let string = if string == 0 { 0..0 } else { self.keep_string(memory, string)? };
        let module = Module { range, string };
        self.modules.try_push(module).map_err(|_| BootInfoError::TooManyModules(index as u32 + 1))
    }
}

struct Reader<'a, M> {
    memory: &'a M,
    info: u64,
}

impl<M: PhysMemory> Reader<'_, M> {
    fn field(&self, offset: u64) -> Result<u32, OutOfRange> {
        self.memory.read_u32(self.info + offset)
    }

    fn memory_map(&self) -> Result<MemoryMap, BootInfoError> {
        let start = u64::from(self.field(info_offset::MAP_ADDRESS)?);
        let end = start + u64::from(self.field(info_offset::MAP_LENGTH)?);
        let mut claims = ArrayVec::<Region, { crate::memory_map::MAX_REGIONS }>::new();
        let mut entry = start;
        while entry < end {
            /// Bytes of base, length and kind. The size field before them does not count itself.
            const ENTRY_BYTES: u32 = 20;
            let size = self.memory.read_u32(entry)?;
            if size < ENTRY_BYTES || entry + 4 + u64::from(size) > end {
                return Err(BootInfoError::BadMapEntry(entry));
            }
            let base = self.memory.read_u64(entry + 4)?;
            let length = self.memory.read_u64(entry + 12)?;
            let kind = RegionKind(self.memory.read_u32(entry + 20)?);
            let claim = Region { start: base, end: base.saturating_add(length), kind };
            claims.try_push(claim).map_err(|_| BootInfoError::TooManyRegions)?;
            entry += 4 + u64::from(size);
        }
        Ok(MemoryMap::sanitize(claims)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phys::FakePhys;
    use proptest::prelude::*;
    use std::string::ToString;
    use std::vec;
    use std::vec::Vec;

    const BASE: u32 = 0x9000;
    const MAP: usize = 0x100;
    const MODULES: usize = 0x200;
    const STRINGS: usize = 0x300;

    /// A loader that passes `strings`: its own name, the host's command line, and one per module.
    fn loader(strings: &[&str]) -> FakePhys {
        let mut bytes = vec![0; 0x1000];
        let mut put = |offset: usize, value: u32| bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        put(0, info_flags::COMMAND_LINE | info_flags::MODULES | info_flags::MEMORY_MAP | info_flags::LOADER_NAME);
        put(info_offset::MODULE_COUNT as usize, strings.len() as u32 - 2);
        put(info_offset::MODULE_ADDRESS as usize, BASE + MODULES as u32);
        put(info_offset::MAP_ADDRESS as usize, BASE + MAP as u32);
        put(info_offset::MAP_LENGTH as usize, 48);
        for (i, (base, length, kind)) in [(0, 0x9_fc00, 1), (0x10_0000, 0x700_0000, 1)].into_iter().enumerate() {
            put(MAP + i * 24, 20);
            put(MAP + i * 24 + 4, base);
            put(MAP + i * 24 + 12, length);
            put(MAP + i * 24 + 20, kind);
        }
        let mut string = STRINGS;
        for (i, text) in strings.iter().enumerate() {
            let pointer = match i {
                0 => info_offset::LOADER_NAME as usize,
                1 => info_offset::COMMAND_LINE as usize,
                _ => {
                    let start = 0x20_0000 + i as u32 * 0x1_0000;
                    put(MODULES + (i - 2) * 16, start);
                    put(MODULES + (i - 2) * 16 + 4, start + 0x123);
                    MODULES + (i - 2) * 16 + 8
                }
            };
            put(pointer, BASE + string as u32);
            string += text.len() + 1;
        }
        let joined: std::string::String = strings.iter().flat_map(|text| [text, "\0"]).collect();
        bytes[STRINGS..STRINGS + joined.len()].copy_from_slice(joined.as_bytes());
        FakePhys { base: u64::from(BASE), bytes }
    }

    fn parse(memory: &FakePhys) -> Result<BootInfo, BootInfoError> {
        BootInfo::parse(memory, LOADER_MAGIC, BASE)
    }

    fn texts(info: &BootInfo) -> Vec<&str> {
        let arguments = info.modules.iter().map(|module| info.module_arguments(module));
        core::iter::once(info.command_line()).chain(arguments).map(|text| str::from_utf8(text).unwrap()).collect()
    }

    #[test]
    fn qemu_puts_the_file_name_first_and_it_is_removed() {
        let info = parse(&loader(&["qemu", "target/l1hv log=debug", "bzImage quiet  ro", "initrd"])).unwrap();
        assert_eq!(texts(&info), ["log=debug", "quiet  ro", ""]);
        assert_eq!(info.modules[1].range, 0x23_0000..0x23_0123);
        assert_eq!(info.memory_map.usable_bytes(), 0x9_fc00 + 0x700_0000);
    }

    #[test]
    fn grub_legacy_puts_the_file_name_first_and_it_is_removed() {
        let info = parse(&loader(&["GNU GRUB 0.97", "/l1hv stats", "/vmlinuz quiet"])).unwrap();
        assert_eq!(texts(&info), ["stats", "quiet"]);
    }

    #[test]
    fn grub_2_passes_no_file_name_and_nothing_is_removed() {
        let info = parse(&loader(&["GRUB 2.06-13+deb12u1", "stats", " console=ttyS0 quiet", ""])).unwrap();
        assert_eq!(texts(&info), ["stats", "console=ttyS0 quiet", ""]);
    }

    #[test]
    fn an_absolute_file_name_is_removed_whoever_put_it_there() {
        let info = parse(&loader(&["GRUB 2.06", "/l1hv stats", "/tests/vmx.elf one two", "root=/dev/sda ro"])).unwrap();
        assert_eq!(texts(&info), ["stats", "one two", "root=/dev/sda ro"]);
        assert_eq!(info.module_string(&info.modules[0]), b"/tests/vmx.elf one two");
    }

    #[test]
    fn an_entry_from_something_else_is_refused() {
        let memory = loader(&["qemu", ""]);
        assert_eq!(BootInfo::parse(&memory, 1, BASE).unwrap_err(), BootInfoError::NotMultiboot(1));
    }

    #[test]
    fn a_loader_without_a_memory_map_is_refused() {
        let mut memory = loader(&["qemu", ""]);
        memory.bytes[0] = 0;
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::NoMemoryMap);
    }

    #[test]
    fn a_memory_map_entry_that_is_too_short_is_refused_instead_of_looping() {
        let mut memory = loader(&["qemu", ""]);
        memory.bytes[MAP + 24] = 19;
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::BadMapEntry(u64::from(BASE) + MAP as u64 + 24));
    }

    #[test]
    fn modules_that_are_too_many_reversed_or_not_on_a_page_are_refused() {
        let mut memory = loader(&["qemu", "", "a"]);
        memory.bytes[info_offset::MODULE_COUNT as usize] = 33;
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::TooManyModules(33));
        let mut memory = loader(&["qemu", "", "a"]);
        memory.bytes[MODULES + 6] = 0;
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::BadModule { index: 0 });
        let mut memory = loader(&["qemu", "", "a"]);
        memory.bytes[MODULES] = 1;
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::BadModule { index: 0 });
    }

    #[test]
    fn strings_without_an_end_are_refused() {
        let mut memory = loader(&["qemu", ""]);
        memory.bytes[STRINGS..].fill(b'x');
        let end = OutOfRange { address: u64::from(BASE) + 0x1000, length: 1 };
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::OutOfRange(end));
        memory.bytes.resize(0x8000, b'x');
        assert_eq!(parse(&memory).unwrap_err(), BootInfoError::StringsTooLong);
    }

    proptest! {
        #[test]
        fn no_information_structure_panics(
            changes in prop::collection::vec((0usize..0x400, any::<u8>()), 1..40), info in any::<u32>(),
        ) {
            let mut memory = loader(&["qemu", "l1hv", "bzImage a b", "initrd"]);
            for (offset, byte) in changes {
                memory.bytes[offset] = byte;
            }
            for address in [BASE, info] {
                if let Err(error) = BootInfo::parse(&memory, LOADER_MAGIC, address) {
                    prop_assert!(!error.to_string().contains('\n'));
                }
            }
        }
    }
}
