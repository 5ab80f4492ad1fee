//! A meeting point at which processors wait for each other.

use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use super::{count, wait_until};

/// A point that every processor reaches, once or repeatedly; for section `.shared`.
pub struct Meeting(AtomicUsize);

impl Meeting {
    /// No processor has arrived.
    pub const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Resets the meeting. No processor may be arriving.
    pub fn clear(&self) {
        self.0.store(0, Release);
    }

    /// Notes that this processor has arrived.
    pub fn arrive(&self) {
        self.0.fetch_add(1, AcqRel);
    }

    /// Whether all processors have arrived.
    pub fn is_complete(&self) -> bool {
        self.0.load(Acquire) >= count()
    }

    /// Arrives, and waits for the others; may be repeated.
    pub fn join(&self) {
        let others_of_round = self.0.fetch_add(1, AcqRel) / count() + 1;
        let is_complete = || self.0.load(Acquire) >= others_of_round * count();
        assert!(wait_until(is_complete), "a processor does not come to the meeting");
    }
}
