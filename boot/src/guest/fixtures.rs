//! Helpers that the loaders' tests share.

use super::*;
use crate::memory_map::{Region, RegionKind, overlap};
use std::vec::Vec;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn map(usable: &[Range<u64>]) -> MemoryMap {
    let regions = usable.iter().map(|range| Region { start: range.start, end: range.end, kind: RegionKind::USABLE });
    MemoryMap::sanitize(regions).unwrap()
}

pub(crate) fn module<'a>(address: u64, bytes: &'a [u8], arguments: &'a [u8]) -> GuestModule<'a> {
    GuestModule { address, bytes, string: arguments, arguments }
}

pub(crate) fn input<'a>(
    image: GuestModule<'a>,
    modules: &'a [GuestModule<'a>],
    memory_map: &'a MemoryMap,
) -> GuestInput<'a> {
    GuestInput {
        image,
        modules,
        memory_map,
        is_efi: false,
        boot_device: None,
        framebuffer: None,
        loader_name: b"GRUB 2.06",
        acpi_rsdp: None,
    }
}

/// Checks a plan against [`LoadPlan`]'s promises.
pub(crate) fn check_plan(plan: &LoadPlan<'_>, map: &MemoryMap, modules: &[GuestModule<'_>]) {
    let copies = plan.copies.iter().map(|copy| copy.to.0..copy.to.0 + copy.bytes.len() as u64);
    let destinations: Vec<_> = copies.chain(plan.zeros.iter().cloned()).collect();
    for (i, range) in destinations.iter().enumerate() {
        assert!(range.end <= 1 << 32 && map.is_usable(range), "{range:x?} is not usable");
        for other in &destinations[..i] {
            assert!(!overlap(range, other), "{range:x?} and {other:x?}");
        }
        for module in modules {
            assert!(!overlap(range, &module.range()), "{range:x?} and the module at {:x?}", module.range());
        }
    }
}
