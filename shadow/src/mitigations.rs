//! Speculation of the processor between a nested guest and its hypervisor, and what the host does about it.
//!
//! A bare processor tells a hypervisor, in VMX root operation, from its guest. Below a host both run in VMX non-root
//! operation, and the processor takes them for one: enhanced IBRS keeps the nested guest's indirect branches from its
//! hypervisor's predictions no more. And a hypervisor that clears buffers right before its VM entry does so before the
//! host's instructions, whose data would be in the buffers.
//!
//! The processor itself does what is needed: MSRs that are commands are in the MSR areas of vmcs02, so that no path of
//! the host has an instruction more. Intel's "Speculative Execution Side Channel Mitigations" has the commands; SDM
//! Volume 4, Table 2-2 the MSRs.

use core::fmt;

use crate::merge::MsrEntry;
use crate::msr::{IA32_FLUSH_CMD, IA32_PRED_CMD};

/// What a processor says of its speculation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speculation {
    /// CPUID.07H.0:EBX.
    pub features_ebx: u32,
    /// CPUID.07H.0:EDX.
    pub features_edx: u32,
    /// IA32_ARCH_CAPABILITIES; 0 where there is none.
    pub arch_capabilities: u64,
}

impl Speculation {
    const RTM: u32 = 1 << 11;
    const MD_CLEAR: u32 = 1 << 10;
    const IBRS_IBPB: u32 = 1 << 26;
    const L1D_FLUSH: u32 = 1 << 28;
    /// IA32_ARCH_CAPABILITIES is there.
    pub const ARCH_CAPABILITIES: u32 = 1 << 29;
    const RDCL_NO: u64 = 1 << 0;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const MDS_NO: u64 = 1 << 5;
    const TAA_NO: u64 = 1 << 8;
    /// SBDR_SSDP_NO, FBSDP_NO and PSDP_NO.
    const STALE_MMIO_NO: u64 = 7 << 13;
    const FB_CLEAR: u64 = 1 << 17;

    const fn says(&self, capabilities: u64) -> bool {
        self.arch_capabilities & capabilities == capabilities
    }

    /// L1 terminal fault.
    const fn leaks_the_l1d(&self) -> bool {
        !self.says(Self::RDCL_NO) && !self.says(Self::SKIP_L1DFL_VMENTRY)
    }

    /// MDS, TAA, and stale data of MMIO accesses.
    const fn leaks_buffers(&self) -> bool {
        let by_sampling = self.features_edx & Self::MD_CLEAR != 0 && !self.says(Self::MDS_NO);
        let by_aborts = self.features_ebx & Self::RTM != 0 && !self.says(Self::TAA_NO);
        let by_mmio = self.says(Self::FB_CLEAR) && !self.says(Self::STALE_MMIO_NO);
        by_sampling || by_aborts || by_mmio
    }
}

/// What the host does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mitigations {
    /// An indirect-branch prediction barrier at each exit of a nested guest.
    pub branch_barrier: bool,
    /// A flush of the L1 data cache, and of the buffers with it, at each entry.
    pub cache_flush: bool,
}

impl Mitigations {
    /// Nothing.
    pub const NONE: Self = Self { branch_barrier: false, cache_flush: false };

    /// What a processor needs and has a command for.
    pub const fn of(processor: &Speculation) -> Self {
        Self {
            branch_barrier: processor.features_edx & Speculation::IBRS_IBPB != 0,
            cache_flush: processor.features_edx & Speculation::L1D_FLUSH != 0
                && (processor.leaks_the_l1d() || processor.leaks_buffers()),
        }
    }

    /// What the VM-exit MSR-load area of vmcs02 has.
    pub const fn at_exit(&self) -> &'static [MsrEntry] {
        /// IBPB.
        const BARRIER: &[MsrEntry] = &[MsrEntry { index: IA32_PRED_CMD, reserved: 0, value: 1 }];
        if self.branch_barrier { BARRIER } else { &[] }
    }

    /// What the VM-entry MSR-load area of vmcs02 ends with.
    pub const fn at_entry(&self) -> &'static [MsrEntry] {
        /// L1D_FLUSH.
        const FLUSH: &[MsrEntry] = &[MsrEntry { index: IA32_FLUSH_CMD, reserved: 0, value: 1 }];
        if self.cache_flush { FLUSH } else { &[] }
    }
}

impl fmt::Display for Mitigations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.branch_barrier, self.cache_flush) {
            (false, false) => f.write_str("none"),
            (true, false) => f.write_str("IBPB at exits of nested guests"),
            (false, true) => f.write_str("L1D flush at entries of nested guests"),
            (true, true) => f.write_str("IBPB at exits of nested guests, L1D flush at their entries"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mitigations(features_ebx: u32, features_edx: u32, arch_capabilities: u64) -> Mitigations {
        Mitigations::of(&Speculation { features_ebx, features_edx, arch_capabilities })
    }

    #[test]
    fn a_processor_without_commands_gets_none() {
        assert_eq!(mitigations(u32::MAX, 0, 0), Mitigations::NONE);
    }

    #[test]
    fn a_processor_with_ibrs_gets_the_barrier_whatever_else_it_says() {
        for capabilities in [0, u64::MAX, 1 << 1] {
            assert!(mitigations(0, Speculation::IBRS_IBPB, capabilities).branch_barrier);
        }
        let at_exit = mitigations(0, Speculation::IBRS_IBPB, u64::MAX).at_exit();
        assert_eq!(at_exit, [MsrEntry { index: 0x49, reserved: 0, value: 1 }]);
    }

    #[test]
    fn the_cache_is_flushed_for_each_leak_alone() {
        const FLUSH: u32 = Speculation::L1D_FLUSH;
        const SAFE: u64 = Speculation::RDCL_NO | Speculation::MDS_NO | Speculation::TAA_NO | Speculation::STALE_MMIO_NO;
        let flushes = |ebx, edx, capabilities| mitigations(ebx, edx, capabilities).cache_flush;
        assert!(!flushes(Speculation::RTM, FLUSH | Speculation::MD_CLEAR, SAFE));
        assert!(flushes(0, FLUSH, SAFE & !Speculation::RDCL_NO));
        assert!(!flushes(0, FLUSH, SAFE & !Speculation::RDCL_NO | Speculation::SKIP_L1DFL_VMENTRY), "done below");
        assert!(flushes(0, FLUSH | Speculation::MD_CLEAR, SAFE & !Speculation::MDS_NO));
        assert!(flushes(Speculation::RTM, FLUSH, SAFE & !Speculation::TAA_NO));
        assert!(!flushes(0, FLUSH, SAFE & !Speculation::TAA_NO), "no transactions");
        for part in 13..16 {
            assert!(flushes(0, FLUSH, SAFE & !(1 << part) | Speculation::FB_CLEAR));
        }
        assert!(!flushes(0, 0, 0), "there is no command");
    }
}
