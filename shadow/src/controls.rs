//! The control words, every bit by its SDM name, and what the merge does with each (SDM 25.6 to 25.8).

use bitflags::bitflags;

macro_rules! control_word {
    ($(#[$($doc:tt)*])* $name:ident: $repr:ty, { $($(#[$($bit_doc:tt)*])* $bit:ident = $pos:literal, $class:ident;)* }) => {
        bitflags! {
            $(#[$($doc)*])*
            #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
            pub struct $name: $repr {
                $($(#[$($bit_doc)*])* const $bit = 1 << $pos;)*
                // Bits that the table does not name stay representable.
                const _ = !0;
            }
        }

        impl $name {
            /// Bits whose vmcs02 value is vmcs12's.
            pub const FROM_GUEST: Self = Self::of_class(BitMerge::FromGuest);
            /// Bits that are 1 in vmcs02 whatever vmcs12 says.
            pub const FORCED: Self = Self::of_class(BitMerge::Forced);
            /// Bits that vmcs02 gets from code in [`crate::merge`].
            pub const COMPUTED: Self = Self::of_class(BitMerge::Computed);
            /// Bits that the guest hypervisor is not offered; always 0 in vmcs02.
            pub const HIDDEN: Self = Self::of_class(BitMerge::Hidden);

            const CLASSES: &[($repr, BitMerge)] = &[$((1 << $pos, BitMerge::$class)),*];

            const fn of_class(class: BitMerge) -> Self {
                let mut bits = 0;
                let mut i = 0;
                while i < Self::CLASSES.len() {
                    if Self::CLASSES[i].1 as u8 == class as u8 {
                        bits |= Self::CLASSES[i].0;
                    }
                    i += 1;
                }
                Self::from_bits_retain(bits)
            }
        }
    };
}

/// What the merge does with a bit of a control word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitMerge {
    /// vmcs02 has vmcs12's bit.
    FromGuest,
    /// 1 in vmcs02; vmcs12's bit is acted upon in software.
    Forced,
    /// Decided by code.
    Computed,
    /// Not offered to the guest hypervisor.
    Hidden,
}

control_word! {
    /// Pin-based VM-execution controls.
    Pin: u32, {
        /// External-interrupt exiting. The host takes no interrupts of its own, so the guest hypervisor's wish is all there is.
        EXTERNAL_INTERRUPT_EXITING = 0, FromGuest;
        /// NMI exiting.
        NMI_EXITING = 3, FromGuest;
        /// Virtual NMIs.
        VIRTUAL_NMIS = 5, FromGuest;
        /// Activate VMX-preemption timer.
        ACTIVATE_PREEMPTION_TIMER = 6, FromGuest;
        /// Process posted interrupts.
        PROCESS_POSTED_INTERRUPTS = 7, FromGuest;
    }
}

control_word! {
    /// Primary processor-based VM-execution controls.
    Primary: u32, {
        /// Interrupt-window exiting.
        INTERRUPT_WINDOW_EXITING = 2, FromGuest;
        /// Use TSC offsetting.
        USE_TSC_OFFSETTING = 3, FromGuest;
        /// HLT exiting.
        HLT_EXITING = 7, FromGuest;
        /// INVLPG exiting.
        INVLPG_EXITING = 9, FromGuest;
        /// MWAIT exiting.
        MWAIT_EXITING = 10, FromGuest;
        /// RDPMC exiting.
        RDPMC_EXITING = 11, FromGuest;
        /// RDTSC exiting.
        RDTSC_EXITING = 12, FromGuest;
        /// CR3-load exiting.
        CR3_LOAD_EXITING = 15, FromGuest;
        /// CR3-store exiting.
        CR3_STORE_EXITING = 16, FromGuest;
        /// Activate tertiary controls. Hidden: none of them is offered.
        ACTIVATE_TERTIARY = 17, Hidden;
        /// CR8-load exiting.
        CR8_LOAD_EXITING = 19, FromGuest;
        /// CR8-store exiting.
        CR8_STORE_EXITING = 20, FromGuest;
        /// Use TPR shadow.
        USE_TPR_SHADOW = 21, FromGuest;
        /// NMI-window exiting.
        NMI_WINDOW_EXITING = 22, FromGuest;
        /// MOV-DR exiting.
        MOV_DR_EXITING = 23, FromGuest;
        /// Unconditional I/O exiting.
        UNCONDITIONAL_IO_EXITING = 24, FromGuest;
        /// Use I/O bitmaps. Its sense is inverted: 1 lets instructions through that "unconditional I/O exiting" would trap.
        USE_IO_BITMAPS = 25, FromGuest;
        /// Monitor trap flag.
        MONITOR_TRAP_FLAG = 27, FromGuest;
        /// Use MSR bitmaps. Its sense is inverted: 0 makes every RDMSR and WRMSR exit.
        USE_MSR_BITMAPS = 28, FromGuest;
        /// MONITOR exiting.
        MONITOR_EXITING = 29, FromGuest;
        /// PAUSE exiting.
        PAUSE_EXITING = 30, FromGuest;
        /// Activate secondary controls.
        ACTIVATE_SECONDARY = 31, Forced;
    }
}

control_word! {
    /// Secondary processor-based VM-execution controls.
    Secondary: u32, {
        /// Virtualize APIC accesses.
        VIRTUALIZE_APIC_ACCESSES = 0, FromGuest;
        /// Enable EPT: with ept02, or with ept01 when vmcs12 has no EPT.
        ENABLE_EPT = 1, Forced;
        /// Descriptor-table exiting.
        DESCRIPTOR_TABLE_EXITING = 2, FromGuest;
        /// Enable RDTSCP.
        ENABLE_RDTSCP = 3, FromGuest;
        /// Virtualize x2APIC mode.
        VIRTUALIZE_X2APIC_MODE = 4, FromGuest;
        /// Enable VPID: the nested guest has one of the host's choice.
        ENABLE_VPID = 5, Forced;
        /// WBINVD exiting.
        WBINVD_EXITING = 6, FromGuest;
        /// Unrestricted guest.
        UNRESTRICTED_GUEST = 7, FromGuest;
        /// APIC-register virtualization.
        APIC_REGISTER_VIRTUALIZATION = 8, FromGuest;
        /// Virtual-interrupt delivery.
        VIRTUAL_INTERRUPT_DELIVERY = 9, FromGuest;
        /// PAUSE-loop exiting.
        PAUSE_LOOP_EXITING = 10, FromGuest;
        /// RDRAND exiting.
        RDRAND_EXITING = 11, FromGuest;
        /// Enable INVPCID.
        ENABLE_INVPCID = 12, FromGuest;
        /// Enable VM functions. Hidden: an EPTP list would name EPT12s that have no ept02 yet.
        ENABLE_VM_FUNCTIONS = 13, Hidden;
        /// VMCS shadowing.
        VMCS_SHADOWING = 14, Hidden;
        /// Enable ENCLS exiting. Hidden: the machine's SGX is not offered.
        ENCLS_EXITING = 15, Hidden;
        /// RDSEED exiting.
        RDSEED_EXITING = 16, FromGuest;
        /// Enable PML. ept02's dirty flags follow EPT12's, so that the processor logs what it would log on EPT12.
        ENABLE_PML = 17, FromGuest;
        /// EPT-violation #VE. Hidden: an ept02 violation is not yet an EPT12 violation.
        EPT_VIOLATION_VE = 18, Hidden;
        /// Conceal VMX from PT.
        CONCEAL_VMX_FROM_PT = 19, Hidden;
        /// Enable XSAVES/XRSTORS.
        ENABLE_XSAVES = 20, FromGuest;
        /// PASID translation.
        PASID_TRANSLATION = 21, Hidden;
        /// Mode-based execute control for EPT.
        MODE_BASED_EXECUTE = 22, Hidden;
        /// Sub-page write permissions for EPT.
        SUB_PAGE_WRITE_PERMISSIONS = 23, Hidden;
        /// Intel PT uses guest-physical addresses.
        PT_USES_GUEST_PHYSICAL = 24, Hidden;
        /// Use TSC scaling.
        USE_TSC_SCALING = 25, FromGuest;
        /// Enable user wait and pause.
        ENABLE_USER_WAIT_AND_PAUSE = 26, FromGuest;
        /// Enable PCONFIG.
        ENABLE_PCONFIG = 27, Hidden;
        /// Enable ENCLV exiting.
        ENCLV_EXITING = 28, Hidden;
        /// VMM bus-lock detection.
        BUS_LOCK_DETECTION = 30, Hidden;
        /// Instruction timeout.
        INSTRUCTION_TIMEOUT = 31, Hidden;
    }
}

control_word! {
    /// Tertiary processor-based VM-execution controls. None is offered yet.
    Tertiary: u64, {
        /// LOADIWKEY exiting.
        LOADIWKEY_EXITING = 0, Hidden;
        /// Enable HLAT.
        ENABLE_HLAT = 1, Hidden;
        /// EPT paging-write control.
        EPT_PAGING_WRITE = 2, Hidden;
        /// Guest-paging verification.
        GUEST_PAGING_VERIFICATION = 3, Hidden;
        /// IPI virtualization.
        IPI_VIRTUALIZATION = 4, Hidden;
        /// Virtualize IA32_SPEC_CTRL.
        VIRTUALIZE_SPEC_CTRL = 7, Hidden;
    }
}

control_word! {
    /// Primary VM-exit controls.
    ExitControls: u32, {
        /// Save debug controls. Forced, because the host handles some exits itself and must not lose them.
        SAVE_DEBUG_CONTROLS = 2, Forced;
        /// Host address-space size: whether the host state is 64-bit. vmcs02's host state is l1hv's, which is.
        HOST_ADDRESS_SPACE_SIZE = 9, Forced;
        /// Load IA32_PERF_GLOBAL_CTRL. Hidden: Bochs offers it and does not do it (SDM 28.5.1).
        LOAD_PERF_GLOBAL_CTRL = 12, Hidden;
        /// Acknowledge interrupt on exit.
        ACKNOWLEDGE_INTERRUPT = 15, FromGuest;
        /// Save IA32_PAT.
        SAVE_PAT = 18, Forced;
        /// Load IA32_PAT.
        LOAD_PAT = 19, Forced;
        /// Save IA32_EFER.
        SAVE_EFER = 20, Forced;
        /// Load IA32_EFER.
        LOAD_EFER = 21, Forced;
        /// Save VMX-preemption timer value: 1 whenever the timer runs, so that an exit that the host handles does not restart it.
        SAVE_PREEMPTION_TIMER = 22, Computed;
        /// Clear IA32_BNDCFGS. Hidden: no current processor has MPX.
        CLEAR_BNDCFGS = 23, Hidden;
        /// Conceal VMX from PT.
        CONCEAL_VMX_FROM_PT = 24, Hidden;
        /// Clear IA32_RTIT_CTL.
        CLEAR_RTIT_CTL = 25, Hidden;
        /// Clear IA32_LBR_CTL.
        CLEAR_LBR_CTL = 26, Hidden;
        /// Clear UINV.
        CLEAR_UINV = 27, Hidden;
        /// Load CET state.
        LOAD_CET = 28, Hidden;
        /// Load PKRS.
        LOAD_PKRS = 29, Hidden;
        /// Save IA32_PERF_GLOBAL_CTRL.
        SAVE_PERF_GLOBAL_CTRL = 30, Hidden;
        /// Activate secondary VM-exit controls.
        ACTIVATE_SECONDARY = 31, Hidden;
    }
}

control_word! {
    /// VM-entry controls.
    EntryControls: u32, {
        /// Load debug controls. Forced: where vmcs12 has 0, the guest hypervisor's own values are loaded.
        LOAD_DEBUG_CONTROLS = 2, Forced;
        /// IA-32e mode guest.
        IA32E_MODE_GUEST = 9, FromGuest;
        /// Entry to SMM.
        ENTRY_TO_SMM = 10, Hidden;
        /// Deactivate dual-monitor treatment.
        DEACTIVATE_DUAL_MONITOR = 11, Hidden;
        /// Load IA32_PERF_GLOBAL_CTRL. Hidden: see the exit control.
        LOAD_PERF_GLOBAL_CTRL = 13, Hidden;
        /// Load IA32_PAT.
        LOAD_PAT = 14, Forced;
        /// Load IA32_EFER.
        LOAD_EFER = 15, Forced;
        /// Load IA32_BNDCFGS.
        LOAD_BNDCFGS = 16, Hidden;
        /// Conceal VMX from PT.
        CONCEAL_VMX_FROM_PT = 17, Hidden;
        /// Load IA32_RTIT_CTL.
        LOAD_RTIT_CTL = 18, Hidden;
        /// Load UINV.
        LOAD_UINV = 19, Hidden;
        /// Load CET state.
        LOAD_CET = 20, Hidden;
        /// Load guest IA32_LBR_CTL.
        LOAD_LBR_CTL = 21, Hidden;
        /// Load PKRS.
        LOAD_PKRS = 22, Hidden;
    }
}

/// Which settings of a 32-bit control word the processor allows (SDM A.3.1 "Pin-Based VM-Execution Controls").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    /// Allowed 0-settings: a bit that is 1 here must be 1.
    pub must_be_1: u32,
    /// Allowed 1-settings: a bit that is 0 here must be 0.
    pub may_be_1: u32,
}

impl Allowed {
    /// From a capability MSR: allowed 0-settings in the low half, allowed 1-settings in the high half.
    pub const fn from_msr(value: u64) -> Self {
        Self { must_be_1: value as u32, may_be_1: (value >> 32) as u32 }
    }

    /// The capability MSR.
    pub const fn to_msr(self) -> u64 {
        self.must_be_1 as u64 | (self.may_be_1 as u64) << 32
    }

    /// Whether VM entry accepts this value.
    pub const fn permits(self, value: u32) -> bool {
        value & self.must_be_1 == self.must_be_1 && value & !self.may_be_1 == 0
    }

    /// The value for the wanted bits with every other bit at its default (SDM A.2 "Reserved Controls and Default Settings", with
    /// the TRUE capability MSRs). The error is the set of wanted bits that the processor does not have.
    pub const fn choose(self, wanted: u32) -> Result<u32, u32> {
        let missing = wanted & !self.may_be_1;
        if missing != 0 { Err(missing) } else { Ok(wanted | self.must_be_1) }
    }

    /// The same without some bits that could be 1.
    pub const fn without(self, hidden: u32) -> Self {
        Self { must_be_1: self.must_be_1, may_be_1: self.may_be_1 & (!hidden | self.must_be_1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_the_processor_lacks_is_a_conflict() {
        let allowed = Allowed { must_be_1: 0x16, may_be_1: 0x7f };
        assert_eq!(allowed.choose(0x1), Ok(0x17));
        assert_eq!(allowed.choose(0x81), Err(0x80));
        assert!(!allowed.permits(0x1));
        assert!(allowed.permits(0x17));
        assert!(!allowed.permits(0x97));
    }

    #[test]
    fn hiding_a_control_never_hides_one_that_must_be_1() {
        let allowed = Allowed { must_be_1: 0x2, may_be_1: 0xf }.without(0x3);
        assert_eq!(allowed.may_be_1, 0xe);
    }

    #[test]
    fn capability_msrs_survive_the_round_trip() {
        let msr = 0x0401_e172_0400_6172;
        assert_eq!(Allowed::from_msr(msr).to_msr(), msr);
    }
}
