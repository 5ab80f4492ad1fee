//! The frequency of the time-stamp counter, as CPUID tells it (SDM Volume 2A, "CPUID": leaves 15H and 16H).

/// A frequency that no processor exceeds: a wait that assumes it is long enough.
pub const MOST_KHZ: u64 = 10_000_000;

/// Ticks in a millisecond, by leaf 15H (the ratio to a crystal clock and that clock's frequency) or else 16H (the
/// processor's base frequency), in the order EAX, EBX, ECX, EDX; all zero where a leaf does not exist.
pub fn khz(ratio: [u32; 4], base: [u32; 4]) -> Option<u64> {
    let [denominator, numerator, crystal_hertz, _] = ratio.map(u64::from);
    let by_crystal = (crystal_hertz * numerator).checked_div(denominator).map(|hertz| hertz / 1000);
    let by_base = u64::from(base[0] & 0xffff) * 1000;
    by_crystal.filter(|khz| *khz != 0).or((by_base != 0).then_some(by_base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crystal_counts_if_its_frequency_is_known_and_else_the_base_frequency() {
        assert_eq!(khz([2, 168, 24_000_000, 0], [2000, 4000, 100, 0]), Some(2_016_000));
        assert_eq!(khz([2, 168, 0, 0], [2000, 4000, 100, 0]), Some(2_000_000));
        assert_eq!(khz([0; 4], [3400, 4000, 100, 0]), Some(3_400_000));
        assert_eq!(khz([0; 4], [0; 4]), None);
        assert_eq!(khz([0, 168, 24_000_000, 0], [0; 4]), None);
        assert_eq!(khz([u32::MAX; 4], [0; 4]), Some(u64::from(u32::MAX) / 1000));
    }
}
