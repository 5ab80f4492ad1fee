//! Which programs differ.

use anyhow::Result;

use super::side::{Batches, Fate};
use super::{BATCH, Fuzzer};

/// What is to be said of a program whose sides are not equal, or do not tell.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It ends the bare machine, so that there is nothing to compare with.
    Excluded(String),
    /// Its sides differ.
    Differs,
}

/// The first programs of the batches that are not equal, of those that both sides have run.
pub fn suspicious<'a>(bare: &'a Batches, l1hv: &'a Batches) -> impl Iterator<Item = u64> + 'a {
    bare.fates.iter().filter_map(|(first, fate)| {
        let other = l1hv.fates.get(first)?;
        (fate != other || matches!(fate, Fate::Death(_))).then_some(*first)
    })
}

fn verdict(bare: &Fate, l1hv: &Fate) -> Option<Verdict> {
    match (bare, l1hv) {
        (_, Fate::Defect(_)) => Some(Verdict::Differs),
        (Fate::Death(how), _) => Some(Verdict::Excluded(how.clone())),
        _ if bare == l1hv => None,
        (Fate::OutOfTime(_), Fate::Digest(_)) => Some(Verdict::Excluded("no end within its time".to_owned())),
        _ => Some(Verdict::Differs),
    }
}

impl Fuzzer<'_> {
    /// The programs of a batch that are not equal, up to program `last`.
    pub(super) fn compare_programs(&self, first: u64, last: u64) -> Result<Vec<(u64, Verdict)>> {
        let count = BATCH.min(last - first + 1);
        let arguments = |done: usize| format!("first={} count={} batch=1", first + done as u64, count - done as u64);
        let verdicts = self.one_by_one(count as usize, arguments)?;
        Ok((first..).zip(verdicts).filter_map(|(program, verdict)| Some((program, verdict?))).collect())
    }

    /// For each mask, whether the sides differ.
    pub(super) fn differ(&self, program: u64, masks: &[u64]) -> Result<Vec<bool>> {
        let arguments = |done: usize| {
            let masks: Vec<String> = masks[done..].iter().map(|mask| format!("{mask:x}")).collect();
            format!("first={program} steps={}", masks.join(","))
        };
        let verdicts = self.one_by_one(masks.len(), arguments)?;
        Ok(verdicts.into_iter().map(|verdict| verdict == Some(Verdict::Differs)).collect())
    }

    /// What is to be said of each program, or of each mask of a program, in `arguments`: a list for the image, of which
    /// it has done some. Behind one that is not equal both sides start again: what it has left behind, its own memory
    /// perhaps, need not be the same.
    fn one_by_one(&self, count: usize, arguments: impl Fn(usize) -> String) -> Result<Vec<Option<Verdict>>> {
        let mut verdicts = Vec::new();
        while verdicts.len() < count {
            let (left, arguments) = (count - verdicts.len(), arguments(verdicts.len()));
            let [bare, l1hv] = self.on_both(|side| self.until_its_end(side, left, &arguments))?;
            for (bare, l1hv) in bare.iter().zip(&l1hv) {
                let verdict = verdict(bare, l1hv);
                let is_equal = verdict.is_none();
                verdicts.push(verdict);
                if !is_equal {
                    break;
                }
            }
        }
        Ok(verdicts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(fates: &[(u64, Fate)]) -> Batches {
        Batches { fates: fates.iter().cloned().collect(), ..Batches::default() }
    }

    #[test]
    fn a_batch_is_suspicious_if_it_differs_or_ends_the_bare_machine() {
        let digest = |text: &str| Fate::Digest(text.to_owned());
        let death = || Fate::Death("triple fault".to_owned());
        let bare = [(0, digest("a")), (100, digest("b")), (200, death()), (300, digest("c")), (400, digest("d"))];
        let l1hv = [(0, digest("a")), (100, digest("x")), (200, death()), (300, death())];
        assert_eq!(suspicious(&batches(&bare), &batches(&l1hv)).collect::<Vec<_>>(), [100, 200, 300]);
        assert_eq!(verdict(&digest("a"), &digest("a")), None);
        assert_eq!(verdict(&digest("a"), &death()), Some(Verdict::Differs));
        let out_of_time = || Fate::OutOfTime("t".to_owned());
        assert_eq!(verdict(&digest("a"), &out_of_time()), Some(Verdict::Differs));
        assert!(matches!(verdict(&out_of_time(), &digest("a")), Some(Verdict::Excluded(_))));
        assert_eq!(verdict(&death(), &digest("a")), Some(Verdict::Excluded("triple fault".to_owned())));
        assert_eq!(verdict(&death(), &Fate::Defect("internal".to_owned())), Some(Verdict::Differs));
    }
}
