//! The places of the host's region and of the modules.
//!
//! ```text
//!   0        1 MiB                                                       4 GiB at most
//!   |  low   |  free for the guest           | modules | host region | modules that were here, ACPI |
//! ```
//!
//! The loader may have put modules anywhere, also where the guest's image must be. Moving them up to just below the
//! host's region leaves all low memory free, and a Linux guest can use an initrd at its new place.

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;

use crate::memory_map::{MemoryMap, overlap};
use crate::multiboot::MAX_MODULES;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// The host's region is aligned to 2 MiB, so that EPT01 can leave it out without splitting large pages.
const REGION_ALIGN: u64 = 2 * MIB;
const FOUR_GIB: u64 = 1 << 32;
/// The most that the host takes for the size of memory: tables of nested guests, which it reclaims when they run out.
const MOST_FOR_MEMORY: u64 = 512 * MIB;

/// Why the memory does not suffice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// No free range for the host's region.
    NoHostRegion {
        /// Its size.
        bytes: u64,
        /// All usable memory.
        usable_bytes: u64,
    },
    /// No room to move the modules to.
    NoRoomForModules {
        /// Their size.
        bytes: u64,
    },
    /// Two modules overlap.
    ModulesOverlap,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHostRegion { bytes, usable_bytes } => write!(
                f,
                "no free {} MiB below 4 GiB for the host in a machine with {} MiB: give the machine more memory, or less to the host with host-memory=MIB",
                bytes / MIB,
                usable_bytes / MIB
            ),
            Self::NoRoomForModules { bytes } => {
                write!(
                    f,
                    "no room to move {} KiB of modules below the host's memory: give the machine more memory",
                    bytes / 1024
                )
            }
            Self::ModulesOverlap => f.write_str("the boot loader's modules overlap: use GRUB 2 or QEMU"),
        }
    }
}

impl core::error::Error for LayoutError {}

/// The size of the host's region: 32 MiB, 4 MiB for each processor but the first, 1/256 of the memory but at most 512 MiB,
/// and the pages of the IOMMUs' tables, or what the user asked for, in whole 2 MiB.
pub fn host_region_bytes(map: &MemoryMap, processors: usize, iommu_pages: u64, host_memory_mib: Option<u32>) -> u64 {
    let for_processors = 32 * MIB + 4 * MIB * (processors as u64).saturating_sub(1);
    let bytes = match host_memory_mib {
        Some(mib) => u64::from(mib) * MIB,
        None => for_processors + (map.usable_bytes() / 256).min(MOST_FOR_MEMORY) + iommu_pages * PAGE,
    };
    bytes.next_multiple_of(REGION_ALIGN)
}

/// Picks the highest free range of `bytes` under 4 GiB that is clear of `taken`: the modules, the running image
/// and what devices access for the firmware.
///
/// # Errors
///
/// There is no such range.
pub fn host_region(map: &MemoryMap, bytes: u64, taken: &[Range<u64>]) -> Result<Range<u64>, LayoutError> {
    map.find_highest(bytes, REGION_ALIGN, MIB..FOUR_GIB, taken)
        .ok_or(LayoutError::NoHostRegion { bytes, usable_bytes: map.usable_bytes() })
}

/// The move of one module; source and destination may overlap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// The module's place in the loader's list.
    pub module: usize,
    /// The address of its first byte before the move.
    pub from: u64,
    /// The address of its first byte after the move.
    pub to: u64,
    /// Its size in bytes.
    pub length: u64,
}

/// Plans moves of all modules that lie below `limit`, the start of the host's region, to pages directly below it.
///
/// In the returned order, no move destroys a module that is still to be moved: the highest module is moved first, each
/// is moved upward, and its new place is not below the end of the next lower module.
///
/// # Errors
///
/// Modules overlap, or the memory below `limit` is too small for them.
pub fn stage(map: &MemoryMap, modules: &[Range<u64>], limit: u64) -> Result<ArrayVec<Move, MAX_MODULES>, LayoutError> {
    let mut order: ArrayVec<usize, MAX_MODULES> = (0..modules.len()).filter(|&i| modules[i].start < limit).collect();
    order.sort_unstable_by_key(|&i| core::cmp::Reverse((modules[i].start, modules[i].end)));

    let pages = |range: &Range<u64>| range.start..range.end.next_multiple_of(PAGE);
    let mut ceiling = limit;
    let mut moves = ArrayVec::new();
    let mut above = limit..u64::MAX;
    for &i in &order {
        let source = pages(&modules[i]);
        if overlap(&source, &above) || source.end > limit {
            return Err(LayoutError::ModulesOverlap);
        }
        above = source.start..u64::MAX;
        ceiling = ceiling.saturating_sub(source.end - source.start);
        moves.push(Move { module: i, from: source.start, to: ceiling, length: modules[i].end - modules[i].start });
    }
    if !map.is_usable(&(ceiling..limit)) && ceiling != limit {
        return Err(LayoutError::NoRoomForModules { bytes: limit - ceiling });
    }
    Ok(moves)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{Region, RegionKind};
    use proptest::prelude::*;
    use std::vec::Vec;

    fn map(ranges: &[Range<u64>]) -> MemoryMap {
        let regions =
            ranges.iter().map(|range| Region { start: range.start, end: range.end, kind: RegionKind::USABLE });
        MemoryMap::sanitize(regions).unwrap()
    }

    #[test]
    fn the_host_gets_32_mib_and_a_256th_of_the_memory_in_whole_2_mib() {
        let map = map(&[0..0x9_f000, MIB..2048 * MIB]);
        assert_eq!(host_region_bytes(&map, 1, 0, None), 40 * MIB);
        assert_eq!(host_region_bytes(&map, 4, 0, None), 52 * MIB);
        assert_eq!(host_region_bytes(&map, 4, 600, None), 56 * MIB);
        assert_eq!(host_region_bytes(&map, 4, 600, Some(9)), 10 * MIB);
    }

    #[test]
    fn the_host_fits_below_4_gib_however_much_memory_there_is() {
        const TIB: u64 = 1 << 40;
        let map = map(&[MIB..2048 * MIB, FOUR_GIB..16 * TIB]);
        let bytes = host_region_bytes(&map, 128, 0, None);
        assert_eq!(bytes, 32 * MIB + 127 * 4 * MIB + 512 * MIB);
        assert!(host_region(&map, bytes, &[]).is_ok());
    }

    #[test]
    fn the_host_region_is_at_the_top_under_4_gib_clear_of_modules() {
        let map = map(&[MIB..3 * 1024 * MIB - 5 * PAGE, FOUR_GIB..2 * FOUR_GIB]);
        let top = 3 * 1024 * MIB - 2 * MIB;
        assert_eq!(host_region(&map, 40 * MIB, &[]), Ok(top - 40 * MIB..top));
        let module = top - 3 * MIB..top - 2 * MIB;
        assert_eq!(host_region(&map, 40 * MIB, &[module]), Ok(top - 44 * MIB..top - 4 * MIB));
    }

    #[test]
    fn a_machine_without_room_for_the_host_is_refused() {
        let map = map(&[MIB..33 * MIB]);
        let error = LayoutError::NoHostRegion { bytes: 34 * MIB, usable_bytes: 32 * MIB };
        assert_eq!(host_region(&map, 34 * MIB, &[]), Err(error));
    }

    #[test]
    fn modules_move_to_just_below_the_limit_and_those_above_stay() {
        let map = map(&[MIB..64 * MIB]);
        let moves =
            stage(&map, &[2 * MIB..2 * MIB + 1, 50 * MIB..51 * MIB, 4 * MIB..4 * MIB + PAGE], 32 * MIB).unwrap();
        assert_eq!(
            moves.as_slice(),
            [
                Move { module: 2, from: 4 * MIB, to: 32 * MIB - PAGE, length: PAGE },
                Move { module: 0, from: 2 * MIB, to: 32 * MIB - 2 * PAGE, length: 1 },
            ]
        );
    }

    #[test]
    fn modules_that_overlap_each_other_or_the_limit_are_refused() {
        let map = map(&[MIB..64 * MIB]);
        let overlapping = [2 * MIB..3 * MIB, 2 * MIB + PAGE..4 * MIB];
        assert_eq!(stage(&map, &overlapping, 32 * MIB), Err(LayoutError::ModulesOverlap));
        assert_eq!(stage(&map, &[31 * MIB..33 * MIB], 32 * MIB), Err(LayoutError::ModulesOverlap));
    }

    #[test]
    fn modules_that_do_not_fit_below_the_limit_are_refused() {
        let map = map(&[MIB..4 * MIB, 30 * MIB..32 * MIB]);
        let error = LayoutError::NoRoomForModules { bytes: 3 * MIB };
        assert_eq!(stage(&map, &[MIB..4 * MIB], 32 * MIB), Err(error));
    }

    proptest! {
        #[test]
        fn staging_keeps_every_module_whole(
            gaps in prop::collection::vec((0u64..4, 1u64..4 * PAGE), 1..12), slack in 0u64..8, rotate in 0usize..12,
        ) {
            // Memory as bytes, each module filled with its own number.
            let mut modules = Vec::new();
            let mut cursor = MIB;
            for (gap, length) in gaps {
                let start = cursor + gap * PAGE;
                modules.push(start..start + length);
                cursor = (start + length).next_multiple_of(PAGE);
            }
            let limit = cursor + slack * PAGE;
            let count = modules.len();
            modules.rotate_left(rotate % count);
            let mut memory = std::vec![0u8; (limit - MIB) as usize];
            let at = |address: u64| (address - MIB) as usize;
            for (i, module) in modules.iter().enumerate() {
                memory[at(module.start)..at(module.end)].fill(i as u8 + 1);
            }
            let moves = stage(&map(&[MIB..limit]), &modules, limit).unwrap();
            prop_assert_eq!(moves.len(), modules.len());
            for step in &moves {
                memory.copy_within(at(step.from)..at(step.from + step.length), at(step.to));
            }
            for step in &moves {
                prop_assert_eq!(step.to % PAGE, 0);
                let bytes = &memory[at(step.to)..at(step.to + step.length)];
                prop_assert!(bytes.iter().all(|&byte| byte == step.module as u8 + 1));
            }
        }
    }
}
