//! How a run ended.

use std::fmt;

use crate::protocol::HostStop;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched the machine off.
    GuestShutdown,
    /// l1hv said why it cannot go on.
    HostStop(HostStop),
    /// The processor met a fault that nobody handled.
    TripleFault,
    /// The run took longer than its limit.
    Timeout,
    /// No output for longer than its limit.
    Silence,
    /// The emulator ended by itself; its last words.
    MachineError(String),
}

impl Outcome {
    /// The exit status of the command line for this outcome.
    pub fn status(&self) -> u8 {
        match self {
            Self::GuestShutdown => 0,
            Self::MachineError(_) => 1,
            Self::HostStop(stop) if stop.kind == "triple-fault" => 4,
            Self::HostStop(_) => 3,
            Self::TripleFault => 4,
            Self::Timeout | Self::Silence => 5,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestShutdown => f.write_str("the guest shut the machine down"),
            Self::HostStop(stop) => write!(f, "l1hv stopped ({}): {}", stop.kind, stop.message),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Timeout => f.write_str("timeout: the run took longer than its limit"),
            Self::Silence => f.write_str("timeout: no output for longer than its limit"),
            Self::MachineError(what) => write!(f, "the emulator ended by itself:\n{what}"),
        }
    }
}
