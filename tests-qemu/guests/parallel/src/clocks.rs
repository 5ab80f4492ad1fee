//! The values of the clocks.
#![allow(unsafe_code, reason = "RDTSC")]

use std::arch::x86_64::_rdtsc;
use std::time::Instant;

use guest_abi::CLOCK_PREFIX;

/// The clocks since a starting point.
#[derive(Debug, Clone, Copy)]
pub struct Clocks(Instant);

impl Clocks {
    /// Starts the clocks.
    pub fn new() -> Self {
        Self(Instant::now())
    }

    /// Prints the clocks.
    pub fn print(self) {
        let ns = self.0.elapsed().as_nanos();
        // SAFETY: Linux leaves CR4.TSD clear for its processes; RDTSC has no other effect.
        let tsc = unsafe { _rdtsc() };
        println!("{CLOCK_PREFIX}ns={ns} tsc={tsc}");
    }
}
