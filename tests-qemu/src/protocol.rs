//! What l1hv, the guests and the runner say to each other.
//!
//! Two streams leave a machine: the console (COM1) belongs to the guest; the debug port carries l1hv's
//! log and the guests' fast markers, one line each. Port numbers are those of Bochs and QEMU.

/// A byte written here appears on the debug stream at once (Bochs `port_e9_hack`, QEMU `debugcon`).
pub const DEBUG_PORT: u16 = 0xe9;

/// Writing [`SHUTDOWN_STRING`] here, byte by byte, ends Bochs.
pub const SHUTDOWN_PORT: u16 = 0x8900;

/// See [`SHUTDOWN_PORT`].
pub const SHUTDOWN_STRING: &str = "Shutdown";

/// What is written here ends the machine and is the guest's verdict: QEMU's status is then `2 * value + 1` (`isa-debug-exit`), and
/// a patch of ours teaches Bochs the port.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// l1hv's last line when it cannot go on: `l1hv: stop: <KIND>: <message>`.
pub const STOP_PREFIX: &str = "l1hv: stop: ";

/// A line of l1hv's statistics: `REASON GUEST-HYPERVISOR NESTED REFLECTED`.
pub const STATS_PREFIX: &str = "[l1hv STATS] ";

/// What the init of a nested Linux prints first.
pub const NESTED_INIT: &str = "L1HV-NESTED-INIT";

/// A measurement or verdict of a guest: the rest of the line is a JSON object.
pub const RESULT_PREFIX: &str = "L1HV-RESULT ";

/// A point that a guest has reached: `L1HV-MARK <name> tsc=<decimal>`.
pub const MARK_PREFIX: &str = "L1HV-MARK ";

/// A line of our Bochs: the counters at a mark (see [`crate::counters`]).
pub const COUNT_PREFIX: &str = "L1HV-COUNT mark=";

/// Bochs's own mark where an operating system first sets IA32_EFER.SCE; Linux does so once it is
/// decompressed.
pub const KERNEL_STARTS: &str = "efer.sce";

/// `CPUID` with this `EAX` asks l1hv for something (`ECX` says what); any other machine answers
/// it like every unknown leaf.
pub const HYPERCALL_LEAF: u32 = 0x6c31_6876;

/// [`HYPERCALL_LEAF`] with this `ECX`: write the statistics to the log.
pub const HYPERCALL_STATS: u32 = 1;

/// Why l1hv stopped, from one line of its log.
///
/// ```
/// use tests_qemu::protocol::{HostStop, parse_stop};
/// let line = "l1hv: stop: no-vmx: this processor has no VMX";
/// let expected = HostStop { kind: "no-vmx".into(), message: "this processor has no VMX".into() };
/// assert_eq!(parse_stop(line), Some(expected));
/// assert_eq!(parse_stop("l1hv: entering the guest"), None);
/// ```
pub fn parse_stop(line: &str) -> Option<HostStop> {
    let (_, rest) = line.split_once(STOP_PREFIX)?;
    let (kind, message) = rest.split_once(": ").unwrap_or((rest, ""));
    Some(HostStop { kind: kind.trim().into(), message: message.trim().into() })
}

/// l1hv's own reason for stopping the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostStop {
    /// A kebab-case word, such as `no-vmx`.
    pub kind: String,
    /// What is wrong and what to do about it.
    pub message: String,
}
