//! The control words, every bit by its SDM name, and what the merge does with each (SDM 25.6 to 25.8).

mod allowed;
mod dependency;

pub use allowed::{Allowed, Conflict};
pub use dependency::{ControlWords, Dependency, Relation};

use bitflags::bitflags;
use bitflags::parser::{WriteHex, to_writer};
use core::fmt;

macro_rules! control_word {
    ($(#[$($doc:tt)*])* $name:ident: $repr:ty, $sdm_name:literal, default1 $default1:literal,
     { $($(#[$($bit_doc:tt)*])* $bit:ident = $pos:literal, $class:ident;)* }) => {
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
            pub const FORCED: Self = <Self as ControlWord>::FORCED;
            /// Bits that vmcs02 gets from code in [`crate::merge`].
            pub const COMPUTED: Self = <Self as ControlWord>::COMPUTED;
            /// Bits that the guest hypervisor is not offered; always 0 in vmcs02.
            pub const HIDDEN: Self = Self::of_class(BitMerge::Hidden);
            /// Bits that the guest hypervisor is offered. A bit without a name is not offered: its effect on the host
            /// is unknown.
            pub const OFFERED: Self = Self::FROM_GUEST.union(Self::FORCED).union(Self::COMPUTED);

            const fn of_class(class: BitMerge) -> Self {
                let mut bits = 0;
                let mut i = 0;
                while i < <Self as ControlWord>::BITS.len() {
                    if <Self as ControlWord>::BITS[i].merge as u8 == class as u8 {
                        bits |= 1 << <Self as ControlWord>::BITS[i].position;
                    }
                    i += 1;
                }
                Self::from_bits_retain(bits)
            }
        }

        impl ControlWord for $name {
            const NAME: &'static str = $sdm_name;
            const BITS: &'static [ControlBit] =
                &[$(ControlBit { name: stringify!($bit), position: $pos, merge: BitMerge::$class }),*];
            const DEFAULT1: Self = Self::from_bits_retain($default1);
            const FORCED: Self = Self::of_class(BitMerge::Forced);
            const COMPUTED: Self = Self::of_class(BitMerge::Computed);
        }
    };
}

/// A control word: a set of named bits, each with a merge class.
pub trait ControlWord: bitflags::Flags<Bits: WriteHex> + Copy + fmt::Debug {
    /// The SDM's name of the word.
    const NAME: &'static str;
    /// Its named bits, lowest first. All others are reserved.
    const BITS: &'static [ControlBit];
    /// The default1 class: bits that are 1 by default, and that only the TRUE capability MSRs may report as allowed to
    /// be 0 (SDM A.2 "Reserved Controls and Default Settings").
    const DEFAULT1: Self;
    /// Bits that are 1 in vmcs02 whatever vmcs12 says: those of [`BitMerge::Forced`].
    const FORCED: Self;
    /// Bits that vmcs02 gets from code: those of [`BitMerge::Computed`].
    const COMPUTED: Self;
}

/// A named bit of a control word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlBit {
    /// The SDM's name in capitals.
    pub name: &'static str,
    /// Bit position.
    pub position: u32,
    /// What the merge does with the bit.
    pub merge: BitMerge,
}

/// Control bits of one of the words. The existence of a field, or an exit, depends on such bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "a variant is named as its word is")]
pub enum Control {
    Pin(Pin),
    Primary(Primary),
    Secondary(Secondary),
    Tertiary(Tertiary),
    Exit(ExitControls),
    SecondaryExit(SecondaryExitControls),
    Entry(EntryControls),
    VmFunction(VmFunctions),
}

/// When a field exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exists {
    /// On every processor.
    Always,
    /// On every processor, for the treatment of SMIs. A hypervisor that virtualizes VMX may lack it, as its guests meet
    /// no SMI.
    Smm,
    /// If IA32_VMX_MISC\[24:16\] counts more CR3-target values than this.
    Cr3Target(u32),
    /// With a feature that no VMX capability reports (SEAM, APX); here it counts as absent.
    Unreported,
    /// If one of these controls is allowed to be 1.
    With(&'static [Control]),
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pin(bits) => to_writer(bits, f),
            Self::Primary(bits) => to_writer(bits, f),
            Self::Secondary(bits) => to_writer(bits, f),
            Self::Tertiary(bits) => to_writer(bits, f),
            Self::Exit(bits) => to_writer(bits, f),
            Self::SecondaryExit(bits) => to_writer(bits, f),
            Self::Entry(bits) => to_writer(bits, f),
            Self::VmFunction(bits) => to_writer(bits, f),
        }
    }
}

/// What the merge does with a bit of a control word.
///
/// To offer a hidden control to guest hypervisors:
///
/// 1. give its row here the class [`BitMerge::FromGuest`], if the processor may act on VMCS12's bit unchanged;
/// 2. give the rows of its fields in [`crate::fields`] the class that vmcs02 needs ([`crate::fields::Merge`]); the
///    present class of a hidden field was never tried;
/// 3. add to [`crate::check`] its VM-entry checks that the processor cannot make on vmcs02, and to the dependencies the
///    controls that it needs; a field that such a check reads has a class that [`crate::merge`] checks again after a
///    write;
/// 4. add it to the causes of the exits that it adds or changes in [`crate::exit::ExitReason`]; one that sets modifier
///    bits of other exits' reasons is for [`crate::policy`], which compares whole reasons;
/// 5. add cases to the conformance suite and run them on a processor that has the control; addresses in its fields get
///    cases of the group `isolation`. A control that no processor of the tests has stays hidden.
///
/// That is all for a control that vmcs02 copies with its fields. A structure with addresses in it needs more: a copy in
/// the host's memory with the addresses that EPT01 gives. MSR bitmaps are the example: `l1hv/src/setup.rs` allocates the
/// copies, [`crate::nested::Nested`] holds them, the merge of `nested/entry.rs` fills one in before it determines the
/// EPTP of vmcs02, `nested/shortcut.rs` says whether a short entry may use it again, and [`crate::watch`] notices a write
/// to the guest hypervisor's page. A page that the processor itself writes to is one of
/// [`crate::watch::ProcessorWritten`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BitMerge {
    /// vmcs02 has vmcs12's bit. Then none of the fields that the control uses may be
    /// [`crate::fields::Merge::HostOnly`], except where code sets that field of vmcs02.
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
    Pin: u32, "pin-based VM-execution controls", default1 0x16, {
        /// External-interrupt exiting. The host takes no interrupts of its own, so the guest hypervisor alone decides.
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
    Primary: u32, "primary processor-based VM-execution controls", default1 0x0401_e172, {
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
        /// Activate tertiary controls. Offered if any of them is.
        ACTIVATE_TERTIARY = 17, FromGuest;
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
        /// Use I/O bitmaps. Its sense is inverted: 1 lets instructions through that "unconditional I/O exiting" would
        /// trap.
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
    Secondary: u32, "secondary processor-based VM-execution controls", default1 0, {
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
        /// Enable VPID: the nested guest runs with a VPID that the host chooses.
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
        /// Enable VM functions. vmcs02 enables no function, so that each VMFUNC exits, and the host executes the
        /// functions that vmcs12 enables.
        ENABLE_VM_FUNCTIONS = 13, FromGuest;
        /// VMCS shadowing, for a hypervisor that runs as a nested guest: vmcs02 is linked to a shadow VMCS of the host,
        /// which holds the content of the shadow VMCS that VMCS12 is linked to.
        VMCS_SHADOWING = 14, FromGuest;
        /// Enable ENCLS exiting. Hidden: the machine's SGX is not offered.
        ENCLS_EXITING = 15, Hidden;
        /// RDSEED exiting.
        RDSEED_EXITING = 16, FromGuest;
        /// Enable PML: off in vmcs02. The host sets EPT12's dirty flags, and logs the pages whose flags it sets.
        ENABLE_PML = 17, Computed;
        /// EPT-violation #VE. 0 in vmcs02, as a violation of ept02 need not be one of EPT12: the host delivers the
        /// exception.
        EPT_VIOLATION_VE = 18, Computed;
        /// Conceal VMX from PT. Hidden: Intel PT is not offered.
        CONCEAL_VMX_FROM_PT = 19, Hidden;
        /// Enable XSAVES/XRSTORS.
        ENABLE_XSAVES = 20, FromGuest;
        /// PASID translation. Hidden: its directories hold addresses, and the host has no code that translates them.
        PASID_TRANSLATION = 21, Hidden;
        /// Mode-based execute control for EPT. An ept02 is built either for an EPT12 with this control, or for an EPT12
        /// without it.
        MODE_BASED_EXECUTE = 22, FromGuest;
        /// Sub-page write permissions for EPT. Hidden: the sub-page tables hold addresses of the guest hypervisor, so
        /// that ept02 would need sub-page tables of its own.
        SUB_PAGE_WRITE_PERMISSIONS = 23, Hidden;
        /// Intel PT uses guest-physical addresses. Hidden: Intel PT is not offered.
        PT_USES_GUEST_PHYSICAL = 24, Hidden;
        /// Use TSC scaling.
        USE_TSC_SCALING = 25, FromGuest;
        /// Enable user wait and pause.
        ENABLE_USER_WAIT_AND_PAUSE = 26, FromGuest;
        /// Enable PCONFIG. Hidden: the keys of memory encryption are the machine's.
        ENABLE_PCONFIG = 27, Hidden;
        /// Enable ENCLV exiting. Hidden: see ENCLS exiting.
        ENCLV_EXITING = 28, Hidden;
        /// VMM bus-lock detection. Hidden: no test machine has produced its exits.
        BUS_LOCK_DETECTION = 30, Hidden;
        /// Instruction timeout. Hidden: no test machine has produced its exits.
        INSTRUCTION_TIMEOUT = 31, Hidden;
    }
}

control_word! {
    /// Tertiary processor-based VM-execution controls. No processor of the tests has those that are hidden; some have
    /// other reasons, too.
    Tertiary: u64, "tertiary processor-based VM-execution controls", default1 0, {
        /// LOADIWKEY exiting.
        LOADIWKEY_EXITING = 0, Hidden;
        /// Enable HLAT. Hidden: the HLAT pointer is to paging structures, which the host would have to walk for operands.
        ENABLE_HLAT = 1, Hidden;
        /// EPT paging-write control. Hidden: EPT02 would need the bit of EPT12's entries.
        EPT_PAGING_WRITE = 2, Hidden;
        /// Guest-paging verification. Hidden: as for the EPT paging-write control.
        GUEST_PAGING_VERIFICATION = 3, Hidden;
        /// IPI virtualization. Hidden: the PID-pointer table holds addresses, to which the processor writes.
        IPI_VIRTUALIZATION = 4, Hidden;
        /// Enable MSR-list instructions: RDMSRLIST and WRMSRLIST.
        ENABLE_MSR_LIST = 6, Hidden;
        /// Virtualize IA32_SPEC_CTRL.
        VIRTUALIZE_SPEC_CTRL = 7, FromGuest;
        /// APIC-timer virtualization.
        APIC_TIMER_VIRTUALIZATION = 8, Hidden;
    }
}

control_word! {
    /// Primary VM-exit controls.
    ExitControls: u32, "primary VM-exit controls", default1 0x0003_6dff, {
        /// Save debug controls. Forced, because the host handles some exits itself and must not lose the nested guest's
        /// values.
        SAVE_DEBUG_CONTROLS = 2, Forced;
        /// Host address-space size: whether the host state is 64-bit. In vmcs02 it is: the host runs in 64-bit mode.
        HOST_ADDRESS_SPACE_SIZE = 9, Forced;
        /// Load IA32_PERF_GLOBAL_CTRL. Hidden: no code loads it for the guest hypervisor when its nested guest exits,
        /// and no machine of the tests has a performance counter to test it with.
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
        /// Save VMX-preemption timer value: 1 whenever the timer runs, so that an exit that the host handles does not
        /// restart it.
        SAVE_PREEMPTION_TIMER = 22, Computed;
        /// Clear IA32_BNDCFGS. Hidden: no current processor has MPX.
        CLEAR_BNDCFGS = 23, Hidden;
        /// Conceal VMX from PT. Hidden: Intel PT is not offered.
        CONCEAL_VMX_FROM_PT = 24, Hidden;
        /// Clear IA32_RTIT_CTL. Hidden: Intel PT is not offered.
        CLEAR_RTIT_CTL = 25, Hidden;
        /// Clear IA32_LBR_CTL. Hidden: architectural LBRs are not offered.
        CLEAR_LBR_CTL = 26, Hidden;
        /// Clear UINV: a register of [`crate::passing`], as are CET state and PKRS below.
        CLEAR_UINV = 27, FromGuest;
        /// Load CET state.
        LOAD_CET = 28, FromGuest;
        /// Load PKRS.
        LOAD_PKRS = 29, FromGuest;
        /// Save IA32_PERF_GLOBAL_CTRL. Hidden: see loading it.
        SAVE_PERF_GLOBAL_CTRL = 30, Hidden;
        /// Activate secondary VM-exit controls. Hidden: none of them is offered.
        ACTIVATE_SECONDARY = 31, Hidden;
    }
}

control_word! {
    /// Secondary VM-exit controls. All are hidden.
    SecondaryExitControls: u64, "secondary VM-exit controls", default1 0, {
        /// Save IA32_FRED state. Hidden: no processor of the tests has FRED.
        SAVE_FRED = 0, Hidden;
        /// Load IA32_FRED state. Hidden: as saving it.
        LOAD_FRED = 1, Hidden;
        /// Load IA32_SPEC_CTRL. Hidden: exits do not save the value that entries load, so an exit that the host handles
        /// would lose the nested guest's value. MSR areas and "virtualize IA32_SPEC_CTRL" serve the same purpose.
        LOAD_SPEC_CTRL = 2, Hidden;
        /// Prematurely busy shadow stack. Hidden: when the host handles such an exit, it would have to free the shadow
        /// stack before it delivers the event again.
        PREMATURELY_BUSY_SHADOW_STACK = 3, Hidden;
    }
}

control_word! {
    /// VM-entry controls.
    EntryControls: u32, "VM-entry controls", default1 0x11ff, {
        /// Load debug controls. Forced: where vmcs12 has 0, the guest hypervisor's own values are loaded.
        LOAD_DEBUG_CONTROLS = 2, Forced;
        /// IA-32e mode guest.
        IA32E_MODE_GUEST = 9, FromGuest;
        /// Entry to SMM. Hidden: without dual-monitor treatment no entry outside SMM may have it (SDM 27.2.1.3).
        ENTRY_TO_SMM = 10, Hidden;
        /// Deactivate dual-monitor treatment. Hidden: as entry to SMM.
        DEACTIVATE_DUAL_MONITOR = 11, Hidden;
        /// Load IA32_PERF_GLOBAL_CTRL. Hidden: see the exit control.
        LOAD_PERF_GLOBAL_CTRL = 13, Hidden;
        /// Load IA32_PAT.
        LOAD_PAT = 14, Forced;
        /// Load IA32_EFER.
        LOAD_EFER = 15, Forced;
        /// Load IA32_BNDCFGS. Hidden: see the exit control.
        LOAD_BNDCFGS = 16, Hidden;
        /// Conceal VMX from PT. Hidden: Intel PT is not offered.
        CONCEAL_VMX_FROM_PT = 17, Hidden;
        /// Load IA32_RTIT_CTL. Hidden: see the exit control.
        LOAD_RTIT_CTL = 18, Hidden;
        /// Load UINV: a register of [`crate::passing`]. The bit is 1 in vmcs02 also if only exits clear UINV.
        LOAD_UINV = 19, Computed;
        /// Load CET state, likewise.
        LOAD_CET = 20, Computed;
        /// Load guest IA32_LBR_CTL. Hidden: see the exit control.
        LOAD_LBR_CTL = 21, Hidden;
        /// Load PKRS, likewise.
        LOAD_PKRS = 22, Computed;
        /// Load IA32_FRED state. Hidden: no processor of the tests has FRED.
        LOAD_FRED = 23, Hidden;
        /// Load IA32_SPEC_CTRL. Hidden: see the exit control.
        LOAD_SPEC_CTRL = 24, Hidden;
    }
}

control_word! {
    /// VM-function controls (SDM 25.6.14 "VM-Function Controls").
    VmFunctions: u64, "VM-function controls", default1 0, {
        /// EPTP switching. 0 in vmcs02: an EPTP list names EPT12s, and the host switches to their ept02s itself.
        EPTP_SWITCHING = 0, Computed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;
    use x86::vmx::vmcs::control as x86_crate;

    /// The bits that the SDM defines, as masks that were written down apart from the tables above.
    #[test]
    fn no_bit_that_the_sdm_defines_is_left_out_and_none_is_made_up() {
        fn mask<W: ControlWord>() -> u64 {
            W::BITS.iter().fold(0, |mask, bit| mask | 1 << bit.position)
        }
        assert_eq!(mask::<Pin>(), 0xe9);
        assert_eq!(mask::<Primary>(), 0xfbfb_9e8c);
        assert_eq!(mask::<Secondary>(), 0xdfff_ffff);
        assert_eq!(mask::<Tertiary>(), 0x1df);
        assert_eq!(mask::<ExitControls>(), 0xfffc_9204);
        assert_eq!(mask::<SecondaryExitControls>(), 0xf);
        assert_eq!(mask::<EntryControls>(), 0x01ff_ee04);
        assert_eq!(mask::<VmFunctions>(), 1);
    }

    #[test]
    fn each_bit_has_one_merge_class() {
        fn classes_partition<W: ControlWord>(classes: [W; 4]) {
            let named = W::BITS.iter().filter_map(|bit| W::from_name(bit.name)).fold(W::empty(), W::union);
            let union = classes.into_iter().fold(W::empty(), |all, class| {
                assert!(all.intersection(class).is_empty(), "{}", W::NAME);
                all.union(class)
            });
            assert!(union.difference(named).is_empty() && named.difference(union).is_empty(), "{}", W::NAME);
        }
        macro_rules! check {
            ($($word:ident)*) => {
                $(classes_partition([$word::FROM_GUEST, $word::FORCED, $word::COMPUTED, $word::HIDDEN]);)*
            };
        }
        check!(Pin Primary Secondary Tertiary ExitControls SecondaryExitControls EntryControls VmFunctions);
    }

    /// The names of the `x86` crate that differ from ours, each with ours.
    const RENAMED: &[(&str, &str)] = &[
        ("VMX_PREEMPTION_TIMER", "ACTIVATE_PREEMPTION_TIMER"),
        ("POSTED_INTERRUPTS", "PROCESS_POSTED_INTERRUPTS"),
        ("UNCOND_IO_EXITING", "UNCONDITIONAL_IO_EXITING"),
        ("SECONDARY_CONTROLS", "ACTIVATE_SECONDARY"),
        ("VIRTUALIZE_APIC", "VIRTUALIZE_APIC_ACCESSES"),
        ("DTABLE_EXITING", "DESCRIPTOR_TABLE_EXITING"),
        ("VIRTUALIZE_X2APIC", "VIRTUALIZE_X2APIC_MODE"),
        ("VIRTUALIZE_APIC_REGISTER", "APIC_REGISTER_VIRTUALIZATION"),
        ("ENABLE_XSAVES_XRSTORS", "ENABLE_XSAVES"),
        ("MODE_BASED_EPT", "MODE_BASED_EXECUTE"),
        ("SUB_PAGE_EPT", "SUB_PAGE_WRITE_PERMISSIONS"),
        ("INTEL_PT_GUEST_PHYSICAL", "PT_USES_GUEST_PHYSICAL"),
        ("ENABLE_USER_WAIT_PAUSE", "ENABLE_USER_WAIT_AND_PAUSE"),
        ("ACK_INTERRUPT_ON_EXIT", "ACKNOWLEDGE_INTERRUPT"),
        ("SAVE_VMX_PREEMPTION_TIMER", "SAVE_PREEMPTION_TIMER"),
    ];

    #[test]
    fn names_agree_with_the_x86_crate_where_it_has_them() {
        fn compare<W: ControlWord>(theirs: &[(u32, std::string::String)]) {
            for (position, name) in theirs {
                let name = name.replace("IA32_", "").replace("IA32E", "IA32e");
                let ours = RENAMED.iter().find(|(theirs, _)| *theirs == name).map_or(&*name, |(_, ours)| ours);
                let bit = W::BITS.iter().find(|bit| bit.position == *position);
                assert!(bit.is_some_and(|bit| bit.name.eq_ignore_ascii_case(ours)), "{name}: {bit:?}");
            }
        }
        macro_rules! compare {
            ($($ours:ident $theirs:ident)*) => {$(
                let known = (0..32).filter_map(|position| {
                    let bit = x86_crate::$theirs::from_bits(1 << position)?;
                    Some((position, std::format!("{bit:?}")))
                });
                compare::<$ours>(&known.collect::<Vec<_>>());
            )*};
        }
        compare!(Pin PinbasedControls Primary PrimaryControls Secondary SecondaryControls ExitControls ExitControls
                 EntryControls EntryControls);
    }
}
