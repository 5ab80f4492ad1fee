//! Moves the running image into the host's region. Its virtual addresses stay the same; the physical pages behind them
//! change.

use core::arch::naked_asm;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use ept::Hpa;

use super::phys;

/// The difference between the image's linked addresses and the physical addresses at which the loader puts it.
const VIRTUAL_BASE: u64 = 0xFFFF_FFFF_8000_0000;

// The linker script's marks. Only their addresses mean anything.
unsafe extern "C" {
    static __image_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __boot_stack_guard: u8;
    static __image_end: u8;
}

/// What the host may do with a part of its image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Code.
    ReadExecute,
    /// Constants.
    Read,
    /// Variables and stacks.
    ReadWrite,
}

/// A part of the image with its own permissions; whole pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImagePart {
    /// Virtual addresses.
    pub range: Range<u64>,
    /// Permissions.
    pub access: Access,
}

/// The physical address of the image's first byte.
static IMAGE_PHYS: AtomicU64 = AtomicU64::new(0);

fn mark(symbol: *const u8) -> u64 {
    symbol.addr() as u64
}

/// The image's virtual addresses.
pub fn image() -> Range<u64> {
    mark(&raw const __image_start)..mark(&raw const __image_end)
}

/// The physical addresses at which the loader put the image.
pub fn loaded_image() -> Range<u64> {
    let image = image();
    image.start - VIRTUAL_BASE..image.end - VIRTUAL_BASE
}

/// The image's parts. The page below the stack belongs to none.
pub fn image_parts() -> [ImagePart; 4] {
    const PAGE: u64 = 4096;
    let text_end = mark(&raw const __text_end);
    let rodata_end = mark(&raw const __rodata_end);
    let guard = mark(&raw const __boot_stack_guard);
    let image = image();
    [
        ImagePart { range: image.start..text_end, access: Access::ReadExecute },
        ImagePart { range: text_end..rodata_end, access: Access::Read },
        ImagePart { range: rodata_end..guard, access: Access::ReadWrite },
        ImagePart { range: guard + PAGE..image.end, access: Access::ReadWrite },
    ]
}

/// A checksum of the image's code and constants, which nothing changes once the host runs.
pub fn checksum_of_constants() -> u64 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    let constants = mark(&raw const __image_start)..mark(&raw const __rodata_end);
    let words = (constants.end - constants.start) / 8;
    (0..words).fold(OFFSET_BASIS, |sum, word| {
        let address = core::ptr::with_exposed_provenance::<u64>((constants.start + word * 8) as usize);
        // SAFETY: the address is between the linker script's marks, in pages that are mapped for reading. The read is
        // volatile, as the point is that memory holds what it should.
        (sum ^ unsafe { address.read_volatile() }).wrapping_mul(PRIME)
    })
}

/// Copies the image, the running stack included, to `target` and continues there with the page tables at `cr3`.
///
/// # Safety
///
/// `target` has room for the image and holds nothing else. The tables at `cr3` map the image's virtual addresses to it
/// and all memory below `direct_map_end` at the direct map. Nothing uses the identity map or the loaded image's
/// physical addresses any more.
pub unsafe fn relocate(target: Hpa, cr3: Hpa, direct_map_end: Hpa) {
    let image = image();
    // These stores come before the copy, so that the copy contains them.
    IMAGE_PHYS.store(target.0, Ordering::SeqCst);
    phys::set_direct_map_end(direct_map_end);
    // SAFETY: the caller's promise.
    unsafe { copy_and_switch(phys::phys_to_virt(target), image.start, image.end - image.start, cr3.0) };
}

/// Between the copy and the switch only registers change, so the copy equals the running image. The return address is
/// read from the copy.
#[unsafe(naked)]
unsafe extern "sysv64" fn copy_and_switch(target: *mut u8, image: u64, bytes: u64, cr3: u64) {
    naked_asm!("mov rax, rcx", "mov rcx, rdx", "rep movsb", "mov cr3, rax", "ret")
}
