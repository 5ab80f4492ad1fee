//! The exit qualification (SDM 28.2.1 "Basic VM-Exit Information", Tables 28-1 to 28-7).

use ept::violation::EptViolation;

use super::interruption::{InterruptionInfo, interruption_type};
use super::reason::{ExitReason, QualificationKind};

/// What the qualification of an entry failure for guest state says (SDM 27.8 "VM-Entry Failures During or After Loading
/// Guest State").
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

/// An exit qualification, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Qualification {
    /// The exit has none: the field is 0.
    None,
    /// A debug exception.
    Debug(DebugConditions),
    /// A page fault: its linear address, which is not in CR2.
    PageFault(u64),
    /// A SIPI: its vector.
    Sipi(u8),
    /// A task switch.
    TaskSwitch(TaskSwitch),
    /// An access to CR0, CR3, CR4 or CR8.
    CrAccess(CrAccess),
    /// A MOV to or from a debug register.
    DrAccess(DrAccess),
    /// An I/O instruction.
    Io(IoAccess),
    /// INVLPG: the linear address.
    LinearAddress(u64),
    /// The displacement of an instruction's memory operand, sign-extended; the rest of the operand is in the
    /// instruction information.
    Displacement(u64),
    /// MWAIT: whether address-range monitoring hardware was armed.
    Mwait {
        /// Bit 0.
        armed: bool,
    },
    /// A VM entry that failed: one of [`entry_failure_qualification`], or the number of an entry in the MSR-load area.
    EntryFailure(u64),
    /// An access to the APIC-access page.
    ApicAccess(ApicAccess),
    /// EOI virtualization: the vector.
    Eoi(u8),
    /// APIC-write emulation: the offset in the virtual-APIC page.
    ApicWrite(u16),
    /// An EPT violation.
    EptViolation(EptViolation),
    /// A full page-modification log, or an event of sub-page permissions: whether an IRET had unblocked NMIs before.
    NmiUnblocking(bool),
    /// An instruction timeout.
    InstructionTimeout(InstructionTimeout),
    /// The MSR that an instruction other than RDMSR and WRMSR names.
    MsrIndex(u32),
    /// A reason that this crate does not know, or an exception that has no qualification by the SDM.
    Other(u64),
}

impl Qualification {
    /// Takes a qualification apart. `interruption` is the interruption information of the same exit; only exceptions
    /// use it.
    ///
    /// ```
    /// use shadow::exit::{ExitReason, InterruptionInfo, Qualification};
    ///
    /// let out_dx_al = Qualification::of(ExitReason::IO_INSTRUCTION, 0x3f8_0000, InterruptionInfo::default());
    /// let Qualification::Io(io) = out_dx_al else { unreachable!() };
    /// assert_eq!((io.port(), io.bytes(), io.is_in(), io.is_string()), (0x3f8, 1, false, false));
    /// ```
    pub fn of(reason: ExitReason, word: u64, interruption: InterruptionInfo) -> Self {
        let Some(info) = reason.info() else { return Self::Other(word) };
        match info.qualification {
            QualificationKind::None => Self::None,
            QualificationKind::Exception => Self::of_exception(word, interruption),
            QualificationKind::Sipi => Self::Sipi(word as u8),
            QualificationKind::TaskSwitch => Self::TaskSwitch(TaskSwitch(word)),
            QualificationKind::CrAccess => Self::CrAccess(CrAccess(word)),
            QualificationKind::DrAccess => Self::DrAccess(DrAccess(word)),
            QualificationKind::Io => Self::Io(IoAccess(word)),
            QualificationKind::LinearAddress => Self::LinearAddress(word),
            QualificationKind::Displacement => Self::Displacement(word),
            QualificationKind::Mwait => Self::Mwait { armed: word & 1 != 0 },
            QualificationKind::EntryFailure => Self::EntryFailure(word),
            QualificationKind::ApicAccess => Self::ApicAccess(ApicAccess(word)),
            QualificationKind::Eoi => Self::Eoi(word as u8),
            QualificationKind::ApicWrite => Self::ApicWrite((word & 0xfff) as u16),
            QualificationKind::EptViolation => Self::EptViolation(EptViolation(word)),
            QualificationKind::NmiUnblocking => Self::NmiUnblocking(word & EptViolation::NMI_UNBLOCKING.bits() != 0),
            QualificationKind::InstructionTimeout => Self::InstructionTimeout(InstructionTimeout(word)),
            QualificationKind::MsrIndex => Self::MsrIndex(word as u32),
        }
    }

    fn of_exception(word: u64, interruption: InterruptionInfo) -> Self {
        const DEBUG: u8 = 1;
        const PAGE_FAULT: u8 = 14;
        if !interruption.is_valid() || interruption.kind() == interruption_type::NMI {
            return Self::None;
        }
        match interruption.vector() {
            DEBUG => Self::Debug(DebugConditions(word)),
            PAGE_FAULT => Self::PageFault(word),
            _ => Self::Other(word),
        }
    }
}

/// Single bits of a qualification, one method each.
macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        $($(#[$doc])* pub const fn $name(self) -> bool { self.0 >> $bit & 1 != 0 })*
    };
}

/// A debug exception (SDM Table 28-1), or pending debug exceptions, which have the same bits (SDM Table 25-4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct DebugConditions(pub u64);

impl DebugConditions {
    /// B3 to B0: breakpoints whose condition was met.
    pub const fn breakpoints(self) -> u8 {
        (self.0 & 0xf) as u8
    }

    bits! {
        /// BLD: a bus lock; DR6 has this bit inverted.
        bus_lock = 11;
        /// BD: an access to a debug register while DR7.GD is 1.
        debug_register_access = 13;
        /// BS: a single step or a taken branch.
        single_step = 14;
        /// RTM: in a transactional region; DR6 has this bit inverted.
        transactional_region = 16;
    }
}

/// A task switch (SDM Table 28-2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct TaskSwitch(pub u64);

/// What began a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TaskSwitchSource {
    /// CALL.
    Call,
    /// IRET.
    Iret,
    /// JMP.
    Jmp,
    /// A task gate in the IDT.
    TaskGate,
}

impl TaskSwitch {
    /// Selector of the new task's TSS.
    pub const fn selector(self) -> u16 {
        self.0 as u16
    }

    /// What began the task switch.
    pub const fn source(self) -> TaskSwitchSource {
        match self.0 >> 30 & 3 {
            0 => TaskSwitchSource::Call,
            1 => TaskSwitchSource::Iret,
            2 => TaskSwitchSource::Jmp,
            _ => TaskSwitchSource::TaskGate,
        }
    }
}

/// An access to a control register (SDM Table 28-3).
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

    bits! {
        /// LMSW's operand is in memory; the guest-linear address says where.
        lmsw_from_memory = 6;
    }
}

/// A MOV to or from a debug register (SDM Table 28-4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct DrAccess(pub u64);

impl DrAccess {
    /// Number of the debug register.
    pub const fn register(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// General-purpose register.
    pub const fn gpr(self) -> usize {
        (self.0 >> 8 & 0xf) as usize
    }

    bits! {
        /// MOV from DR.
        is_read = 4;
    }
}

/// An I/O instruction (SDM Table 28-5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct IoAccess(pub u64);

impl IoAccess {
    /// Size of the access: 1, 2 or 4 bytes.
    pub const fn bytes(self) -> u8 {
        (self.0 & 7) as u8 + 1
    }

    /// The port.
    pub const fn port(self) -> u16 {
        (self.0 >> 16) as u16
    }

    bits! {
        /// IN or INS.
        is_in = 3;
        /// INS or OUTS.
        is_string = 4;
        /// With a REP prefix.
        is_repeated = 5;
        /// The port is an immediate operand, not DX.
        is_immediate = 6;
    }
}

/// An access to the APIC-access page (SDM Table 28-6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct ApicAccess(pub u64);

/// How the APIC-access page was accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApicAccessKind {
    /// Linear access, a data read.
    LinearRead,
    /// Linear access, a data write.
    LinearWrite,
    /// Linear access, an instruction fetch.
    LinearFetch,
    /// Linear access during event delivery.
    LinearEventDelivery,
    /// Linear access for monitoring.
    LinearMonitoring,
    /// Guest-physical access during event delivery.
    PhysicalEventDelivery,
    /// Guest-physical access for monitoring or trace.
    PhysicalMonitoring,
    /// Guest-physical access, an instruction fetch or its execution.
    PhysicalInstruction,
    /// A number that the SDM does not define.
    Other(u8),
}

impl ApicAccess {
    /// Offset in the page, for linear accesses.
    pub const fn offset(self) -> u16 {
        (self.0 & 0xfff) as u16
    }

    /// The access type.
    pub const fn kind(self) -> ApicAccessKind {
        match (self.0 >> 12 & 0xf) as u8 {
            0 => ApicAccessKind::LinearRead,
            1 => ApicAccessKind::LinearWrite,
            2 => ApicAccessKind::LinearFetch,
            3 => ApicAccessKind::LinearEventDelivery,
            4 => ApicAccessKind::LinearMonitoring,
            10 => ApicAccessKind::PhysicalEventDelivery,
            11 => ApicAccessKind::PhysicalMonitoring,
            15 => ApicAccessKind::PhysicalInstruction,
            other => ApicAccessKind::Other(other),
        }
    }

    bits! {
        /// An access that is asynchronous to instruction execution.
        is_asynchronous = 16;
    }
}

/// An instruction timeout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct InstructionTimeout(pub u64);

impl InstructionTimeout {
    bits! {
        /// The guest cannot go on: its context in the VMCS is not valid.
        context_is_invalid = 0;
        /// NMI unblocking due to IRET.
        nmi_unblocking = 12;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exception(vector: u8) -> InterruptionInfo {
        InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, vector)
    }

    #[test]
    fn cr_access_qualification_comes_apart() {
        let mov_to_cr4_from_rax = CrAccess(4);
        assert_eq!(
            (mov_to_cr4_from_rax.register(), mov_to_cr4_from_rax.kind(), mov_to_cr4_from_rax.gpr()),
            (4, CrAccessKind::MovTo, 0)
        );
        let lmsw = CrAccess(3 << 4 | 1 << 6 | 0xabcd << 16);
        assert_eq!((lmsw.kind(), lmsw.lmsw_source(), lmsw.lmsw_from_memory()), (CrAccessKind::Lmsw, 0xabcd, true));
        let mov_r9_from_cr3 = CrAccess(3 | 1 << 4 | 9 << 8);
        assert_eq!((mov_r9_from_cr3.kind(), mov_r9_from_cr3.gpr()), (CrAccessKind::MovFrom, 9));
    }

    #[test]
    fn an_exception_is_decoded_by_its_vector() {
        let of = |interruption| Qualification::of(ExitReason::EXCEPTION_OR_NMI, 0x4001, interruption);
        let Qualification::Debug(debug) = of(exception(1)) else { panic!("a debug exception") };
        assert_eq!((debug.breakpoints(), debug.single_step(), debug.bus_lock()), (1, true, false));
        assert_eq!(of(exception(14)), Qualification::PageFault(0x4001));
        assert_eq!(of(InterruptionInfo::new(interruption_type::NMI, 2)), Qualification::None);
        assert_eq!(of(exception(13)), Qualification::Other(0x4001));
    }

    #[test]
    fn io_and_debug_register_accesses_come_apart() {
        let rep_insw = IoAccess(1 | 1 << 3 | 1 << 4 | 1 << 5 | 0x1f0 << 16);
        assert_eq!((rep_insw.bytes(), rep_insw.port()), (2, 0x1f0));
        assert!(rep_insw.is_in() && rep_insw.is_string() && rep_insw.is_repeated() && !rep_insw.is_immediate());
        let mov_from_dr7 = DrAccess(7 | 1 << 4 | 3 << 8);
        assert_eq!((mov_from_dr7.register(), mov_from_dr7.gpr(), mov_from_dr7.is_read()), (7, 3, true));
    }

    #[test]
    fn task_switches_and_apic_accesses_come_apart() {
        let gate = TaskSwitch(3 << 30 | 0x28);
        assert_eq!((gate.selector(), gate.source()), (0x28, TaskSwitchSource::TaskGate));
        let write = ApicAccess(1 << 12 | 0x300);
        assert_eq!((write.offset(), write.kind()), (0x300, ApicAccessKind::LinearWrite));
        assert_eq!(ApicAccess(9 << 12).kind(), ApicAccessKind::Other(9));
    }

    #[test]
    fn an_ept_violation_is_told_from_a_full_log() {
        let write = Qualification::of(ExitReason::EPT_VIOLATION, 0x18a, InterruptionInfo::default());
        assert_eq!(write, Qualification::EptViolation(EptViolation(0x18a)));
        assert_eq!(
            Qualification::of(ExitReason::PML_FULL, 1 << 12, InterruptionInfo::default()),
            Qualification::NmiUnblocking(true)
        );
    }

    proptest! {
        #[test]
        fn any_word_is_decoded_for_any_reason(reason: u32, known in 0u32..90, word: u64, interruption: u32) {
            for reason in [ExitReason(reason), ExitReason(known)] {
                let qualification = Qualification::of(reason, word, InterruptionInfo(interruption));
                prop_assert!(reason.info().is_some() || qualification == Qualification::Other(word));
            }
        }
    }
}
