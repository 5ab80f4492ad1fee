//! How many interrupts and NMIs each processor has taken, by vector, for all to see.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicU64, AtomicUsize};

use crate::apic;

use super::MAX;

/// Vectors.
const VECTORS: usize = 256;

#[unsafe(link_section = ".shared")]
static TAKEN: [[AtomicU64; VECTORS]; MAX] = [const { [const { AtomicU64::new(0) }; VECTORS] }; MAX];

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

/// This processor has taken one. Nobody else writes its counters.
pub fn count(vector: u8) {
    let counter = &TAKEN[number()][usize::from(vector)];
    counter.store(counter.load(Relaxed) + 1, Release);
}

/// How many a processor has taken.
pub fn by(number: usize, vector: u8) -> u64 {
    TAKEN[number][usize::from(vector)].load(Acquire)
}
