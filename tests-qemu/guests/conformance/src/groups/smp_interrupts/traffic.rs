//! The traffic: each processor sends its own vectors to every processor, itself included, one at a time.

use crate::smp::{self, Counters, MAX};

/// Vectors of one sender.
const STREAMS: usize = 2;
/// Interrupts of one vector from one sender to one receiver.
const QUOTA: u64 = 800;
/// Rounds without any progress after which an interrupt counts as lost.
const PATIENCE: u64 = 50_000;

/// The vector of a sender's stream: a priority class for each sender.
fn vector(sender: usize, stream: usize) -> u8 {
    (0x40 + 0x10 * sender + 5 * stream) as u8
}

/// Every vector that is sent.
pub fn vectors() -> impl Iterator<Item = u8> {
    (0..smp::count()).flat_map(|sender| (0..STREAMS).map(move |stream| vector(sender, stream)))
}

/// The interrupts that this processor sends.
pub struct Traffic {
    counters: &'static Counters,
    send: fn(usize, u8),
    sent: [[u64; STREAMS]; MAX],
    rounds_without_progress: u64,
}

impl Traffic {
    /// The state before any interrupt is sent. `counters` are the receivers', and `send` sends an interrupt.
    pub fn new(counters: &'static Counters, send: fn(usize, u8)) -> Self {
        Self { counters, send, sent: [[0; STREAMS]; MAX], rounds_without_progress: 0 }
    }

    /// Sends each vector to each processor that has counted the last one.
    pub fn send(&mut self) {
        self.rounds_without_progress += 1;
        for (receiver, streams) in self.sent.iter_mut().enumerate().take(smp::count()) {
            for (stream, sent) in streams.iter_mut().enumerate() {
                let vector = vector(smp::number(), stream);
                if *sent < QUOTA && self.counters.by(receiver, vector) == *sent {
                    *sent += 1;
                    self.rounds_without_progress = 0;
                    (self.send)(receiver, vector);
                }
            }
        }
    }

    /// Whether everything is sent and counted, or no more will be.
    pub fn is_over(&self) -> bool {
        let is_counted = |receiver, stream| self.counters.by(receiver, vector(smp::number(), stream)) >= QUOTA;
        let mut all = (0..smp::count()).flat_map(|receiver| (0..STREAMS).map(move |stream| (receiver, stream)));
        self.rounds_without_progress > PATIENCE || all.all(|(receiver, stream)| is_counted(receiver, stream))
    }
}

/// Whether each processor has counted each vector as often as it was sent.
pub fn is_right(counters: &Counters) -> bool {
    (0..smp::count()).all(|receiver| vectors().all(|vector| counters.by(receiver, vector) == QUOTA))
}

/// The sum of all counters.
pub fn total(counters: &Counters) -> u64 {
    (0..smp::count()).flat_map(|receiver| vectors().map(move |vector| counters.by(receiver, vector))).sum()
}
