//! THE table: every VMCS field, one row each (SDM Appendix B "Field Encoding in VMCS").
//!
//! A row reads `NAME: WIDTH AREA INDEX, exists with ..., merge class, how often it is accessed`. The table generates
//! the typed constants, the dense ids, the encodings, the VMCS12 layout, and the sets that the merge and the
//! synchronisation work through. Fields of features that are not offered have rows too; for the guest hypervisor they
//! do not exist: its VMREAD and VMWRITE of them fail with error 12.

use crate::controls::{
    Control, ControlWord, EntryControls as N, Exists, ExitControls as X, Pin as P, Primary as C, Secondary as S,
    SecondaryExitControls as X2, Tertiary as T, VmFunctions as F,
};
use crate::encoding::{Area, Encoding, Width};
use core::marker::PhantomData;

/// Dense number of a field: its row in the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct FieldId(pub(crate) u8);

/// A field with the Rust type that holds its value.
pub struct Field<T> {
    id: FieldId,
    value: PhantomData<T>,
}

impl<T> Clone for Field<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Field<T> {}

impl<T> Field<T> {
    /// The field's dense number.
    pub const fn id(self) -> FieldId {
        self.id
    }
}

/// How vmcs02 gets its value of a field, and where the nested guest's changes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Merge {
    /// vmcs02 holds vmcs12's value. The processor alone checks it, at VM entry, and under VMCS shadowing the guest
    /// hypervisor may write the field in vmcs02 directly. No check in [`crate::check`] may depend on such a field, as a
    /// direct write would not repeat the check.
    Copy,
    /// A register that VM entry loads: vmcs02 holds vmcs12's value, or the guest hypervisor's if vmcs12 does not load
    /// it.
    Loaded,
    /// A PDPTE: vmcs12's with EPT12, else from the nested guest's memory.
    Pdpte,
    /// The VMX-preemption timer: vmcs12's value, unless the last exit has saved the time that was left.
    Timer,
    /// A control word: bit by bit as [`crate::controls`] says.
    ControlWord,
    /// The address of a structure within one page of the guest hypervisor's memory, which itself holds no addresses;
    /// vmcs02 holds the address that EPT01 translates it to.
    Translated,
    /// Guest state: copied to vmcs02, and back when the nested guest has run.
    Guest,
    /// Exit information: copied from vmcs02 to vmcs12 when an exit is reflected.
    ExitInfo,
    /// The guest hypervisor's own state, loaded into vmcs01's guest-state area when an exit is reflected.
    HostState,
    /// A register of the guest hypervisor that the host has no use for ([`crate::passing`]): vmcs02 holds vmcs12's
    /// value, and exits load it.
    Passing,
    /// vmcs02 holds the host's value; software acts upon vmcs12's.
    HostOnly,
}

/// How often a guest hypervisor accesses a field. Without VMCS shadowing, every exit of a nested guest copies the often
/// accessed guest state back to VMCS12; all other guest state is copied on demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accessed {
    /// On most exits, by KVM or Xen.
    Often,
    /// When a hypervisor sets a nested guest up, and then seldom.
    Rarely,
}

/// A row of the table.
#[derive(Debug)]
pub struct FieldInfo {
    /// The field's name, as in the SDM, in capitals.
    pub name: &'static str,
    /// Its encoding for full access.
    pub encoding: Encoding,
    /// When the processor has it.
    pub exists: Exists,
    /// How vmcs02 gets its value.
    pub merge: Merge,
    /// How often a guest hypervisor accesses it.
    pub accessed: Accessed,
}

/// The type of a row's values: a control word's own type, or an integer of the field's width.
macro_rules! value_type {
    (Pin) => {
        P
    };
    (Primary) => {
        C
    };
    (Secondary) => {
        S
    };
    (Tertiary) => {
        T
    };
    (Exit) => {
        X
    };
    (SecondaryExit) => {
        X2
    };
    (Entry) => {
        N
    };
    (VmFunctions) => {
        F
    };
    (W16) => {
        u16
    };
    (W32) => {
        u32
    };
    (W64) => {
        u64
    };
    (Nat) => {
        u64
    };
}

macro_rules! width {
    (Pin) => {
        Width::W32
    };
    (Primary) => {
        Width::W32
    };
    (Secondary) => {
        Width::W32
    };
    (Tertiary) => {
        Width::W64
    };
    (Exit) => {
        Width::W32
    };
    (SecondaryExit) => {
        Width::W64
    };
    (Entry) => {
        Width::W32
    };
    (VmFunctions) => {
        Width::W64
    };
    ($width:ident) => {
        Width::$width
    };
}

macro_rules! exists {
    (Always) => {
        Exists::Always
    };
    (Smm) => {
        Exists::Smm
    };
    (Unreported) => {
        Exists::Unreported
    };
    (Cr3Target($number:expr)) => {
        Exists::Cr3Target($number)
    };
    (EntryOrExit($entry:expr, $exit:expr)) => {
        Exists::With(&[Control::Entry($entry), Control::Exit($exit)])
    };
    ($word:ident($control:expr)) => {
        Exists::With(&[Control::$word($control)])
    };
}

macro_rules! vmcs_fields {
    ($($(#[$doc:meta])* $name:ident: $width:ident $area:ident $index:literal, $exists:ident $(($($control:tt)*))?, $merge:ident, $accessed:ident;)*) => {
        #[expect(non_camel_case_types, clippy::upper_case_acronyms, reason = "only its discriminants are used, as row numbers")]
        enum Row { $($name),* }

        /// Number of fields in the table.
        pub const FIELD_COUNT: usize = [$(stringify!($name)),*].len();

        /// The table itself, by [`FieldId`].
        pub static FIELDS: [FieldInfo; FIELD_COUNT] = FIELD_ROWS;
        pub(crate) const FIELD_ROWS: [FieldInfo; FIELD_COUNT] = [$(FieldInfo {
            name: stringify!($name),
            encoding: Encoding::new(width!($width), Area::$area, $index),
            exists: exists!($exists $(($($control)*))?),
            merge: Merge::$merge,
            accessed: Accessed::$accessed,
        }),*];

        $(
            $(#[$doc])*
            pub const $name: Field<value_type!($width)> = Field { id: FieldId(Row::$name as u8), value: PhantomData };
        )*
    };
}

vmcs_fields! {
    // 16-bit control fields.
    /// Virtual-processor identifier. vmcs02 has a VPID that the host chooses.
    VPID: W16 Control 0, Secondary(S::ENABLE_VPID), HostOnly, Rarely;
    /// Posted-interrupt notification vector.
    POSTED_INTERRUPT_NOTIFICATION_VECTOR: W16 Control 1, Pin(P::PROCESS_POSTED_INTERRUPTS), Copy, Rarely;
    /// EPTP index, for EPTP switching and #VE.
    EPTP_INDEX: W16 Control 2, Secondary(S::EPT_VIOLATION_VE), Copy, Rarely;
    /// HLAT prefix size.
    HLAT_PREFIX_SIZE: W16 Control 3, Tertiary(T::ENABLE_HLAT), Copy, Rarely;
    /// Last PID-pointer index.
    LAST_PID_POINTER_INDEX: W16 Control 4, Tertiary(T::IPI_VIRTUALIZATION), Copy, Rarely;
    /// Virtual timer vector, for APIC-timer virtualization.
    VIRTUAL_TIMER_VECTOR: W16 Control 5, Tertiary(T::APIC_TIMER_VIRTUALIZATION), Copy, Rarely;

    // 16-bit guest-state fields.
    /// Guest ES selector.
    GUEST_ES_SELECTOR: W16 Guest 0, Always, Guest, Rarely;
    /// Guest CS selector.
    GUEST_CS_SELECTOR: W16 Guest 1, Always, Guest, Rarely;
    /// Guest SS selector.
    GUEST_SS_SELECTOR: W16 Guest 2, Always, Guest, Rarely;
    /// Guest DS selector.
    GUEST_DS_SELECTOR: W16 Guest 3, Always, Guest, Rarely;
    /// Guest FS selector.
    GUEST_FS_SELECTOR: W16 Guest 4, Always, Guest, Rarely;
    /// Guest GS selector.
    GUEST_GS_SELECTOR: W16 Guest 5, Always, Guest, Rarely;
    /// Guest LDTR selector.
    GUEST_LDTR_SELECTOR: W16 Guest 6, Always, Guest, Rarely;
    /// Guest TR selector.
    GUEST_TR_SELECTOR: W16 Guest 7, Always, Guest, Rarely;
    /// Guest interrupt status: RVI and SVI.
    GUEST_INTERRUPT_STATUS: W16 Guest 8, Secondary(S::VIRTUAL_INTERRUPT_DELIVERY), Guest, Often;
    /// PML index.
    PML_INDEX: W16 Guest 9, Secondary(S::ENABLE_PML), Guest, Rarely;
    /// Guest user-interrupt notification vector.
    GUEST_UINV: W16 Guest 10, EntryOrExit(N::LOAD_UINV, X::CLEAR_UINV), Guest, Rarely;

    // 16-bit host-state fields.
    /// Host ES selector.
    HOST_ES_SELECTOR: W16 Host 0, Always, HostState, Rarely;
    /// Host CS selector.
    HOST_CS_SELECTOR: W16 Host 1, Always, HostState, Rarely;
    /// Host SS selector.
    HOST_SS_SELECTOR: W16 Host 2, Always, HostState, Rarely;
    /// Host DS selector.
    HOST_DS_SELECTOR: W16 Host 3, Always, HostState, Rarely;
    /// Host FS selector.
    HOST_FS_SELECTOR: W16 Host 4, Always, HostState, Often;
    /// Host GS selector.
    HOST_GS_SELECTOR: W16 Host 5, Always, HostState, Often;
    /// Host TR selector.
    HOST_TR_SELECTOR: W16 Host 6, Always, HostState, Rarely;

    // 64-bit control fields.
    /// Address of I/O bitmap A, for ports 0 to 0x7fff.
    IO_BITMAP_A: W64 Control 0, Always, Translated, Rarely;
    /// Address of I/O bitmap B, for ports 0x8000 to 0xffff.
    IO_BITMAP_B: W64 Control 1, Always, Translated, Rarely;
    /// Address of the MSR bitmaps. vmcs02 points to a merged copy.
    MSR_BITMAP: W64 Control 2, Primary(C::USE_MSR_BITMAPS), HostOnly, Rarely;
    /// VM-exit MSR-store address. vmcs02 points to a copy.
    EXIT_MSR_STORE_ADDRESS: W64 Control 3, Always, HostOnly, Rarely;
    /// VM-exit MSR-load address, loaded when an exit is reflected.
    EXIT_MSR_LOAD_ADDRESS: W64 Control 4, Always, HostOnly, Rarely;
    /// VM-entry MSR-load address. vmcs02 points to a copy.
    ENTRY_MSR_LOAD_ADDRESS: W64 Control 5, Always, HostOnly, Rarely;
    /// Executive-VMCS pointer, for SMM only.
    EXECUTIVE_VMCS_POINTER: W64 Control 6, Smm, HostOnly, Rarely;
    /// PML address. The host itself writes the log.
    PML_ADDRESS: W64 Control 7, Secondary(S::ENABLE_PML), HostOnly, Rarely;
    /// TSC offset. The guest hypervisor itself runs without an offset, so VMCS12's is the nested guest's whole offset.
    TSC_OFFSET: W64 Control 8, Always, Copy, Rarely;
    /// Virtual-APIC address.
    VIRTUAL_APIC_ADDRESS: W64 Control 9, Primary(C::USE_TPR_SHADOW), Translated, Rarely;
    /// APIC-access address.
    APIC_ACCESS_ADDRESS: W64 Control 10, Secondary(S::VIRTUALIZE_APIC_ACCESSES), Translated, Rarely;
    /// Posted-interrupt descriptor address.
    POSTED_INTERRUPT_DESCRIPTOR_ADDRESS: W64 Control 11, Pin(P::PROCESS_POSTED_INTERRUPTS), Translated, Rarely;
    /// VM-function controls.
    VM_FUNCTION_CONTROLS: VmFunctions Control 12, Secondary(S::ENABLE_VM_FUNCTIONS), HostOnly, Rarely;
    /// EPT pointer. vmcs02 has the EPTP of ept02, or of ept01.
    EPT_POINTER: W64 Control 13, Secondary(S::ENABLE_EPT), HostOnly, Rarely;
    /// EOI-exit bitmap 0.
    EOI_EXIT_BITMAP_0: W64 Control 14, Secondary(S::VIRTUAL_INTERRUPT_DELIVERY), Copy, Rarely;
    /// EOI-exit bitmap 1.
    EOI_EXIT_BITMAP_1: W64 Control 15, Secondary(S::VIRTUAL_INTERRUPT_DELIVERY), Copy, Rarely;
    /// EOI-exit bitmap 2.
    EOI_EXIT_BITMAP_2: W64 Control 16, Secondary(S::VIRTUAL_INTERRUPT_DELIVERY), Copy, Rarely;
    /// EOI-exit bitmap 3.
    EOI_EXIT_BITMAP_3: W64 Control 17, Secondary(S::VIRTUAL_INTERRUPT_DELIVERY), Copy, Rarely;
    /// EPTP-list address.
    EPTP_LIST_ADDRESS: W64 Control 18, VmFunction(F::EPTP_SWITCHING), HostOnly, Rarely;
    /// VMREAD-bitmap address. vmcs02 has the address of another bitmap, in which fields that are not offered make every
    /// access exit.
    VMREAD_BITMAP: W64 Control 19, Secondary(S::VMCS_SHADOWING), HostOnly, Rarely;
    /// VMWRITE-bitmap address.
    VMWRITE_BITMAP: W64 Control 20, Secondary(S::VMCS_SHADOWING), HostOnly, Rarely;
    /// Virtualization-exception information address.
    VIRTUALIZATION_EXCEPTION_INFO: W64 Control 21, Secondary(S::EPT_VIOLATION_VE), HostOnly, Rarely;
    /// XSS-exiting bitmap.
    XSS_EXITING_BITMAP: W64 Control 22, Secondary(S::ENABLE_XSAVES), Copy, Rarely;
    /// ENCLS-exiting bitmap.
    ENCLS_EXITING_BITMAP: W64 Control 23, Secondary(S::ENCLS_EXITING), Copy, Rarely;
    /// Sub-page-permission-table pointer.
    SPP_TABLE_POINTER: W64 Control 24, Secondary(S::SUB_PAGE_WRITE_PERMISSIONS), HostOnly, Rarely;
    /// TSC multiplier.
    TSC_MULTIPLIER: W64 Control 25, Secondary(S::USE_TSC_SCALING), Copy, Rarely;
    /// Tertiary processor-based VM-execution controls.
    TERTIARY_CONTROLS: Tertiary Control 26, Primary(C::ACTIVATE_TERTIARY), ControlWord, Rarely;
    /// ENCLV-exiting bitmap.
    ENCLV_EXITING_BITMAP: W64 Control 27, Secondary(S::ENCLV_EXITING), Copy, Rarely;
    /// Low PASID directory address.
    LOW_PASID_DIRECTORY: W64 Control 28, Secondary(S::PASID_TRANSLATION), HostOnly, Rarely;
    /// High PASID directory address.
    HIGH_PASID_DIRECTORY: W64 Control 29, Secondary(S::PASID_TRANSLATION), HostOnly, Rarely;
    /// Shared EPT pointer (SEAM).
    SHARED_EPT_POINTER: W64 Control 30, Unreported, HostOnly, Rarely;
    /// PCONFIG-exiting bitmap.
    PCONFIG_EXITING_BITMAP: W64 Control 31, Secondary(S::ENABLE_PCONFIG), Copy, Rarely;
    /// HLAT pointer.
    HLAT_POINTER: W64 Control 32, Tertiary(T::ENABLE_HLAT), Copy, Rarely;
    /// PID-pointer table address.
    PID_POINTER_TABLE: W64 Control 33, Tertiary(T::IPI_VIRTUALIZATION), HostOnly, Rarely;
    /// Secondary VM-exit controls.
    SECONDARY_EXIT_CONTROLS: SecondaryExit Control 34, Exit(X::ACTIVATE_SECONDARY), ControlWord, Rarely;
    /// IA32_SPEC_CTRL mask.
    SPEC_CTRL_MASK: W64 Control 37, Tertiary(T::VIRTUALIZE_SPEC_CTRL), Copy, Rarely;
    /// IA32_SPEC_CTRL shadow. Among the controls by its encoding only: WRMSR of the nested guest changes it.
    SPEC_CTRL_SHADOW: W64 Control 38, Tertiary(T::VIRTUALIZE_SPEC_CTRL), Guest, Rarely;
    /// Guest deadline shadow: the TSC deadline that the guest reads back.
    GUEST_DEADLINE_SHADOW: W64 Control 39, Tertiary(T::APIC_TIMER_VIRTUALIZATION), Copy, Rarely;
    /// Injected-event data: what FRED event delivery saves for an injected event.
    INJECTED_EVENT_DATA: W64 Control 41, Entry(N::LOAD_FRED), Copy, Rarely;

    // 64-bit read-only data fields.
    /// Guest-physical address of an EPT violation or misconfiguration.
    GUEST_PHYSICAL_ADDRESS: W64 ExitInfo 0, Secondary(S::ENABLE_EPT), ExitInfo, Often;
    /// MSR data: the value that a WRMSRLIST that exited would have written.
    MSR_DATA: W64 ExitInfo 1, Tertiary(T::ENABLE_MSR_LIST), ExitInfo, Rarely;
    /// Original-event data: what FRED event delivery would have saved for the event whose delivery the exit
    /// interrupted.
    ORIGINAL_EVENT_DATA: W64 ExitInfo 2, Entry(N::LOAD_FRED), ExitInfo, Rarely;
    /// Extended instruction information (APX).
    EXTENDED_INSTRUCTION_INFO: W64 ExitInfo 3, Unreported, ExitInfo, Rarely;

    // 64-bit guest-state fields.
    /// VMCS link pointer. Among the guest state by its encoding only: no guest register corresponds to it. It points to
    /// a shadow VMCS, so vmcs02 has the host's value.
    VMCS_LINK_POINTER: W64 Guest 0, Always, HostOnly, Rarely;
    /// Guest IA32_DEBUGCTL.
    GUEST_DEBUGCTL: W64 Guest 1, Always, Loaded, Rarely;
    /// Guest IA32_PAT.
    GUEST_PAT: W64 Guest 2, EntryOrExit(N::LOAD_PAT, X::SAVE_PAT), Loaded, Rarely;
    /// Guest IA32_EFER.
    GUEST_EFER: W64 Guest 3, EntryOrExit(N::LOAD_EFER, X::SAVE_EFER), Loaded, Rarely;
    /// Guest IA32_PERF_GLOBAL_CTRL.
    GUEST_PERF_GLOBAL_CTRL: W64 Guest 4, Entry(N::LOAD_PERF_GLOBAL_CTRL), Copy, Rarely;
    /// Guest PDPTE0.
    GUEST_PDPTE0: W64 Guest 5, Secondary(S::ENABLE_EPT), Pdpte, Rarely;
    /// Guest PDPTE1.
    GUEST_PDPTE1: W64 Guest 6, Secondary(S::ENABLE_EPT), Pdpte, Rarely;
    /// Guest PDPTE2.
    GUEST_PDPTE2: W64 Guest 7, Secondary(S::ENABLE_EPT), Pdpte, Rarely;
    /// Guest PDPTE3.
    GUEST_PDPTE3: W64 Guest 8, Secondary(S::ENABLE_EPT), Pdpte, Rarely;
    /// Guest IA32_BNDCFGS.
    GUEST_BNDCFGS: W64 Guest 9, EntryOrExit(N::LOAD_BNDCFGS, X::CLEAR_BNDCFGS), Guest, Rarely;
    /// Guest IA32_RTIT_CTL.
    GUEST_RTIT_CTL: W64 Guest 10, EntryOrExit(N::LOAD_RTIT_CTL, X::CLEAR_RTIT_CTL), Guest, Rarely;
    /// Guest IA32_LBR_CTL.
    GUEST_LBR_CTL: W64 Guest 11, Entry(N::LOAD_LBR_CTL), Guest, Rarely;
    /// Guest IA32_PKRS.
    GUEST_PKRS: W64 Guest 12, Entry(N::LOAD_PKRS), Guest, Rarely;
    /// Guest IA32_FRED_CONFIG.
    GUEST_FRED_CONFIG: W64 Guest 13, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_RSP1.
    GUEST_FRED_RSP1: W64 Guest 14, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_RSP2.
    GUEST_FRED_RSP2: W64 Guest 15, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_RSP3.
    GUEST_FRED_RSP3: W64 Guest 16, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_STKLVLS.
    GUEST_FRED_STKLVLS: W64 Guest 17, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_SSP1.
    GUEST_FRED_SSP1: W64 Guest 18, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_SSP2.
    GUEST_FRED_SSP2: W64 Guest 19, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_FRED_SSP3.
    GUEST_FRED_SSP3: W64 Guest 20, Entry(N::LOAD_FRED), Guest, Rarely;
    /// Guest IA32_SPEC_CTRL.
    GUEST_SPEC_CTRL: W64 Guest 23, Entry(N::LOAD_SPEC_CTRL), Guest, Rarely;
    /// Guest deadline: when the virtual timer interrupt is due, in TSC ticks of the processor.
    GUEST_DEADLINE: W64 Guest 24, Tertiary(T::APIC_TIMER_VIRTUALIZATION), Guest, Rarely;

    // 64-bit host-state fields.
    /// Host IA32_PAT.
    HOST_PAT: W64 Host 0, Exit(X::LOAD_PAT), HostState, Rarely;
    /// Host IA32_EFER.
    HOST_EFER: W64 Host 1, Exit(X::LOAD_EFER), HostState, Rarely;
    /// Host IA32_PERF_GLOBAL_CTRL.
    HOST_PERF_GLOBAL_CTRL: W64 Host 2, Exit(X::LOAD_PERF_GLOBAL_CTRL), HostState, Rarely;
    /// Host IA32_PKRS.
    HOST_PKRS: W64 Host 3, Exit(X::LOAD_PKRS), Passing, Rarely;
    /// Host IA32_FRED_CONFIG.
    HOST_FRED_CONFIG: W64 Host 4, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_RSP1.
    HOST_FRED_RSP1: W64 Host 5, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_RSP2.
    HOST_FRED_RSP2: W64 Host 6, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_RSP3.
    HOST_FRED_RSP3: W64 Host 7, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_STKLVLS.
    HOST_FRED_STKLVLS: W64 Host 8, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_SSP1.
    HOST_FRED_SSP1: W64 Host 9, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_SSP2.
    HOST_FRED_SSP2: W64 Host 10, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_FRED_SSP3.
    HOST_FRED_SSP3: W64 Host 11, SecondaryExit(X2::LOAD_FRED), HostState, Rarely;
    /// Host IA32_SPEC_CTRL.
    HOST_SPEC_CTRL: W64 Host 13, SecondaryExit(X2::LOAD_SPEC_CTRL), HostState, Rarely;

    // 32-bit control fields.
    /// Pin-based VM-execution controls.
    PIN_CONTROLS: Pin Control 0, Always, ControlWord, Rarely;
    /// Primary processor-based VM-execution controls.
    PRIMARY_CONTROLS: Primary Control 1, Always, ControlWord, Often;
    /// Exception bitmap.
    EXCEPTION_BITMAP: W32 Control 2, Always, Copy, Often;
    /// Page-fault error-code mask.
    PAGE_FAULT_ERROR_CODE_MASK: W32 Control 3, Always, Copy, Rarely;
    /// Page-fault error-code match.
    PAGE_FAULT_ERROR_CODE_MATCH: W32 Control 4, Always, Copy, Rarely;
    /// CR3-target count.
    CR3_TARGET_COUNT: W32 Control 5, Always, Copy, Rarely;
    /// Primary VM-exit controls. "Host address-space size" is here although it decides the mode of the host state.
    EXIT_CONTROLS: Exit Control 6, Always, ControlWord, Rarely;
    /// VM-exit MSR-store count.
    EXIT_MSR_STORE_COUNT: W32 Control 7, Always, HostOnly, Rarely;
    /// VM-exit MSR-load count.
    EXIT_MSR_LOAD_COUNT: W32 Control 8, Always, HostOnly, Rarely;
    /// VM-entry controls. "IA-32e mode guest" is here although it decides the mode of the guest state.
    ENTRY_CONTROLS: Entry Control 9, Always, ControlWord, Rarely;
    /// VM-entry MSR-load count.
    ENTRY_MSR_LOAD_COUNT: W32 Control 10, Always, HostOnly, Rarely;
    /// VM-entry interruption-information field. Every VM exit clears its valid bit, in vmcs02 and so in VMCS12.
    ENTRY_INTERRUPTION_INFO: W32 Control 11, Always, Copy, Often;
    /// VM-entry exception error code.
    ENTRY_EXCEPTION_ERROR_CODE: W32 Control 12, Always, Copy, Often;
    /// VM-entry instruction length.
    ENTRY_INSTRUCTION_LENGTH: W32 Control 13, Always, Copy, Often;
    /// TPR threshold.
    TPR_THRESHOLD: W32 Control 14, Primary(C::USE_TPR_SHADOW), Copy, Often;
    /// Secondary processor-based VM-execution controls.
    SECONDARY_CONTROLS: Secondary Control 15, Primary(C::ACTIVATE_SECONDARY), ControlWord, Rarely;
    /// PLE_Gap.
    PLE_GAP: W32 Control 16, Secondary(S::PAUSE_LOOP_EXITING), Copy, Rarely;
    /// PLE_Window.
    PLE_WINDOW: W32 Control 17, Secondary(S::PAUSE_LOOP_EXITING), Copy, Rarely;
    /// Instruction-timeout control (notify window).
    INSTRUCTION_TIMEOUT: W32 Control 18, Secondary(S::INSTRUCTION_TIMEOUT), Copy, Rarely;

    // 32-bit read-only data fields.
    /// VM-instruction error.
    VM_INSTRUCTION_ERROR: W32 ExitInfo 0, Always, HostOnly, Rarely;
    /// Exit reason.
    EXIT_REASON: W32 ExitInfo 1, Always, ExitInfo, Often;
    /// VM-exit interruption information.
    EXIT_INTERRUPTION_INFO: W32 ExitInfo 2, Always, ExitInfo, Often;
    /// VM-exit interruption error code.
    EXIT_INTERRUPTION_ERROR_CODE: W32 ExitInfo 3, Always, ExitInfo, Often;
    /// IDT-vectoring information field.
    IDT_VECTORING_INFO: W32 ExitInfo 4, Always, ExitInfo, Often;
    /// IDT-vectoring error code.
    IDT_VECTORING_ERROR_CODE: W32 ExitInfo 5, Always, ExitInfo, Often;
    /// VM-exit instruction length.
    EXIT_INSTRUCTION_LENGTH: W32 ExitInfo 6, Always, ExitInfo, Often;
    /// VM-exit instruction information.
    EXIT_INSTRUCTION_INFO: W32 ExitInfo 7, Always, ExitInfo, Often;

    // 32-bit guest-state fields.
    /// Guest ES limit.
    GUEST_ES_LIMIT: W32 Guest 0, Always, Guest, Rarely;
    /// Guest CS limit.
    GUEST_CS_LIMIT: W32 Guest 1, Always, Guest, Rarely;
    /// Guest SS limit.
    GUEST_SS_LIMIT: W32 Guest 2, Always, Guest, Rarely;
    /// Guest DS limit.
    GUEST_DS_LIMIT: W32 Guest 3, Always, Guest, Rarely;
    /// Guest FS limit.
    GUEST_FS_LIMIT: W32 Guest 4, Always, Guest, Rarely;
    /// Guest GS limit.
    GUEST_GS_LIMIT: W32 Guest 5, Always, Guest, Rarely;
    /// Guest LDTR limit.
    GUEST_LDTR_LIMIT: W32 Guest 6, Always, Guest, Rarely;
    /// Guest TR limit.
    GUEST_TR_LIMIT: W32 Guest 7, Always, Guest, Rarely;
    /// Guest GDTR limit.
    GUEST_GDTR_LIMIT: W32 Guest 8, Always, Guest, Rarely;
    /// Guest IDTR limit.
    GUEST_IDTR_LIMIT: W32 Guest 9, Always, Guest, Rarely;
    /// Guest ES access rights.
    GUEST_ES_ACCESS_RIGHTS: W32 Guest 10, Always, Guest, Rarely;
    /// Guest CS access rights.
    GUEST_CS_ACCESS_RIGHTS: W32 Guest 11, Always, Guest, Often;
    /// Guest SS access rights.
    GUEST_SS_ACCESS_RIGHTS: W32 Guest 12, Always, Guest, Often;
    /// Guest DS access rights.
    GUEST_DS_ACCESS_RIGHTS: W32 Guest 13, Always, Guest, Rarely;
    /// Guest FS access rights.
    GUEST_FS_ACCESS_RIGHTS: W32 Guest 14, Always, Guest, Rarely;
    /// Guest GS access rights.
    GUEST_GS_ACCESS_RIGHTS: W32 Guest 15, Always, Guest, Rarely;
    /// Guest LDTR access rights.
    GUEST_LDTR_ACCESS_RIGHTS: W32 Guest 16, Always, Guest, Rarely;
    /// Guest TR access rights.
    GUEST_TR_ACCESS_RIGHTS: W32 Guest 17, Always, Guest, Rarely;
    /// Guest interruptibility state.
    GUEST_INTERRUPTIBILITY: W32 Guest 18, Always, Guest, Often;
    /// Guest activity state.
    GUEST_ACTIVITY_STATE: W32 Guest 19, Always, Guest, Often;
    /// Guest SMBASE.
    GUEST_SMBASE: W32 Guest 20, Smm, HostOnly, Rarely;
    /// Guest IA32_SYSENTER_CS.
    GUEST_SYSENTER_CS: W32 Guest 21, Always, Guest, Rarely;
    /// VMX-preemption timer value. It is part of the guest state although it acts as a control: an exit saves it only
    /// if the control "save VMX-preemption timer value" is 1.
    PREEMPTION_TIMER_VALUE: W32 Guest 23, Pin(P::ACTIVATE_PREEMPTION_TIMER), Timer, Often;

    // 32-bit host-state field.
    /// Host IA32_SYSENTER_CS.
    HOST_SYSENTER_CS: W32 Host 0, Always, HostState, Rarely;

    // Natural-width control fields.
    /// CR0 guest/host mask.
    CR0_GUEST_HOST_MASK: Nat Control 0, Always, Copy, Often;
    /// CR4 guest/host mask.
    CR4_GUEST_HOST_MASK: Nat Control 1, Always, Copy, Often;
    /// CR0 read shadow.
    CR0_READ_SHADOW: Nat Control 2, Always, Copy, Often;
    /// CR4 read shadow.
    CR4_READ_SHADOW: Nat Control 3, Always, Copy, Often;
    /// CR3-target value 0.
    CR3_TARGET_VALUE_0: Nat Control 4, Cr3Target(0), Copy, Rarely;
    /// CR3-target value 1.
    CR3_TARGET_VALUE_1: Nat Control 5, Cr3Target(1), Copy, Rarely;
    /// CR3-target value 2.
    CR3_TARGET_VALUE_2: Nat Control 6, Cr3Target(2), Copy, Rarely;
    /// CR3-target value 3.
    CR3_TARGET_VALUE_3: Nat Control 7, Cr3Target(3), Copy, Rarely;

    // Natural-width read-only data fields.
    /// Exit qualification.
    EXIT_QUALIFICATION: Nat ExitInfo 0, Always, ExitInfo, Often;
    /// I/O RCX.
    IO_RCX: Nat ExitInfo 1, Smm, HostOnly, Rarely;
    /// I/O RSI.
    IO_RSI: Nat ExitInfo 2, Smm, HostOnly, Rarely;
    /// I/O RDI.
    IO_RDI: Nat ExitInfo 3, Smm, HostOnly, Rarely;
    /// I/O RIP.
    IO_RIP: Nat ExitInfo 4, Smm, HostOnly, Rarely;
    /// Guest-linear address.
    GUEST_LINEAR_ADDRESS: Nat ExitInfo 5, Always, ExitInfo, Often;

    // Natural-width guest-state fields.
    /// Guest CR0.
    GUEST_CR0: Nat Guest 0, Always, Guest, Often;
    /// Guest CR3.
    GUEST_CR3: Nat Guest 1, Always, Guest, Often;
    /// Guest CR4.
    GUEST_CR4: Nat Guest 2, Always, Guest, Often;
    /// Guest ES base.
    GUEST_ES_BASE: Nat Guest 3, Always, Guest, Rarely;
    /// Guest CS base.
    GUEST_CS_BASE: Nat Guest 4, Always, Guest, Rarely;
    /// Guest SS base.
    GUEST_SS_BASE: Nat Guest 5, Always, Guest, Rarely;
    /// Guest DS base.
    GUEST_DS_BASE: Nat Guest 6, Always, Guest, Rarely;
    /// Guest FS base.
    GUEST_FS_BASE: Nat Guest 7, Always, Guest, Rarely;
    /// Guest GS base.
    GUEST_GS_BASE: Nat Guest 8, Always, Guest, Rarely;
    /// Guest LDTR base.
    GUEST_LDTR_BASE: Nat Guest 9, Always, Guest, Rarely;
    /// Guest TR base.
    GUEST_TR_BASE: Nat Guest 10, Always, Guest, Rarely;
    /// Guest GDTR base.
    GUEST_GDTR_BASE: Nat Guest 11, Always, Guest, Rarely;
    /// Guest IDTR base.
    GUEST_IDTR_BASE: Nat Guest 12, Always, Guest, Rarely;
    /// Guest DR7.
    GUEST_DR7: Nat Guest 13, Always, Loaded, Rarely;
    /// Guest RSP.
    GUEST_RSP: Nat Guest 14, Always, Guest, Often;
    /// Guest RIP.
    GUEST_RIP: Nat Guest 15, Always, Guest, Often;
    /// Guest RFLAGS.
    GUEST_RFLAGS: Nat Guest 16, Always, Guest, Often;
    /// Guest pending debug exceptions.
    GUEST_PENDING_DEBUG: Nat Guest 17, Always, Guest, Often;
    /// Guest IA32_SYSENTER_ESP.
    GUEST_SYSENTER_ESP: Nat Guest 18, Always, Guest, Rarely;
    /// Guest IA32_SYSENTER_EIP.
    GUEST_SYSENTER_EIP: Nat Guest 19, Always, Guest, Rarely;
    /// Guest IA32_S_CET.
    GUEST_S_CET: Nat Guest 20, Entry(N::LOAD_CET), Guest, Rarely;
    /// Guest SSP.
    GUEST_SSP: Nat Guest 21, Entry(N::LOAD_CET), Guest, Rarely;
    /// Guest IA32_INTERRUPT_SSP_TABLE_ADDR.
    GUEST_SSP_TABLE: Nat Guest 22, Entry(N::LOAD_CET), Guest, Rarely;

    // Natural-width host-state fields.
    /// Host CR0.
    HOST_CR0: Nat Host 0, Always, HostState, Rarely;
    /// Host CR3.
    HOST_CR3: Nat Host 1, Always, HostState, Rarely;
    /// Host CR4.
    HOST_CR4: Nat Host 2, Always, HostState, Rarely;
    /// Host FS base.
    HOST_FS_BASE: Nat Host 3, Always, HostState, Often;
    /// Host GS base.
    HOST_GS_BASE: Nat Host 4, Always, HostState, Often;
    /// Host TR base.
    HOST_TR_BASE: Nat Host 5, Always, HostState, Rarely;
    /// Host GDTR base.
    HOST_GDTR_BASE: Nat Host 6, Always, HostState, Rarely;
    /// Host IDTR base.
    HOST_IDTR_BASE: Nat Host 7, Always, HostState, Rarely;
    /// Host IA32_SYSENTER_ESP.
    HOST_SYSENTER_ESP: Nat Host 8, Always, HostState, Rarely;
    /// Host IA32_SYSENTER_EIP.
    HOST_SYSENTER_EIP: Nat Host 9, Always, HostState, Rarely;
    /// Host RSP.
    HOST_RSP: Nat Host 10, Always, HostState, Rarely;
    /// Host RIP.
    HOST_RIP: Nat Host 11, Always, HostState, Rarely;
    /// Host IA32_S_CET.
    HOST_S_CET: Nat Host 12, Exit(X::LOAD_CET), Passing, Rarely;
    /// Host SSP.
    HOST_SSP: Nat Host 13, Exit(X::LOAD_CET), Passing, Rarely;
    /// Host IA32_INTERRUPT_SSP_TABLE_ADDR.
    HOST_SSP_TABLE: Nat Host 14, Exit(X::LOAD_CET), Passing, Rarely;
}

/// The PDPTE fields, by number.
pub const GUEST_PDPTES: [Field<u64>; 4] = [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3];

/// A value that a VMCS field can hold.
pub trait FieldValue: Copy {
    /// Takes the value from the low bits of a word.
    fn from_word(word: u64) -> Self;
    /// The value, zero-extended to a word.
    fn into_word(self) -> u64;
}

macro_rules! field_value {
    ($($t:ty),*) => {$(
        impl FieldValue for $t {
            #[inline(always)]
            fn from_word(word: u64) -> Self { word as Self }
            #[inline(always)]
            fn into_word(self) -> u64 { self.into() }
        }
    )*};
}
field_value!(u16, u32, u64);

/// A control word that is a VMCS field.
pub trait ControlField: ControlWord + FieldValue {
    /// Its row.
    const FIELD: Field<Self>;
}

macro_rules! control_fields {
    ($($field:ident: $word:ty),*) => {$(
        impl ControlField for $word {
            const FIELD: Field<Self> = $field;
        }

        impl FieldValue for $word {
            #[inline(always)]
            fn from_word(word: u64) -> Self { Self::from_bits_retain(FieldValue::from_word(word)) }
            #[inline(always)]
            fn into_word(self) -> u64 { self.bits().into_word() }
        }
    )*};
}
control_fields!(
    PIN_CONTROLS: P,
    PRIMARY_CONTROLS: C,
    SECONDARY_CONTROLS: S,
    TERTIARY_CONTROLS: T,
    EXIT_CONTROLS: X,
    SECONDARY_EXIT_CONTROLS: X2,
    ENTRY_CONTROLS: N,
    VM_FUNCTION_CONTROLS: F
);

mod id;
#[cfg(test)]
mod tests;
