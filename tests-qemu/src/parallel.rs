//! The results of the parallel workload at each level.

use std::fmt;

use guest_abi::parallel::PREFIX;
use guest_abi::{CLOCK_PREFIX, NESTED_PREFIX};
use serde::Deserialize;

pub use guest_abi::parallel::Results;

/// The level that ran the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The guest hypervisor.
    GuestHypervisor,
    /// A nested guest.
    NestedGuest,
}

impl Level {
    /// The level that wrote a line of the console, and the line.
    fn of(line: &str) -> (Self, &str) {
        match line.strip_prefix(NESTED_PREFIX) {
            Some(line) => (Self::NestedGuest, line),
            None => (Self::GuestHypervisor, line),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestHypervisor => "guest hypervisor",
            Self::NestedGuest => "nested guest",
        })
    }
}

/// A run of the workload that has reported success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallel {
    /// The level.
    pub level: Level,
    /// The results.
    pub results: Results,
}

impl Parallel {
    /// Reads a line of the console.
    pub fn of(line: &str) -> Option<Self> {
        let (level, line) = Level::of(line);
        let mut numbers = ["cpus=", "sum=", "locked=", "hops="].into_iter().zip(line.strip_prefix(PREFIX)?.split(' '));
        let mut next = || {
            let (name, word) = numbers.next()?;
            word.strip_prefix(name)?.trim().parse().ok()
        };
        Some(Self { level, results: Results { cpus: next()?, sum: next()?, locked: next()?, hops: next()? } })
    }

    /// The failure of `runs`, if any: each level must have a run with the expected number of processors, and all must
    /// be right.
    pub fn failure(runs: &[Self], expected: [(Level, u32); 2]) -> Option<String> {
        for (level, cpus) in expected {
            let of_level: Vec<_> = runs.iter().filter(|run| run.level == level).collect();
            if of_level.is_empty() {
                return Some(format!("{level}: the parallel workload did not finish"));
            }
            let right = Results::of(cpus.into());
            if let Some(wrong) = of_level.iter().find(|run| run.results != right) {
                return Some(format!("{level}: the parallel workload found {}, right is {right}", wrong.results));
            }
        }
        None
    }
}

/// The clocks of a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Clock {
    /// CLOCK_MONOTONIC since a starting point of the level's own.
    pub ns: u64,
    /// The time-stamp counter.
    pub tsc: u64,
}

impl Clock {
    /// Reads a line of the console. The guest hypervisor's own clocks are a
    /// [`GuestResult`](crate::transcript::GuestResult).
    pub fn of_nested_guest(line: &str) -> Option<Self> {
        let (ns, tsc) =
            line.strip_prefix(NESTED_PREFIX)?.strip_prefix(CLOCK_PREFIX)?.strip_prefix("ns=")?.split_once(" tsc=")?;
        Some(Self { ns: ns.parse().ok()?, tsc: tsc.trim().parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_counts_for_its_level_and_number_of_processors_only() {
        let line = format!("{}{}", PREFIX, Results::of(4));
        let (host, nested) = (Parallel::of(&line).unwrap(), Parallel::of(&format!("{NESTED_PREFIX}{line}")).unwrap());
        assert_eq!((host.level, nested.level), (Level::GuestHypervisor, Level::NestedGuest));
        let expected = |cpus| [(Level::GuestHypervisor, 4), (Level::NestedGuest, cpus)];
        assert_eq!(Parallel::failure(&[host, nested], expected(4)), None);
        assert!(Parallel::failure(&[host, nested], expected(2)).unwrap().starts_with("nested guest"));
        assert!(Parallel::failure(&[host], expected(4)).is_some());
        let wrong = Parallel { results: Results { hops: 1, ..host.results }, ..host };
        assert!(Parallel::failure(&[wrong, nested], expected(4)).is_some());
    }
}
