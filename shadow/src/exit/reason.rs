//! One table of all exit reasons (SDM Appendix C "VMX Basic Exit Reasons").

use crate::controls::{Control, Pin, Primary, Secondary, Tertiary};
use crate::policy::Route;
use bitflags::bitflags;
use core::fmt;

/// The exit-reason field (SDM Table 25-18 "Format of Exit Reason").
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct ExitReason(pub u32);

/// What decides whether an exit occurs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// It always occurs in VMX non-root operation.
    Unconditional,
    /// One of these controls, with the masks, bitmaps and thresholds that belong to it.
    Any(&'static [Control]),
    /// All of these controls together.
    All(&'static [Control]),
    /// It occurs unless this control is 1 and its bitmap lets the access through: a control whose sense is inverted.
    Unless(Control),
    /// The exception bitmap, or for an NMI "NMI exiting".
    ExceptionBitmap,
    /// VM entry fails.
    EntryFailure,
    /// Only the dual-monitor treatment of SMM, or SEAM.
    OtherMode,
}

/// What the exit qualification holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "each is explained at the variant of `Qualification` with its name")]
pub enum QualificationKind {
    None,
    Exception,
    Sipi,
    TaskSwitch,
    CrAccess,
    DrAccess,
    Io,
    LinearAddress,
    Displacement,
    Mwait,
    EntryFailure,
    ApicAccess,
    Eoi,
    ApicWrite,
    EptViolation,
    NmiUnblocking,
    InstructionTimeout,
    MsrIndex,
}

/// What the instruction-information field describes (SDM 28.2.5 "Information for VM Exits Due to Instruction
/// Execution").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InsnLayout {
    /// Undefined.
    None,
    /// INS and OUTS (SDM Table 28-8).
    StringIo,
    /// A memory operand and a register (SDM Table 28-9): INVEPT, INVPCID, INVVPID.
    MemoryAndRegister,
    /// LGDT, LIDT, SGDT, SIDT (SDM Table 28-10).
    DescriptorTable,
    /// LLDT, LTR, SLDT, STR (SDM Table 28-11).
    SegmentTable,
    /// A register with its size (SDM Table 28-12): RDRAND, RDSEED, TPAUSE, UMWAIT.
    SizedRegister,
    /// A memory operand (SDM Table 28-13): VMCLEAR, VMPTRLD, VMPTRST, VMXON, XRSTORS, XSAVES.
    Memory,
    /// Memory or register, and a register (SDM Table 28-14): VMREAD, VMWRITE.
    ReadWrite,
    /// Registers (SDM Table 28-15): the two of LOADIWKEY, or one of an MSR access with an immediate operand.
    Registers,
}

bitflags! {
    /// Exit-information fields that an exit fills besides the reason. The exit clears an exit qualification that it
    /// does not fill; other fields that it does not fill are undefined.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Fills: u8 {
        /// Exit qualification.
        const QUALIFICATION = 1 << 0;
        /// VM-exit instruction length.
        const LENGTH = 1 << 1;
        /// VM-exit instruction information.
        const INSTRUCTION = 1 << 2;
        /// VM-exit interruption information.
        const INTERRUPTION = 1 << 3;
        /// Guest-linear address, at least for some of these exits.
        const LINEAR = 1 << 4;
        /// Guest-physical address.
        const PHYSICAL = 1 << 5;
    }
}

/// A row of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReasonInfo {
    /// The reason.
    pub reason: ExitReason,
    /// Its name in the SDM, in capitals.
    pub name: &'static str,
    /// The fields that it fills.
    pub fills: Fills,
    /// What its qualification holds.
    pub qualification: QualificationKind,
    /// What its instruction information describes.
    pub instruction: InsnLayout,
    /// What decides whether it occurs.
    pub cause: Cause,
    /// Where an exit of a nested guest with this reason goes.
    pub route: Route,
}

/// Control bits written `Word::BIT`.
macro_rules! controls {
    ($($word:ident::$bit:ident),+) => {
        &[$(Control::$word($word::$bit)),+]
    };
}

macro_rules! cause {
    (Any($($bits:tt)+)) => {
        Cause::Any(controls!($($bits)+))
    };
    (All($($bits:tt)+)) => {
        Cause::All(controls!($($bits)+))
    };
    (Unless($word:ident::$bit:ident)) => {
        Cause::Unless(Control::$word($word::$bit))
    };
    ($cause:ident) => {
        Cause::$cause
    };
}

macro_rules! basic_exit_reasons {
    ($($name:ident = $number:literal, $qualification:ident, $layout:ident, [$($fill:ident)*],
       $cause:ident $(($($bits:tt)+))?, $route:ident;)*) => {
        /// Basic exit reasons.
        #[expect(missing_docs, reason = "the names are the SDM's")]
        impl ExitReason {
            $(pub const $name: Self = Self($number);)*

            /// The row of the basic exit reason; `None` for one that the SDM does not define.
            pub const fn info(self) -> Option<&'static ReasonInfo> {
                match self.basic() {
                    $($number => Some(const { &ReasonInfo {
                        reason: Self($number),
                        name: stringify!($name),
                        fills: fills(&[$(Fills::$fill),*], QualificationKind::$qualification, InsnLayout::$layout),
                        qualification: QualificationKind::$qualification,
                        instruction: InsnLayout::$layout,
                        cause: cause!($cause $(($($bits)+))?),
                        route: Route::$route,
                    } }),)*
                    _ => None,
                }
            }

            /// The SDM's name of the basic exit reason, for people.
            pub const fn name(self) -> Option<&'static str> {
                match self.basic() {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            /// All basic exit reasons, in ascending order.
            pub const ALL: &[Self] = &[$(Self($number)),*];
        }
    };
}

const fn fills(listed: &[Fills], qualification: QualificationKind, instruction: InsnLayout) -> Fills {
    let mut fills = Fills::empty();
    let mut i = 0;
    while i < listed.len() {
        fills = fills.union(listed[i]);
        i += 1;
    }
    if !matches!(qualification, QualificationKind::None) {
        fills = fills.union(Fills::QUALIFICATION);
    }
    if !matches!(instruction, InsnLayout::None) {
        fills = fills.union(Fills::INSTRUCTION);
    }
    fills
}

basic_exit_reasons! {
    // Of the exceptions, only software exceptions fill the instruction length.
    EXCEPTION_OR_NMI = 0, Exception, None, [INTERRUPTION LENGTH], ExceptionBitmap, Reflect;
    // With "acknowledge interrupt on exit" the vector is there, else the information is not valid.
    EXTERNAL_INTERRUPT = 1, None, None, [INTERRUPTION], Any(Pin::EXTERNAL_INTERRUPT_EXITING), Reflect;
    TRIPLE_FAULT = 2, None, None, [], Unconditional, Reflect;
    INIT = 3, None, None, [], Unconditional, Init;
    SIPI = 4, Sipi, None, [], Unconditional, Reflect;
    IO_SMI = 5, Io, None, [LINEAR], OtherMode, Reflect;
    OTHER_SMI = 6, None, None, [], OtherMode, Reflect;
    INTERRUPT_WINDOW = 7, None, None, [], Any(Primary::INTERRUPT_WINDOW_EXITING), Reflect;
    NMI_WINDOW = 8, None, None, [], Any(Primary::NMI_WINDOW_EXITING), Reflect;
    TASK_SWITCH = 9, TaskSwitch, None, [LENGTH], Unconditional, Reflect;
    CPUID = 10, None, None, [LENGTH], Unconditional, Reflect;
    GETSEC = 11, None, None, [LENGTH], Unconditional, Reflect;
    HLT = 12, None, None, [LENGTH], Any(Primary::HLT_EXITING), Reflect;
    INVD = 13, None, None, [LENGTH], Unconditional, Reflect;
    INVLPG = 14, LinearAddress, None, [LENGTH], Any(Primary::INVLPG_EXITING), Reflect;
    RDPMC = 15, None, None, [LENGTH], Any(Primary::RDPMC_EXITING), Reflect;
    RDTSC = 16, None, None, [LENGTH], Any(Primary::RDTSC_EXITING), Reflect;
    RSM = 17, None, None, [LENGTH], OtherMode, Reflect;
    VMCALL = 18, None, None, [LENGTH], Unconditional, Reflect;
    VMCLEAR = 19, Displacement, Memory, [LENGTH], Unconditional, Reflect;
    VMLAUNCH = 20, None, None, [LENGTH], Unconditional, Reflect;
    VMPTRLD = 21, Displacement, Memory, [LENGTH], Unconditional, Reflect;
    VMPTRST = 22, Displacement, Memory, [LENGTH], Unconditional, Reflect;
    VMREAD = 23, Displacement, ReadWrite, [LENGTH], Unless(Secondary::VMCS_SHADOWING), ShadowedField;
    VMRESUME = 24, None, None, [LENGTH], Unconditional, Reflect;
    VMWRITE = 25, Displacement, ReadWrite, [LENGTH], Unless(Secondary::VMCS_SHADOWING), ShadowedField;
    VMXOFF = 26, None, None, [LENGTH], Unconditional, Reflect;
    VMXON = 27, Displacement, Memory, [LENGTH], Unconditional, Reflect;
    // The guest/host masks and CR3-target values decide too. The linear address is that of LMSW's memory operand.
    CR_ACCESS = 28, CrAccess, None, [LENGTH LINEAR], Any(Primary::CR3_LOAD_EXITING, Primary::CR3_STORE_EXITING,
        Primary::CR8_LOAD_EXITING, Primary::CR8_STORE_EXITING), Reflect;
    MOV_DR = 29, DrAccess, None, [LENGTH], Any(Primary::MOV_DR_EXITING), Reflect;
    IO_INSTRUCTION = 30, Io, StringIo, [LENGTH LINEAR], Any(Primary::UNCONDITIONAL_IO_EXITING, Primary::USE_IO_BITMAPS), Port;
    RDMSR = 31, None, None, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), HostMsr;
    WRMSR = 32, None, None, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), HostMsr;
    ENTRY_FAILURE_GUEST_STATE = 33, EntryFailure, None, [], EntryFailure, Reflect;
    ENTRY_FAILURE_MSR_LOADING = 34, EntryFailure, None, [], EntryFailure, Reflect;
    MWAIT = 36, Mwait, None, [LENGTH], Any(Primary::MWAIT_EXITING), Reflect;
    MONITOR_TRAP_FLAG = 37, None, None, [], Any(Primary::MONITOR_TRAP_FLAG), Reflect;
    MONITOR = 39, None, None, [LENGTH], Any(Primary::MONITOR_EXITING), Reflect;
    PAUSE = 40, None, None, [LENGTH], Any(Primary::PAUSE_EXITING, Secondary::PAUSE_LOOP_EXITING), Reflect;
    ENTRY_FAILURE_MACHINE_CHECK = 41, None, None, [], EntryFailure, Reflect;
    TPR_BELOW_THRESHOLD = 43, None, None, [], Any(Primary::USE_TPR_SHADOW), Reflect;
    APIC_ACCESS = 44, ApicAccess, None, [], Any(Secondary::VIRTUALIZE_APIC_ACCESSES), Reflect;
    VIRTUALIZED_EOI = 45, Eoi, None, [], Any(Secondary::VIRTUAL_INTERRUPT_DELIVERY), Reflect;
    GDTR_IDTR_ACCESS = 46, Displacement, DescriptorTable, [LENGTH], Any(Secondary::DESCRIPTOR_TABLE_EXITING), Reflect;
    LDTR_TR_ACCESS = 47, Displacement, SegmentTable, [LENGTH], Any(Secondary::DESCRIPTOR_TABLE_EXITING), Reflect;
    EPT_VIOLATION = 48, EptViolation, None, [LINEAR PHYSICAL], Any(Secondary::ENABLE_EPT), NestedPaging;
    EPT_MISCONFIGURATION = 49, None, None, [PHYSICAL], Any(Secondary::ENABLE_EPT), NestedPaging;
    INVEPT = 50, Displacement, MemoryAndRegister, [LENGTH], Unconditional, Reflect;
    RDTSCP = 51, None, None, [LENGTH], All(Secondary::ENABLE_RDTSCP, Primary::RDTSC_EXITING), Reflect;
    PREEMPTION_TIMER = 52, None, None, [], Any(Pin::ACTIVATE_PREEMPTION_TIMER), Reflect;
    INVVPID = 53, Displacement, MemoryAndRegister, [LENGTH], Unconditional, Reflect;
    WBINVD = 54, None, None, [LENGTH], Any(Secondary::WBINVD_EXITING), Reflect;
    XSETBV = 55, None, None, [LENGTH], Unconditional, Reflect;
    APIC_WRITE = 56, ApicWrite, None, [], Any(Secondary::APIC_REGISTER_VIRTUALIZATION,
        Secondary::VIRTUAL_INTERRUPT_DELIVERY), Reflect;
    RDRAND = 57, None, SizedRegister, [LENGTH], Any(Secondary::RDRAND_EXITING), Reflect;
    INVPCID = 58, Displacement, MemoryAndRegister, [LENGTH], All(Secondary::ENABLE_INVPCID, Primary::INVLPG_EXITING), Reflect;
    VMFUNC = 59, None, None, [LENGTH], Any(Secondary::ENABLE_VM_FUNCTIONS), VmFunction;
    ENCLS = 60, None, None, [LENGTH], Any(Secondary::ENCLS_EXITING), Reflect;
    RDSEED = 61, None, SizedRegister, [LENGTH], Any(Secondary::RDSEED_EXITING), Reflect;
    PML_FULL = 62, NmiUnblocking, None, [], Any(Secondary::ENABLE_PML), Reflect;
    XSAVES = 63, Displacement, Memory, [LENGTH], Any(Secondary::ENABLE_XSAVES), Reflect;
    XRSTORS = 64, Displacement, Memory, [LENGTH], Any(Secondary::ENABLE_XSAVES), Reflect;
    PCONFIG = 65, None, None, [LENGTH], Any(Secondary::ENABLE_PCONFIG), Reflect;
    SPP_EVENT = 66, NmiUnblocking, None, [LINEAR PHYSICAL], Any(Secondary::SUB_PAGE_WRITE_PERMISSIONS), Reflect;
    UMWAIT = 67, None, SizedRegister, [LENGTH], All(Secondary::ENABLE_USER_WAIT_AND_PAUSE, Primary::RDTSC_EXITING), Reflect;
    TPAUSE = 68, None, SizedRegister, [LENGTH], All(Secondary::ENABLE_USER_WAIT_AND_PAUSE, Primary::RDTSC_EXITING), Reflect;
    LOADIWKEY = 69, None, Registers, [LENGTH], Any(Tertiary::LOADIWKEY_EXITING), Reflect;
    ENCLV = 70, None, None, [LENGTH], Any(Secondary::ENCLV_EXITING), Reflect;
    ENQCMD_PASID = 72, Displacement, Memory, [LENGTH], Any(Secondary::PASID_TRANSLATION), Reflect;
    ENQCMDS_PASID = 73, Displacement, Memory, [LENGTH], Any(Secondary::PASID_TRANSLATION), Reflect;
    BUS_LOCK = 74, None, None, [], Any(Secondary::BUS_LOCK_DETECTION), Reflect;
    INSTRUCTION_TIMEOUT = 75, InstructionTimeout, None, [], Any(Secondary::INSTRUCTION_TIMEOUT), Reflect;
    SEAMCALL = 76, None, None, [LENGTH], OtherMode, Undefined;
    TDCALL = 77, None, None, [LENGTH], OtherMode, Undefined;
    RDMSRLIST = 78, MsrIndex, None, [LENGTH], All(Tertiary::ENABLE_MSR_LIST), Reflect;
    WRMSRLIST = 79, MsrIndex, None, [LENGTH], All(Tertiary::ENABLE_MSR_LIST), Reflect;
    // Of extensions that are newer than edition 085: user-level MSR accesses, and MSR accesses with an immediate
    // operand. The guest hypervisor is told that the processor has none of them (`crate::cpuid`).
    URDMSR = 80, MsrIndex, None, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), Undefined;
    UWRMSR = 81, MsrIndex, None, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), Undefined;
    RDMSR_IMMEDIATE = 84, MsrIndex, Registers, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), Undefined;
    WRMSRNS_IMMEDIATE = 85, MsrIndex, Registers, [LENGTH], Unless(Primary::USE_MSR_BITMAPS), Undefined;
}

impl ExitReason {
    /// The number of counters that statistics by basic exit reason need.
    pub const BASIC_COUNT: usize = Self::ALL[Self::ALL.len() - 1].0 as usize + 1;
    const SHADOW_STACK_BUSY: u32 = 1 << 25;
    const BUS_LOCK_ASSERTED: u32 = 1 << 26;
    const ENCLAVE_MODE: u32 = 1 << 27;
    const PENDING_MTF: u32 = 1 << 28;
    const FROM_ROOT: u32 = 1 << 29;
    const ENTRY_FAILURE: u32 = 1 << 31;

    /// Bits 15:0.
    pub const fn basic(self) -> u16 {
        self.0 as u16
    }

    /// The reason without its modifier bits.
    pub const fn without_modifiers(self) -> Self {
        Self(self.0 & 0xffff)
    }

    /// Bit 25: a supervisor shadow stack was prematurely busy.
    pub const fn has_busy_shadow_stack(self) -> bool {
        self.0 & Self::SHADOW_STACK_BUSY != 0
    }

    /// Bit 26: a bus lock was asserted, too.
    pub const fn has_bus_lock(self) -> bool {
        self.0 & Self::BUS_LOCK_ASSERTED != 0
    }

    /// Bit 27: the logical processor was in enclave mode.
    pub const fn is_from_enclave(self) -> bool {
        self.0 & Self::ENCLAVE_MODE != 0
    }

    /// Bit 28: an MTF VM exit is pending; only an SMM VM exit says so.
    pub const fn has_pending_mtf(self) -> bool {
        self.0 & Self::PENDING_MTF != 0
    }

    /// Bit 29: an exit from VMX root operation; only an SMM VM exit says so.
    pub const fn is_from_root(self) -> bool {
        self.0 & Self::FROM_ROOT != 0
    }

    /// Bit 31: not an exit of a guest that ran, but an entry that failed.
    pub const fn is_entry_failure(self) -> bool {
        self.0 & Self::ENTRY_FAILURE != 0
    }

    /// This reason with bit 31 set.
    pub const fn of_failed_entry(self) -> Self {
        Self(self.0 | Self::ENTRY_FAILURE)
    }
}

impl fmt::Debug for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = if self.is_entry_failure() { "entry failure: " } else { "" };
        write!(f, "{failed}{} ({})", self.name().unwrap_or("unknown"), self.basic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn an_unknown_reason_prints_and_does_not_panic() {
        assert_eq!(format!("{:?}", ExitReason(0x8000_0021)), "entry failure: ENTRY_FAILURE_GUEST_STATE (33)");
        assert_eq!(format!("{:?}", ExitReason(0x1234)), "unknown (4660)");
        assert_eq!(ExitReason(0x1234).info(), None);
    }

    #[test]
    fn the_table_is_in_order_and_leaves_out_only_what_the_sdm_reserves() {
        assert!(ExitReason::ALL.is_sorted_by(|a, b| a.0 < b.0));
        let reserved = (0..ExitReason::BASIC_COUNT as u32).filter(|&number| ExitReason(number).info().is_none());
        assert!(reserved.eq([35, 38, 42, 71, 82, 83]));
    }

    #[test]
    fn modifier_bits_come_apart_from_the_basic_reason() {
        let reason = ExitReason(1 << 26 | 1 << 27 | 30);
        assert_eq!(reason.without_modifiers(), ExitReason::IO_INSTRUCTION);
        assert!(reason.has_bus_lock() && reason.is_from_enclave());
        assert!(!reason.is_entry_failure() && !reason.is_from_root() && !reason.has_pending_mtf());
        assert!(ExitReason::INIT.of_failed_entry().is_entry_failure());
    }

    #[test]
    fn an_exit_with_instruction_information_has_an_instruction_length() {
        for reason in ExitReason::ALL {
            let info = reason.info().unwrap();
            assert!(!info.fills.contains(Fills::INSTRUCTION) || info.fills.contains(Fills::LENGTH), "{reason:?}");
        }
    }
}
