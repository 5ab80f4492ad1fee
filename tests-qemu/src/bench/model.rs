//! A cycle model: an estimate of the counts' cost on silicon, where VMX instructions, MSR accesses and transitions are
//! expensive.
//!
//! It serves to compare designs, and is not a measurement: every instruction counts as one cycle, and all accesses hit
//! caches and TLBs.
//!
//! | unit | cycles | source |
//! |---|---|---|
//! | VM exit and the entry that follows | 784 | Agesen, Mattson, Rugina, Sheldon: "Software Techniques for Avoiding Hardware Virtualization Exits", USENIX ATC 2012, hardware round trip, Sandy Bridge |
//! | VMREAD | 52 | Adams, Agesen: "A Comparison of Software and Hardware Techniques for x86 Virtualization", ASPLOS 2006, Core 2 Duo (VMCB read) |
//! | VMWRITE | 44 | the same (VMCB write) |
//! | VMPTRLD, VMCLEAR | 100 | assumed: no published figure; each moves a VMCS between chip and memory |
//! | INVEPT, INVVPID | 200 | assumed: no published figure |
//! | RDMSR, WRMSR | 100 | assumed: microcoded, and WRMSR mostly serializes |

use super::measure::Measurement;

const EXIT_AND_ENTRY: u64 = 784;
const VMREAD: u64 = 52;
const VMWRITE: u64 = 44;
const CHANGE_OF_VMCS: u64 = 100;
const INVALIDATION: u64 = 200;
const MSR_ACCESS: u64 = 100;

/// The estimate. An instruction with its own cost counts as one cycle in addition.
pub const fn cycles(counts: &Measurement) -> u64 {
    counts.instructions
        + counts.hardware_exits * EXIT_AND_ENTRY
        + counts.vmread * VMREAD
        + counts.vmwrite * VMWRITE
        + (counts.vmptrld + counts.vmclear) * CHANGE_OF_VMCS
        + (counts.invept + counts.invvpid) * INVALIDATION
        + (counts.rdmsr + counts.wrmsr) * MSR_ACCESS
}
