//! What the minimal guest hypervisor's nested guest and the runner agree on.

/// Times that each operation is done.
pub const REPEATS: usize = 1000;

/// Name of the emulator's marks around operation 0; the last character counts up.
pub const MARK: &[u8; 11] = b"minimal-opA";

/// Names of the operations, in the order in which the nested guest does them.
pub const OPERATIONS: [&str; 7] =
    ["CPUID", "VMCALL", "RDMSR", "WRMSR", "OUT", "HLT", "storm: CPUID, VMCALL, RDMSR, WRMSR, OUT"];
