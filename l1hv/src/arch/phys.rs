//! Physical memory through the direct map: virtual `DIRECT_MAP_BASE + p` is physical `p`.

use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use boot::phys::{OutOfRange, PhysMemory};
use ept::Hpa;

/// The first address of the direct map of all physical memory.
pub const DIRECT_MAP_BASE: u64 = 0xFFFF_8000_0000_0000;

/// The end of the boot code's direct map.
const EARLY_MAP_END: u64 = 4 << 30;

static MAP_END: AtomicU64 = AtomicU64::new(EARLY_MAP_END);

/// Records the reach of the host's own direct map, once it is in use.
pub(super) fn set_direct_map_end(end: Hpa) {
    MAP_END.store(end.0, Ordering::Relaxed);
}

/// The direct map's address of a physical address. The address carries no right to access: the caller must know what is
/// there.
pub const fn phys_to_virt(hpa: Hpa) -> *mut u8 {
    ptr::with_exposed_provenance_mut((DIRECT_MAP_BASE + hpa.0) as usize)
}

/// Whether `len` bytes at `start` are within the direct map and outside `hole`.
fn reachable(start: u64, len: usize, hole: &Range<u64>) -> bool {
    let Some(end) = start.checked_add(len as u64) else { return false };
    end <= MAP_END.load(Ordering::Relaxed) && (end <= hole.start || start >= hole.end)
}

/// Whether the direct map covers `length` bytes at `start`.
pub fn is_mapped(start: Hpa, length: usize) -> bool {
    reachable(start.0, length, &(0..0))
}

/// Reads of the boot loader's and the firmware's structures, before the guest runs.
pub struct BootMemory;

impl PhysMemory for BootMemory {
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), OutOfRange> {
        if !reachable(address, buffer.len(), &(0..0)) {
            return Err(OutOfRange { address, length: buffer.len() as u64 });
        }
        // SAFETY: the direct map covers the range. `buffer` is in the host's own memory, so the two overlap only if a
        // loader's structure claims to lie there: the bytes would be nonsense, but `copy` allows the overlap.
        unsafe { ptr::copy(phys_to_virt(Hpa(address)), buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }
}

/// Copies `length` bytes of physical memory; the ranges may overlap.
///
/// # Safety
///
/// Both ranges are within the direct map, and the destination holds no data of the host.
pub unsafe fn copy(from: Hpa, to: Hpa, length: u64) {
    // SAFETY: the caller's promise.
    unsafe { ptr::copy(phys_to_virt(from), phys_to_virt(to), length as usize) };
}

/// A view of physical memory that is not the host's.
///
/// # Safety
///
/// The range is within the direct map, and nothing writes to it while the slice is in use.
pub unsafe fn slice(range: Range<u64>) -> &'static [u8] {
    // SAFETY: the caller's promise.
    unsafe { core::slice::from_raw_parts(phys_to_virt(Hpa(range.start)), (range.end - range.start) as usize) }
}

/// All of physical memory but the host's region. The guest hypervisor owns it.
///
/// Accesses that touch the host's region, or memory that the direct map does not cover, have no effect: reads give ones
/// and writes are dropped, as on a bus without a device. The guest may change this memory at any time, so it is
/// accessed by copying only.
#[derive(Clone, Debug)]
pub struct GuestRam {
    hole: Range<u64>,
}

impl GuestRam {
    /// All memory but `hole`, the host's region.
    ///
    /// # Safety
    ///
    /// All of the host's memory lies within `hole`.
    pub(super) const unsafe fn new(hole: Range<Hpa>) -> Self {
        Self { hole: hole.start.0..hole.end.0 }
    }

    /// Whether all of `length` bytes at `hpa` can be reached.
    pub fn contains(&self, hpa: Hpa, length: usize) -> bool {
        reachable(hpa.0, length, &self.hole)
    }

    /// Copies out of guest memory.
    pub fn read(&self, hpa: Hpa, buffer: &mut [u8]) {
        if !self.contains(hpa, buffer.len()) {
            return buffer.fill(0xff);
        }
        // SAFETY: the range is mapped and not the host's, hence not `buffer`'s.
        unsafe { ptr::copy_nonoverlapping(phys_to_virt(hpa), buffer.as_mut_ptr(), buffer.len()) };
    }

    /// Copies into guest memory.
    pub fn write(&self, hpa: Hpa, bytes: &[u8]) {
        if !self.contains(hpa, bytes.len()) {
            return;
        }
        // SAFETY: the range is mapped and not the host's: no Rust object lives there.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), phys_to_virt(hpa), bytes.len()) };
    }

    /// Fills guest memory with zeros.
    pub fn zero(&self, hpa: Hpa, length: u64) {
        if !self.contains(hpa, length as usize) {
            return;
        }
        // SAFETY: as for `write`.
        unsafe { ptr::write_bytes(phys_to_virt(hpa), 0, length as usize) };
    }

    /// Reads eight bytes in one access; `hpa` is a multiple of eight.
    pub fn read_u64(&self, hpa: Hpa) -> u64 {
        match self.word(hpa) {
            // SAFETY: mapped, aligned and not the host's.
            Some(word) => unsafe { word.read_volatile() },
            None => u64::MAX,
        }
    }

    /// Replaces eight bytes if they equal `seen`, in one locked access; `hpa` is a multiple of eight. Returns whether
    /// they did. Where no memory is, the write is dropped, and counts as done.
    pub fn compare_exchange_u64(&self, hpa: Hpa, seen: u64, new: u64) -> bool {
        let Some(word) = self.word(hpa) else { return true };
        // SAFETY: mapped, aligned and not the host's; guests write to it only from outside Rust's abstract machine.
        let word = unsafe { AtomicU64::from_ptr(word) };
        word.compare_exchange(seen, new, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn word(&self, hpa: Hpa) -> Option<*mut u64> {
        debug_assert!(hpa.0.is_multiple_of(8), "a single access must be aligned: {hpa}");
        // The map and the hole end on page boundaries, so that an aligned word is inside or outside as a whole.
        let in_hole = hpa.0.wrapping_sub(self.hole.start) < self.hole.end - self.hole.start;
        let is_mapped = hpa.0 < MAP_END.load(Ordering::Relaxed);
        (hpa.0.is_multiple_of(8) && is_mapped && !in_hole).then(|| phys_to_virt(hpa).cast())
    }
}
