//! What a VM exit says of itself (SDM 25.9 "VM-Exit Information Fields").

use core::fmt;

/// The exit-reason field.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct ExitReason(pub u32);

macro_rules! basic_exit_reasons {
    ($($name:ident = $number:literal;)*) => {
        /// Basic exit reasons (SDM Appendix C).
        #[expect(missing_docs, reason = "the names are the SDM's")]
        impl ExitReason {
            $(pub const $name: Self = Self($number);)*

            /// The SDM's name of the basic exit reason, for people.
            pub const fn name(self) -> Option<&'static str> {
                match self.basic() {
                    $($number => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

basic_exit_reasons! {
    EXCEPTION_OR_NMI = 0;
    EXTERNAL_INTERRUPT = 1;
    TRIPLE_FAULT = 2;
    INIT = 3;
    SIPI = 4;
    IO_SMI = 5;
    OTHER_SMI = 6;
    INTERRUPT_WINDOW = 7;
    NMI_WINDOW = 8;
    TASK_SWITCH = 9;
    CPUID = 10;
    GETSEC = 11;
    HLT = 12;
    INVD = 13;
    INVLPG = 14;
    RDPMC = 15;
    RDTSC = 16;
    RSM = 17;
    VMCALL = 18;
    VMCLEAR = 19;
    VMLAUNCH = 20;
    VMPTRLD = 21;
    VMPTRST = 22;
    VMREAD = 23;
    VMRESUME = 24;
    VMWRITE = 25;
    VMXOFF = 26;
    VMXON = 27;
    CR_ACCESS = 28;
    MOV_DR = 29;
    IO_INSTRUCTION = 30;
    RDMSR = 31;
    WRMSR = 32;
    ENTRY_FAILURE_GUEST_STATE = 33;
    ENTRY_FAILURE_MSR_LOADING = 34;
    MWAIT = 36;
    MONITOR_TRAP_FLAG = 37;
    MONITOR = 39;
    PAUSE = 40;
    ENTRY_FAILURE_MACHINE_CHECK = 41;
    TPR_BELOW_THRESHOLD = 43;
    APIC_ACCESS = 44;
    VIRTUALIZED_EOI = 45;
    GDTR_IDTR_ACCESS = 46;
    LDTR_TR_ACCESS = 47;
    EPT_VIOLATION = 48;
    EPT_MISCONFIGURATION = 49;
    INVEPT = 50;
    RDTSCP = 51;
    PREEMPTION_TIMER = 52;
    INVVPID = 53;
    WBINVD = 54;
    XSETBV = 55;
    APIC_WRITE = 56;
    RDRAND = 57;
    INVPCID = 58;
    VMFUNC = 59;
    ENCLS = 60;
    RDSEED = 61;
    PML_FULL = 62;
    XSAVES = 63;
    XRSTORS = 64;
    PCONFIG = 65;
    SPP_EVENT = 66;
    UMWAIT = 67;
    TPAUSE = 68;
    LOADIWKEY = 69;
    ENCLV = 70;
    ENQCMD_PASID = 72;
    ENQCMDS_PASID = 73;
    BUS_LOCK = 74;
    INSTRUCTION_TIMEOUT = 75;
    SEAMCALL = 76;
    TDCALL = 77;
    RDMSRLIST = 78;
    WRMSRLIST = 79;
}

impl ExitReason {
    /// Basic exit reasons that statistics have room for.
    pub const BASIC_COUNT: usize = 80;
    const ENTRY_FAILURE: u32 = 1 << 31;

    /// Bits 15:0.
    pub const fn basic(self) -> u16 {
        self.0 as u16
    }

    /// The reason without its modifier bits.
    pub const fn without_modifiers(self) -> Self {
        Self(self.0 & 0xffff)
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

/// What the qualification of an entry failure for guest state says (SDM 27.8 "VM-Entry Failures During or After Loading Guest State").
pub mod entry_failure_qualification {
    /// Any check that has no number of its own.
    pub const OTHER: u64 = 0;
    /// Loading the PDPTEs.
    pub const PDPTE: u64 = 2;
    /// Injecting an NMI while the entry would block events by MOV SS.
    pub const NMI: u64 = 3;
    /// The VMCS link pointer.
    pub const LINK_POINTER: u64 = 4;
}

/// Interruption information: of an exit, of IDT vectoring, or for injection (SDM 25.8.3, 25.9.2, 25.9.3: one format).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

/// Types of an interruption: bits 10:8 of its information.
#[expect(missing_docs, reason = "the names are the SDM's")]
pub mod interruption_type {
    pub const EXTERNAL_INTERRUPT: u32 = 0;
    pub const RESERVED: u32 = 1;
    pub const NMI: u32 = 2;
    pub const HARDWARE_EXCEPTION: u32 = 3;
    pub const SOFTWARE_INTERRUPT: u32 = 4;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
    pub const SOFTWARE_EXCEPTION: u32 = 6;
    pub const OTHER_EVENT: u32 = 7;
}

impl InterruptionInfo {
    const DELIVER_ERROR_CODE: u32 = 1 << 11;
    const NMI_UNBLOCKING: u32 = 1 << 12;
    const VALID: u32 = 1 << 31;

    /// A valid interruption of a type with a vector.
    pub const fn new(kind: u32, vector: u8) -> Self {
        Self(Self::VALID | kind << 8 | vector as u32)
    }

    /// The same, delivering an error code.
    pub const fn with_error_code(self) -> Self {
        Self(self.0 | Self::DELIVER_ERROR_CODE)
    }

    /// The vector.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The type, one of [`interruption_type`].
    pub const fn kind(self) -> u32 {
        self.0 >> 8 & 7
    }

    /// Whether there is an error code.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::DELIVER_ERROR_CODE != 0
    }

    /// Bit 12 of an exit's information: NMI unblocking due to IRET. In IDT-vectoring and injection it is reserved.
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & Self::NMI_UNBLOCKING != 0
    }

    /// Bit 31.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// The same, not valid: what a VM exit leaves in the VM-entry field.
    pub const fn invalidated(self) -> Self {
        Self(self.0 & !Self::VALID)
    }

    /// Whether it is an NMI.
    pub const fn is_nmi(self) -> bool {
        self.is_valid() && self.kind() == interruption_type::NMI
    }

    /// Whether injection needs an instruction length: software interrupts and exceptions push the RIP that follows.
    pub const fn needs_instruction_length(self) -> bool {
        matches!(
            self.kind(),
            interruption_type::SOFTWARE_INTERRUPT
                | interruption_type::PRIVILEGED_SOFTWARE_EXCEPTION
                | interruption_type::SOFTWARE_EXCEPTION
        )
    }

    /// Bits that injection requires to be 0 (30:12).
    pub const fn reserved_for_injection(self) -> u32 {
        self.0 & 0x7fff_f000
    }
}

/// Exit qualification of a control-register access (SDM Table 28-3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct CrAccess(pub u64);

/// What an access did to a control register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CrAccessKind {
    /// MOV to CR.
    MovTo,
    /// MOV from CR.
    MovFrom,
    /// CLTS.
    Clts,
    /// LMSW.
    Lmsw,
}

impl CrAccess {
    /// Number of the control register (0 for CLTS and LMSW).
    pub const fn register(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    /// The access type.
    pub const fn kind(self) -> CrAccessKind {
        match self.0 >> 4 & 3 {
            0 => CrAccessKind::MovTo,
            1 => CrAccessKind::MovFrom,
            2 => CrAccessKind::Clts,
            _ => CrAccessKind::Lmsw,
        }
    }

    /// General-purpose register of a MOV.
    pub const fn gpr(self) -> usize {
        (self.0 >> 8 & 0xf) as usize
    }

    /// LMSW source data.
    pub const fn lmsw_source(self) -> u64 {
        self.0 >> 16 & 0xffff
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
    }

    #[test]
    fn interruption_information_comes_apart() {
        let page_fault = InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, 14).with_error_code();
        assert_eq!(page_fault.0, 0x8000_0b0e);
        assert_eq!((page_fault.vector(), page_fault.kind()), (14, 3));
        assert!(page_fault.has_error_code() && !page_fault.needs_instruction_length());
        assert!(InterruptionInfo::new(interruption_type::SOFTWARE_INTERRUPT, 0x80).needs_instruction_length());
        assert!(!page_fault.invalidated().is_valid());
    }

    #[test]
    fn cr_access_qualification_comes_apart() {
        let mov_to_cr4_from_rax = CrAccess(4);
        assert_eq!(
            (mov_to_cr4_from_rax.register(), mov_to_cr4_from_rax.kind(), mov_to_cr4_from_rax.gpr()),
            (4, CrAccessKind::MovTo, 0)
        );
        assert_eq!(CrAccess(3 << 4 | 0xabcd << 16).lmsw_source(), 0xabcd);
    }
}
