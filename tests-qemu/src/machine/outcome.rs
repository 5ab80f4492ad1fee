//! How a run ended.

use std::fmt;

use protocol::stop::StopKind;

use crate::protocol::HostStop;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched the machine off.
    GuestShutdown,
    /// The guest ended the machine with a code other than 0, through [`EXIT_PORT`](protocol::EXIT_PORT).
    GuestFailure(u32),
    /// l1hv stopped and gave its reason.
    HostStop(HostStop),
    /// The processor triple-faulted.
    TripleFault,
    /// The run took longer than its limit.
    Timeout,
    /// No output for longer than its limit.
    Silence,
    /// The emulator ended by itself: its last lines.
    MachineError(String),
}

impl Outcome {
    /// The outcome for a value that a guest wrote to the exit port: 0 is a plain shutdown.
    pub fn of_exit_code(code: u32) -> Self {
        if code == 0 { Self::GuestShutdown } else { Self::GuestFailure(code) }
    }

    /// The exit status of the command line for this outcome.
    pub fn status(&self) -> u8 {
        match self {
            Self::GuestShutdown => 0,
            Self::MachineError(_) => 1,
            Self::HostStop(stop) if stop.kind == StopKind::TripleFault.name() => 4,
            Self::HostStop(_) => 3,
            Self::TripleFault => 4,
            Self::Timeout | Self::Silence => 5,
            Self::GuestFailure(_) => 7,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestShutdown => f.write_str("the guest shut the machine down"),
            Self::GuestFailure(code) => write!(f, "the guest ended the machine with code {code}"),
            Self::HostStop(stop) => write!(f, "l1hv stopped ({}): {}", stop.kind, stop.message),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Timeout => f.write_str("timeout: the run took longer than its limit"),
            Self::Silence => f.write_str("timeout: no output for longer than its limit"),
            Self::MachineError(what) => write!(f, "the emulator ended by itself:\n{what}"),
        }
    }
}
