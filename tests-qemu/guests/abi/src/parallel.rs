//! The results that the parallel workload prints, and the right ones.

use core::fmt;

/// Begins the line with the result; the rest is [`Results`].
pub const PREFIX: &str = "L1HV-PARALLEL ";

/// Words of shared memory.
pub const WORDS: u64 = 1 << 16;
/// Word `n` is this times `n`, modulo 2^64.
pub const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// Times that each processor takes a lock and waits for all others.
pub const ROUNDS: u64 = 100;
/// Times that the token goes round.
pub const LAPS: u64 = 200;

/// The joint results of the processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Results {
    /// The number of processors that took part.
    pub cpus: u64,
    /// The sum of all words of shared memory, modulo 2^64.
    pub sum: u64,
    /// Times that any processor took the lock.
    pub locked: u64,
    /// Processors that the token has visited.
    pub hops: u64,
}

impl Results {
    /// The right results for `cpus` processors.
    pub const fn of(cpus: u64) -> Self {
        let sum = FACTOR.wrapping_mul(WORDS * (WORDS - 1) / 2);
        Self { cpus, sum, locked: cpus * ROUNDS, hops: cpus * LAPS }
    }

    /// Whether the results are right.
    pub fn are_right(self) -> bool {
        self == Self::of(self.cpus)
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpus, sum, locked, hops } = self;
        write!(f, "cpus={cpus} sum={sum} locked={locked} hops={hops}")
    }
}
