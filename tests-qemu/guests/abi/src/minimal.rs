//! The protocol between the minimal guest hypervisor's nested guest and the runner.

/// Times that each operation is done.
pub const REPEATS: usize = 1000;

/// Name of the emulator's marks around operation 0; the last character counts up.
pub const MARK: &[u8; 11] = b"minimal-opA";

/// Names of the operations, in the order in which the nested guest does them.
///
/// "HLT" continues after the instruction. In "HLT and wake by interrupt" the nested guest enables interrupts and halts.
/// The hypervisor answers the exit with an interrupt by VM-entry event injection: STI, HLT, its handler, IRET, CLI.
pub const OPERATIONS: [&str; 8] = [
    "CPUID",
    "VMCALL",
    "RDMSR",
    "WRMSR",
    "OUT",
    "HLT",
    "storm: CPUID, VMCALL, RDMSR, WRMSR, OUT",
    "HLT and wake by interrupt",
];
