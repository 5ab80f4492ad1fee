//! Registers of IOMMUs.

use core::ops::Range;

use boot::iommu::{Registers, Unit};
use ept::Hpa;

use super::phys;
use crate::mem::held_to_virt;

/// The registers of one unit, at a virtual address.
#[derive(Debug)]
pub struct Mmio {
    base: u64,
    bytes: u64,
}

/// The unit whose registers are in `range`, by the firmware's word, before the host moves into its region. `None` if the
/// host cannot reach them. The caller has made sure that no memory is there.
pub fn unit_at_boot(range: &Range<u64>) -> Option<Unit<Mmio>> {
    let bytes = range.end - range.start;
    let base = phys::phys_to_virt(Hpa(range.start)).addr() as u64;
    phys::is_mapped(Hpa(range.start), bytes as usize).then(|| Unit::new(Mmio { base, bytes }))
}

/// The unit whose registers are in `range`, which is among the pages that the host holds.
pub fn held_unit(range: &Range<u64>) -> Unit<Mmio> {
    Unit::new(Mmio { base: held_to_virt(Hpa(range.start)), bytes: range.end - range.start })
}

impl Mmio {
    fn at<T>(&self, offset: u64) -> *mut T {
        assert!(offset + size_of::<T>() as u64 <= self.bytes, "not a register: {offset:#x}");
        core::ptr::with_exposed_provenance_mut((self.base + offset) as usize)
    }
}

impl Registers for Mmio {
    fn read_u32(&self, offset: u64) -> u32 {
        // SAFETY: the address is mapped. There are registers, or there is nothing, which reads as ones, but no Rust
        // object.
        unsafe { self.at::<u32>(offset).read_volatile() }
    }

    fn read_u64(&self, offset: u64) -> u64 {
        // SAFETY: as for `read_u32`.
        unsafe { self.at::<u64>(offset).read_volatile() }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        // SAFETY: as for `read_u32`. What a unit does to memory is to read its tables, which `boot::iommu` builds.
        unsafe { self.at::<u32>(offset).write_volatile(value) }
    }

    fn write_u64(&mut self, offset: u64, value: u64) {
        // SAFETY: as for `write_u32`.
        unsafe { self.at::<u64>(offset).write_volatile(value) }
    }
}
