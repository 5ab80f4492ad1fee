//! The steps of a program without which its sides do not differ.

use anyhow::Result;

use super::Fuzzer;

/// The steps of a mask.
pub fn steps(mask: u64) -> impl Iterator<Item = u32> {
    (0..u64::BITS).filter(move |step| mask >> step & 1 != 0)
}

/// Removes steps from `mask` as long as `differ` holds for what is left. `differ` takes many masks at once, as a machine
/// has to start for it.
pub fn minimise(mut mask: u64, mut differ: impl FnMut(&[u64]) -> Result<Vec<bool>>) -> Result<u64> {
    loop {
        let without: Vec<u64> = steps(mask).map(|step| mask & !(1 << step)).collect();
        let removable: Vec<u64> = kept(&without, differ(&without)?).map(|left| mask & !left).collect();
        // Steps that can each be left out need not be superfluous together: the most of them that are.
        let together: Vec<u64> = (1..=removable.len())
            .map(|count| mask & !removable[..count].iter().fold(0, |bits, step| bits | step))
            .collect();
        match kept(&together, differ(&together)?).last() {
            Some(smaller) => mask = smaller,
            None => return Ok(mask),
        }
    }
}

fn kept(masks: &[u64], differ: Vec<bool>) -> impl Iterator<Item = u64> {
    masks.iter().zip(differ).filter_map(|(mask, differs)| differs.then_some(*mask))
}

impl Fuzzer<'_> {
    /// The mask of the steps that matter.
    pub(super) fn minimise(&self, program: u64) -> Result<u64> {
        let count = self.look(program, u64::MAX)?.steps();
        let all = if count >= u64::BITS { u64::MAX } else { (1 << count) - 1 };
        minimise(all, |masks| if masks.is_empty() { Ok(Vec::new()) } else { self.differ(program, masks) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_that_matter_are_left_over() {
        // Steps 1 and 5 matter, and one of 2 and 3.
        let differs = |mask: &u64| mask & 0x22 == 0x22 && mask & 0xc != 0;
        let mut rounds = 0;
        let mask = minimise(0xff, |masks| {
            rounds += 1;
            Ok(masks.iter().map(differs).collect())
        });
        assert_eq!(mask.unwrap().count_ones(), 3);
        assert!(rounds <= 6, "{rounds} machines");
    }
}
