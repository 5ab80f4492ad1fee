//! Pages of the host's region, handed out at boot and never given back.
#![allow(unsafe_code, reason = "turns raw physical pages into owned memory")]

use core::ptr;
use core::sync::atomic::AtomicU64;

use ept::Hpa;

use super::{HostRegion, PAGE_BYTES, phys_to_virt};

/// The host has too little memory for what it must keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfHostMemory {
    /// The pages that were asked for.
    pub wanted_pages: u64,
    /// The pages that are left.
    pub free_pages: u64,
}

/// The page-granular allocator of the host's region.
#[derive(Debug)]
pub struct PhysAllocator {
    next: u64,
    end: u64,
}

impl PhysAllocator {
    /// Takes over all of `region`.
    ///
    /// # Safety
    ///
    /// The region is memory within the direct map that no other code uses, now or later.
    pub unsafe fn new(region: HostRegion) -> Self {
        Self { next: region.start.0, end: region.end.0 }
    }

    /// Takes `count` contiguous pages, zeroed.
    ///
    /// # Errors
    ///
    /// Fewer pages are left.
    pub fn alloc_pages(&mut self, count: u64) -> Result<HostPages, OutOfHostMemory> {
        let free_pages = self.free_pages();
        if count > free_pages {
            return Err(OutOfHostMemory { wanted_pages: count, free_pages });
        }
        let pages = HostPages { start: Hpa(self.next), count };
        self.next += count * PAGE_BYTES;
        // SAFETY: the pages are within the region, mapped, and were never handed out before.
        unsafe { ptr::write_bytes(pages.as_mut_ptr(), 0, pages.bytes() as usize) };
        Ok(pages)
    }

    /// Pages that are left.
    pub fn free_pages(&self) -> u64 {
        (self.end - self.next) / PAGE_BYTES
    }
}

/// Contiguous pages with one owner, which keeps them for ever.
#[derive(Debug)]
#[must_use = "pages cannot be given back"]
pub struct HostPages {
    start: Hpa,
    count: u64,
}

impl HostPages {
    /// Physical address of the first byte.
    pub const fn phys(&self) -> Hpa {
        self.start
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }

    /// The first byte in the direct map.
    pub const fn as_mut_ptr(&self) -> *mut u8 {
        phys_to_virt(self.start)
    }

    /// The pages as bytes.
    pub fn into_bytes(self) -> &'static mut [u8] {
        // SAFETY: mapped, initialised, and `self` was their only owner.
        unsafe { core::slice::from_raw_parts_mut(self.as_mut_ptr(), self.bytes() as usize) }
    }

    /// The pages as tables of 512 words each.
    pub fn into_tables(self) -> &'static mut [[u64; 512]] {
        // SAFETY: as for `into_bytes`, and pages are aligned for words.
        unsafe { core::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), self.count as usize) }
    }

    /// The pages as tables of 512 words each, which several processors use.
    pub fn into_shared_tables(self) -> &'static [[AtomicU64; 512]] {
        // SAFETY: as for `into_tables`; an atomic word is a word.
        unsafe { core::slice::from_raw_parts(self.as_mut_ptr().cast(), self.count as usize) }
    }

    /// The pages as values, as many as fit.
    ///
    /// # Panics
    ///
    /// A value needs more alignment than a page has.
    pub fn into_values<T>(self, values: impl ExactSizeIterator<Item = T>) -> &'static mut [T] {
        let count = values.len();
        assert!(
            (count * size_of::<T>()) as u64 <= self.bytes() && align_of::<T>() as u64 <= PAGE_BYTES,
            "too many values"
        );
        let first = self.as_mut_ptr().cast::<T>();
        for (at, value) in values.enumerate().take(count) {
            // SAFETY: the pages have room for `count` values, and `self` was their only owner.
            unsafe { first.add(at).write(value) };
        }
        // SAFETY: as above, and all of them are initialised: an exact iterator has as many items as it says.
        unsafe { core::slice::from_raw_parts_mut(first, count) }
    }

    /// Puts `value` at the start of the pages.
    ///
    /// # Panics
    ///
    /// The value does not fit, or needs more alignment than a page has.
    pub fn into_value<T>(self, value: T) -> &'static mut T {
        assert!(
            size_of::<T>() as u64 <= self.bytes() && align_of::<T>() as u64 <= PAGE_BYTES,
            "value larger than its pages"
        );
        let place = self.as_mut_ptr().cast::<T>();
        // SAFETY: mapped, large and aligned enough, and `self` was the only owner.
        unsafe {
            place.write(value);
            &mut *place
        }
    }
}
