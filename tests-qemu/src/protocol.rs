//! Lines on the streams of a machine, besides those of l1hv ([`::protocol`]) and of the guests ([`guest_abi`]).

pub use ::protocol::statistics::LINE_PREFIX as STATS_PREFIX;

/// A line of our Bochs: the counters at a mark (see [`crate::counters`]).
pub const COUNT_PREFIX: &str = "L1HV-COUNT mark=";

/// Bochs's own mark at the first time that an operating system sets IA32_EFER.SCE, which Linux does once it is
/// decompressed.
pub const KERNEL_STARTS: &str = "efer.sce";

/// l1hv's own reason for stopping the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostStop {
    /// The name of a [`StopKind`](::protocol::stop::StopKind).
    pub kind: String,
    /// What is wrong and what to do about it.
    pub message: String,
}

impl HostStop {
    /// Reads a line of l1hv's log.
    pub fn parse(line: &str) -> Option<Self> {
        let (kind, message) = ::protocol::stop::parse(line)?;
        Some(Self { kind: kind.into(), message: message.into() })
    }
}
