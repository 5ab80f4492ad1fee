//! Hostile programs: nothing is compared. The host has to survive, with the same code and constants as before.

use std::fmt;
use std::time::Instant;

use anyhow::Result;
use protocol::statistics::CHECKSUM_PREFIX;
use table::grouped;

use super::side::is_the_guests_fault;
use super::{BATCH, Fuzzer, Range, Side};
use crate::machine::Outcome;

/// What became of the host.
#[derive(Debug, Default)]
pub struct Survival {
    seed: u64,
    programs: u64,
    seconds: u64,
    /// Checksums that the host has printed.
    checksums: Vec<String>,
    /// How often programs have ended the machine as the bare machine would end, too: by a triple fault, a VMX abort, or
    /// an error of the image itself, whose memory is not safe from its own programs.
    ended: u64,
    /// How often a processor was lost to its own program: the host still answers on the others.
    lost: u64,
    /// Ends that are the host's fault, each with the first program of its batch.
    pub defects: Vec<(u64, String)>,
}

impl Survival {
    /// Whether the host has survived, and has shown its checksum.
    pub fn is_right(&self) -> bool {
        self.defects.is_empty() && self.programs > 0 && self.checksums.len() >= 2 && self.is_unchanged()
    }

    fn is_unchanged(&self) -> bool {
        self.checksums.windows(2).all(|pair| pair[0] == pair[1])
    }
}

impl fmt::Display for Survival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (program, how) in &self.defects {
            writeln!(f, "from program {program} on: {how}")?;
        }
        let Self { seed, programs, seconds, checksums, ended, lost, defects } = self;
        let memory = if self.is_unchanged() { "the same" } else { "DIFFERENT" };
        write!(
            f,
            "seed {seed}: {} hostile programs in {seconds} s, {} checksums of the host's code and constants, {memory}; {ended} \
             times the machine ended by its guest's fault, {lost} times a processor was lost to its own program, {} times the \
             machine ended by the host's fault",
            grouped(*programs),
            checksums.len(),
            defects.len()
        )
    }
}

impl Fuzzer<'_> {
    /// Runs hostile programs, and starts again behind a batch that ends the machine.
    ///
    /// # Errors
    /// When a machine cannot be started.
    pub fn run_hostile(&self, range: Range) -> Result<Survival> {
        let began = Instant::now();
        let deadline = range.limit.map(|limit| began + limit);
        let step = self.progress.step(format!("hostile programs of seed {}", self.seed));
        let mut survival = Survival { seed: self.seed, ..Survival::default() };
        let (mut next, end) = (range.first, range.first.saturating_add(range.count));
        while next < end {
            let Some(left) = super::side::time_left(deadline) else { break };
            let arguments = format!("hostile first={next} count={} batch={BATCH}", end - next);
            let lost_before = survival.lost;
            let outcome = self.run_image(Side::L1hv, "hostile", (&arguments, left), |line| {
                if let Some(checksum) = line.strip_prefix(CHECKSUM_PREFIX) {
                    survival.checksums.push(checksum.to_owned());
                } else if line.starts_with("F-LOST ") {
                    survival.lost += 1;
                } else if line.starts_with("F ") {
                    survival.programs += BATCH.min(end - next);
                    next += BATCH.min(end - next);
                }
            })?;
            match outcome {
                None => (),
                Some(Outcome::Timeout) => break,
                Some(outcome) if is_the_guests_fault(&outcome) => survival.ended += 1,
                Some(Outcome::GuestShutdown) if survival.lost > lost_before => (),
                Some(outcome) => {
                    step.line(&format!("  from program {next} on: {outcome}"));
                    survival.defects.push((next, outcome.to_string()));
                }
            }
            // Behind a whole end `next` is the end.
            next += BATCH.min(end - next);
        }
        survival.seconds = began.elapsed().as_secs();
        step.done();
        Ok(survival)
    }
}

#[cfg(test)]
mod tests {
    use protocol::stop::StopKind;

    use super::*;
    use crate::protocol::HostStop;

    #[test]
    fn a_host_that_stops_for_its_own_reason_or_changes_has_not_survived() {
        let stop = |kind: StopKind| Outcome::HostStop(HostStop { kind: kind.name().into(), message: String::new() });
        assert!(is_the_guests_fault(&stop(StopKind::TripleFault)));
        assert!(!is_the_guests_fault(&stop(StopKind::Internal)) && !is_the_guests_fault(&Outcome::Silence));
        let survival = |sums: &[&str], defects: &[(u64, String)]| Survival {
            programs: 1,
            checksums: sums.iter().map(|&sum| sum.to_owned()).collect(),
            defects: defects.to_vec(),
            ..Survival::default()
        };
        assert!(survival(&["a", "a"], &[]).is_right());
        assert!(!survival(&["a", "b"], &[]).is_right() && !survival(&["a"], &[]).is_right());
        assert!(!survival(&["a", "a"], &[(0, String::new())]).is_right());
    }
}
