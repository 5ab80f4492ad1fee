//! Guest images: their place in memory, and the state in which the guest begins.
//!
//! A loader reads the staged modules and returns a [`LoadPlan`]; nothing is written until the whole plan is complete.
//! Structures that the guest's boot protocol requires in low memory are composed in a scratch buffer of the host and
//! copied like the rest.

mod builder;
#[cfg(test)]
mod fixtures;
pub mod linux;
pub mod multiboot;

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;
use ept::Gpa;

use crate::memory_map::MemoryMap;
use crate::multiboot::Framebuffer;
use crate::stop::StopKind;
pub(crate) use builder::{LowBlock, PlanBuilder};

/// The most copies in a plan.
pub const MAX_COPIES: usize = 64;
/// The most ranges that a plan zeroes.
pub const MAX_ZEROS: usize = 32;
/// The size of the scratch buffer that [`plan`] needs.
pub const SCRATCH_BYTES: usize = 64 * 1024;

/// A staged module.
#[derive(Clone, Copy, Debug)]
pub struct GuestModule<'a> {
    /// Physical address of its first byte; on a page.
    pub address: u64,
    /// Its content.
    pub bytes: &'a [u8],
    /// The string that the loader passed with it.
    pub string: &'a [u8],
    /// The string without the file's name, if the loader put that first.
    pub arguments: &'a [u8],
}

impl GuestModule<'_> {
    /// Its physical addresses.
    pub fn range(&self) -> Range<u64> {
        self.address..self.address + self.bytes.len() as u64
    }
}

/// The input of a loader.
#[derive(Clone, Copy, Debug)]
pub struct GuestInput<'a> {
    /// The guest's image.
    pub image: GuestModule<'a>,
    /// The modules of the image: initrds, or those of a multiboot image.
    pub modules: &'a [GuestModule<'a>],
    /// The machine's memory with the host's region reserved.
    pub memory_map: &'a MemoryMap,
    /// Whether the firmware is EFI: there is no BIOS, and no text screen.
    pub is_efi: bool,
    /// What the loader says of the device that it has loaded from.
    pub boot_device: Option<u32>,
    /// What the loader says of the screen.
    pub framebuffer: Option<Framebuffer>,
    /// The name of the loader that the strings come from.
    pub loader_name: &'a [u8],
    /// The physical address of ACPI's root pointer, if one was found.
    pub acpi_rsdp: Option<u64>,
}

/// The state in which the guest begins. The rest of the state is as after a reset, with interrupts off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestEntry {
    /// The 64-bit entry of the Linux boot protocol: long mode with paging, CS 0x10 and DS, ES, SS 0x18 of the GDT.
    Linux64 {
        /// Page tables that identity-map the low 4 GiB.
        cr3: Gpa,
        /// The GDT.
        gdt_base: Gpa,
        /// Its limit.
        gdt_limit: u16,
        /// The first instruction.
        rip: u64,
        /// The zero page.
        rsi: u64,
        /// The top of a small stack.
        rsp: u64,
    },
    /// The entry of multiboot 1: flat 32-bit protected mode without paging.
    Protected32 {
        /// The first instruction.
        rip: u32,
        /// The multiboot magic.
        eax: u32,
        /// The multiboot information.
        ebx: u32,
        /// The top of a small stack. The specification leaves it open, and some images use what GRUB has left.
        esp: u32,
    },
}

/// One copy of a [`LoadPlan`].
#[derive(Clone, Copy, Debug)]
pub struct PlannedCopy<'a> {
    /// Where the bytes go.
    pub to: Gpa,
    /// The bytes.
    pub bytes: &'a [u8],
}

/// The writes to the guest's memory, and the state in which the guest begins.
///
/// All destinations are usable memory below 4 GiB. None overlaps another, or a module.
#[derive(Debug)]
pub struct LoadPlan<'a> {
    /// The copies, in any order.
    pub copies: ArrayVec<PlannedCopy<'a>, MAX_COPIES>,
    /// The ranges to be zeroed, in any order.
    pub zeros: ArrayVec<Range<u64>, MAX_ZEROS>,
    /// The state in which the guest begins.
    pub entry: GuestEntry,
}

/// Why an image cannot be loaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadError {
    /// Neither a bzImage nor a multiboot 1 image.
    UnknownFormat,
    /// The file ends before what the named part needs.
    Truncated(&'static str),
    /// A field has a value that is impossible or that this loader does not support. The text says which, and what to
    /// do.
    Unsupported(&'static str),
    /// The image has more parts than a plan holds.
    TooManyParts,
    /// A part of the image is fixed at addresses that are not free memory.
    NotFree {
        /// First byte.
        start: u64,
        /// The byte after the last.
        end: u64,
    },
    /// No free memory for the named thing.
    NoRoom {
        /// What needs room.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
    /// The command line is longer than the guest accepts.
    CommandLineTooLong {
        /// The longest that the guest accepts.
        limit: u64,
    },
}

impl LoadError {
    /// The kind of the stop that follows.
    pub const fn kind(&self) -> StopKind {
        match self {
            Self::NoRoom { .. } => StopKind::LowMemory,
            _ => StopKind::BadImage,
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownFormat => f.write_str(
                "the guest image is neither a Linux bzImage nor a multiboot 1 image: pass one of these as the first module",
            ),
            Self::Truncated(what) => write!(f, "the guest image ends within its {what}: pass the whole file"),
            Self::Unsupported(what) => write!(f, "the guest image cannot be loaded: {what}"),
            Self::TooManyParts => f.write_str("the guest image has too many segments: link it with fewer"),
            Self::NotFree { start, end } => write!(
                f,
                "the guest image wants {start:#x}..{end:#x}, which is not free memory: link it elsewhere or give the machine more memory"
            ),
            Self::NoRoom { what, bytes } => {
                write!(f, "no {} KiB of free memory for the {what}: give the machine more memory", bytes.div_ceil(1024))
            }
            Self::CommandLineTooLong { limit } => {
                write!(f, "the guest's command line is longer than the {limit} bytes that it takes: shorten it")
            }
        }
    }
}

impl core::error::Error for LoadError {}

/// The format of an image, by its header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageFormat {
    /// A Linux bzImage.
    BzImage,
    /// A multiboot 1 image.
    Multiboot(multiboot::Header),
}

impl ImageFormat {
    /// The number of bytes at an image's beginning that determine its format.
    pub const HEAD_BYTES: usize = multiboot::SEARCH_BYTES;

    /// The format of the image that begins with `head`, if it is a known one.
    pub fn of(head: &[u8]) -> Option<Self> {
        if linux::is_bzimage(head) {
            return Some(Self::BzImage);
        }
        multiboot::Header::find(head).map(Self::Multiboot)
    }
}

/// Plans the loading of `input.image`, whatever its format.
///
/// # Errors
///
/// The image has no known format, or its loader refuses it.
pub fn plan<'a>(input: &GuestInput<'a>, scratch: &'a mut [u8]) -> Result<LoadPlan<'a>, LoadError> {
    match ImageFormat::of(input.image.bytes) {
        Some(ImageFormat::BzImage) => linux::plan(input, scratch),
        Some(ImageFormat::Multiboot(header)) => multiboot::plan(input, &header, scratch),
        None => Err(LoadError::UnknownFormat),
    }
}

/// A little-endian word of an image; `None` beyond its end.
pub(crate) fn word<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}
