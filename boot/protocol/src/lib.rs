//! The protocol between l1hv, its guests and the runner of its tests: ports, numbers and words on which both sides must
//! agree.
//!
//! ```text
//!   l1hv          log, statistics, the line of a stop ----> DEBUG_PORT ----> the runner
//!   l1hv, guest   how the machine ends -------------------> EXIT_PORT, SHUTDOWN_PORT
//!   guest         asks l1hv: CPUID (statistics), VMCALL (hypercall)
//! ```
#![no_std]
#![forbid(unsafe_code)]

pub mod hypercall;
pub mod statistics;
pub mod stop;

/// A byte written here appears on the emulator's debug stream at once (Bochs `port_e9_hack`, QEMU `isa-debugcon`). If
/// there is such a stream, reads return the port's own number.
pub const DEBUG_PORT: u16 = 0xe9;

/// A dword written here ends the machine, and is its exit status. QEMU's exit status is then `2 * value + 1`
/// (`isa-debug-exit`); the runner's Bochs has the port by a patch.
pub const EXIT_PORT: u16 = 0xf4;

/// Writing [`SHUTDOWN_TEXT`] here, byte by byte, ends Bochs.
pub const SHUTDOWN_PORT: u16 = 0x8900;

/// See [`SHUTDOWN_PORT`].
pub const SHUTDOWN_TEXT: &[u8; 8] = b"Shutdown";

/// "l1hv" in ASCII, 6C316876H: the number in EAX with which a guest addresses l1hv.
const SIGNATURE: u32 = u32::from_be_bytes(*b"l1hv");
