//! Counters of the interrupts and NMIs that each processor has taken, by vector, which all processors can read.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, AtomicUsize};

use crate::apic;

use super::MAX;

/// Vectors.
const VECTORS: usize = 256;

/// A counter for each vector and processor. Only that processor writes it: its host, or its nested guest.
pub struct Counters([[AtomicU64; VECTORS]; MAX]);

impl Counters {
    /// Counters at 0. Counters that other processors read belong in section `.shared`.
    pub const fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; VECTORS] }; MAX])
    }

    /// The number that a processor has counted.
    pub fn by(&self, number: usize, vector: u8) -> u64 {
        self.0[number][usize::from(vector)].load(Acquire)
    }

    /// Counts one more on this processor.
    pub fn count(&self, vector: u8) {
        let counter = &self.0[number()][usize::from(vector)];
        counter.store(counter.load(Relaxed) + 1, Release);
    }

    /// Sets all processors' counters of this vector to 0.
    pub fn forget(&self, vector: u8) {
        for row in &self.0 {
            row[usize::from(vector)].store(0, Release);
        }
    }

    /// The address of a processor's counters, a quadword each, for a nested guest that counts itself.
    pub fn row(&self, number: usize) -> u64 {
        self.0[number].as_ptr().addr() as u64
    }
}

/// The interrupts and NMIs that the hosts have taken.
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
