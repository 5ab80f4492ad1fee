//! What the same operations cost with Linux 6.1 KVM as the nesting hypervisor.
//!
//! Medians of instructions on Bochs 3.0 (skylake_x), KVM with VMCS shadowing, EPT and APICv, `mitigations=off`.

/// Costs of one operation.
#[derive(Debug, Clone, Copy)]
pub struct Baseline {
    /// The operation, named as by the payload.
    pub operation: &'static str,
    /// KVM on the machine itself.
    pub not_nested: u64,
    /// KVM under KVM.
    pub nested: u64,
    /// KVM with `ept=0` under KVM.
    pub nested_without_ept: Option<u64>,
}

const fn row(operation: &'static str, not_nested: u64, nested: u64, without_ept: Option<u64>) -> Baseline {
    Baseline { operation, not_nested, nested, nested_without_ept: without_ept }
}

/// All that was measured.
pub const KVM: &[Baseline] = &[
    row("CPUID", 967, 18_011, Some(23_343)),
    row("VMCALL", 1_002, 18_048, Some(23_380)),
    row("RDMSR", 1_076, 18_306, Some(23_638)),
    row("WRMSR", 1_115, 18_345, Some(23_677)),
    row("OUT to the VMM process", 3_072, 32_634, Some(37_964)),
    row("MMIO write to the VMM process", 5_469, 35_946, Some(40_347)),
    row("first touch of a page, backed", 2_770, 25_538, None),
];

/// Ticks of Linux as nested guest from its first instruction to init, under KVM under KVM.
pub const KVM_NESTED_LINUX: u64 = 2_302_000_000;

/// The costs of `operation`.
pub fn of(operation: &str) -> Option<&'static Baseline> {
    KVM.iter().find(|row| row.operation == operation)
}
