//! How many interrupts and NMIs each processor has taken, by vector, for all to see.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, AtomicUsize};

use crate::apic;

use super::MAX;

/// Vectors.
const VECTORS: usize = 256;

/// A counter for each vector and processor, which that processor alone writes: its host, or its nested guest.
pub struct Counters([[AtomicU64; VECTORS]; MAX]);

impl Counters {
    /// All zero. Counters that others look at belong into section `.shared`.
    pub const fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; VECTORS] }; MAX])
    }

    /// How many a processor has counted.
    pub fn by(&self, number: usize, vector: u8) -> u64 {
        self.0[number][usize::from(vector)].load(Acquire)
    }

    /// One more on this processor.
    pub fn count(&self, vector: u8) {
        let counter = &self.0[number()][usize::from(vector)];
        counter.store(counter.load(Relaxed) + 1, Release);
    }

    /// Nobody has counted any of this vector.
    pub fn forget(&self, vector: u8) {
        for row in &self.0 {
            row[usize::from(vector)].store(0, Release);
        }
    }

    /// Where a processor's counters are, a quadword each: for a nested guest that counts itself.
    pub fn row(&self, number: usize) -> u64 {
        self.0[number].as_ptr().addr() as u64
    }
}

/// What the hosts have taken.
#[unsafe(link_section = ".shared")]
pub static TAKEN: Counters = Counters::new();

/// This processor's number.
static NUMBER: AtomicUsize = AtomicUsize::new(0);

/// Finds out this processor's number, and returns it.
pub fn init() -> usize {
    NUMBER.store(apic::id(), Relaxed);
    number()
}

/// This processor's number.
pub fn number() -> usize {
    NUMBER.load(Relaxed)
}
