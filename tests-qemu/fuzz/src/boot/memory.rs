//! Memory maps and layouts.

use std::ops::Range;

use boot::layout::{host_region, host_region_bytes, stage};
use boot::memory_map::{MemoryMap, Region, RegionKind, TooManyRegions, overlap};

use super::are_apart;
use crate::{Input, is_one_line};

/// Addresses of the small maps, which brute force searches.
const ADDRESSES: u64 = 128;

fn region(input: &mut Input<'_>, scale: u64) -> Region {
    let start = u64::from(input.byte() & 0x3f);
    let length = u64::from(input.byte() & 0x3f);
    let kind = RegionKind(u32::from(input.byte() % 7));
    Region { start: start * scale, end: (start + length) * scale, kind }
}

/// The kind of an address, by the claims: where two disagree, the less usable kind wins.
fn kind_of(address: u64, claims: &[Region]) -> Option<RegionKind> {
    claims.iter().filter(|claim| (claim.start..claim.end).contains(&address)).map(|claim| claim.kind).max()
}

/// A firmware's memory map.
///
/// The input: a number of claims, the claims in bytes, and searches on the sanitised map; then the same claims in MiB
/// for the layout of a machine.
pub fn memory_map(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let count = input.byte();
    let count = usize::from(if count < 0xf0 { count & 0xf } else { count - 0x70 });
    let mut of_layout = input.clone();
    let claims: Vec<Region> = (0..count).map(|_| region(&mut input, 1)).collect();
    let map = match MemoryMap::sanitize(claims.iter().copied()) {
        Ok(map) => map,
        Err(error) => {
            assert!(count > 64, "{error}");
            return;
        }
    };
    check_map(&map);
    for address in 0..ADDRESSES {
        let found = map.regions().iter().find(|region| (region.start..region.end).contains(&address));
        assert_eq!(found.map(|region| region.kind), kind_of(address, &claims), "{address}");
    }
    check_reserved(&map, &mut input);
    for _ in 0..4 {
        check_searches(&map, &mut input);
    }
    layout(count, &mut of_layout);
}

fn check_map(map: &MemoryMap) {
    let regions = map.regions();
    assert!(regions.iter().all(|region| region.start < region.end));
    for pair in regions.windows(2) {
        assert!(pair[0].end < pair[1].start || pair[0].end == pair[1].start && pair[0].kind != pair[1].kind);
    }
    let usable: u64 = map.usable().map(|range| range.end - range.start).sum();
    assert!(map.usable_bytes() == usable && map.usable().all(|range| map.is_usable(&range)));
    assert!(map.usable().all(|range| range.end <= map.memory_end()));
}

fn check_reserved(map: &MemoryMap, input: &mut Input<'_>) {
    let range = small_range(input);
    match map.with_reserved(range.clone()) {
        Ok(reserved) => {
            check_map(&reserved);
            assert!(range.is_empty() || !reserved.usable().any(|usable| overlap(&usable, &range)));
        }
        Err(TooManyRegions) => assert!(2 * map.regions().len() >= 127),
    }
}

fn small_range(input: &mut Input<'_>) -> Range<u64> {
    let start = u64::from(input.byte() & 0x3f);
    start..start + u64::from(input.byte() & 0x3f)
}

/// Both searches find what trying each address finds.
fn check_searches(map: &MemoryMap, input: &mut Input<'_>) {
    let style = input.byte();
    let (size, align) = (u64::from(input.byte() & 0x3f) + 1, 1 << (style & 7));
    let window = small_range(input);
    let avoid: Vec<Range<u64>> = (0..style >> 6).map(|_| small_range(input)).collect();
    let is_free = |start: &u64| {
        let range = *start..*start + size;
        window.start <= range.start
            && range.end <= window.end
            && map.is_usable(&range)
            && !avoid.iter().any(|taken| overlap(taken, &range))
    };
    let starts = || (0..ADDRESSES).step_by(align as usize);
    let lowest = map.find_lowest(size, align, window.clone(), &avoid);
    assert_eq!(lowest.map(|range| range.start), starts().find(is_free));
    let highest = map.find_highest(size, align, window.clone(), &avoid);
    assert_eq!(highest.map(|range| range.start), starts().filter(is_free).last());
}

/// The places of the host's region and of the modules.
fn layout(count: usize, input: &mut Input<'_>) {
    const MIB: u64 = 1 << 20;
    const PAGE: u64 = 4096;
    let claims: Vec<Region> = (0..count).map(|_| region(input, 32 * MIB)).collect();
    let Ok(map) = MemoryMap::sanitize(claims) else { return };
    let asked = if input.flag() { Some(8 + u32::from(input.byte())) } else { None };
    let bytes = host_region_bytes(&map, input.below(300), input.below(4096) as u64, asked);
    let modules: Vec<Range<u64>> = (0..input.below(5))
        .map(|_| {
            let start = u64::from(input.half()) * PAGE * 8;
            start..start + u64::from(input.half()) * 64
        })
        .collect();
    let region = match host_region(&map, bytes, &modules) {
        Ok(region) => region,
        Err(error) => return is_one_line(error),
    };
    assert!(region.end - region.start == bytes && region.start % (2 * MIB) == 0 && region.end <= 1 << 32);
    assert!(map.is_usable(&region) && !modules.iter().any(|module| overlap(module, &region)));
    let Ok(map) = map.with_reserved(region.clone()) else { return };
    match stage(&map, &modules, region.start) {
        Ok(moves) => {
            let pages = |start: u64, length: u64| start..start + length.next_multiple_of(PAGE);
            let (from, to): (Vec<_>, Vec<_>) =
                moves.iter().map(|one| (pages(one.from, one.length), pages(one.to, one.length))).unzip();
            assert_eq!(moves.len(), modules.iter().filter(|module| module.start < region.start).count());
            assert!(are_apart(&to) && to.iter().all(|to| to.is_empty() || map.is_usable(to)));
            for (number, to) in to.iter().enumerate() {
                assert!(!from[number + 1..].iter().any(|from| overlap(to, from)), "a later module is destroyed");
            }
        }
        Err(error) => is_one_line(error),
    }
}
