//! The protocol between the guests of the tests, the VMM that runs some of them, and the runner.
//!
//! ```text
//!   mark        the emulator's counters, printed under a name
//!   minimal     the minimal guest hypervisor's nested guest
//!   parallel    the parallel workload
//!   payload     the bare-metal payload and its VMM
//!   port        port I/O
//! ```
//!
//! The protocol of l1hv itself is in `protocol`.
#![no_std]

pub mod mark;
pub mod minimal;
pub mod parallel;
pub mod payload;
pub mod port;

/// Begins the line of a measurement or verdict: the rest of the line is a JSON object.
pub const RESULT_PREFIX: &str = "L1HV-RESULT ";

/// Begins the line of a point that a guest has reached: `L1HV-MARK NAME tsc=DECIMAL`.
pub const MARK_PREFIX: &str = "L1HV-MARK ";

/// Begins a line `ns=NUMBER tsc=NUMBER`: CLOCK_MONOTONIC since the program began, and the time-stamp counter.
pub const CLOCK_PREFIX: &str = "L1HV-CLOCK ";

/// Begins each line of a nested guest on the guest hypervisor's console.
pub const NESTED_PREFIX: &str = "nested: ";

/// The first line that the init of a nested Linux prints.
pub const NESTED_INIT: &str = "L1HV-NESTED-INIT";
