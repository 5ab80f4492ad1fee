//! A model of VM entry's checks (SDM 27.2, 27.3.1): changes a random state until it should pass them. It need not be
//! exact. A state that it gets wrong fails to enter, on both sides for the same reason.

use shadow::VmxCaps;
use shadow::controls::{Allowed, EntryControls, ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;
use shadow::registers::*;

use super::modes::{SYSTEM_SEGMENTS, is_ia32e, is_unrestricted};
use super::state::State;

const UNUSABLE: u64 = access_rights::UNUSABLE as u64;

/// Rounds everything.
pub fn round(state: &mut State, caps: &VmxCaps) {
    controls(state, caps);
    addresses(state, caps);
    host(state, caps);
    control_registers(state, caps);
    registers(state);
    segments(state);
    events(state);
    non_register(state);
}

fn allow<T: FieldValue>(state: &mut State, field: Field<T>, allowed: Allowed) {
    let value = state.get(field) & u64::from(allowed.may_be_1) | u64::from(allowed.must_be_1);
    state.set(field, value);
}

/// `control` may be 1 only with `other`.
macro_rules! needs {
    ($state:ident, $($field:ident $control:expr => $other_field:ident $other:expr;)*) => {$(
        if !$state.has($other_field, u64::from($other.bits())) {
            $state.clear($field, u64::from($control.bits()));
        }
    )*};
}

fn controls(state: &mut State, caps: &VmxCaps) {
    allow(state, PIN_CONTROLS, caps.pin);
    allow(state, PRIMARY_CONTROLS, caps.primary);
    allow(state, SECONDARY_CONTROLS, caps.secondary);
    allow(state, EXIT_CONTROLS, caps.exit);
    allow(state, ENTRY_CONTROLS, caps.entry);
    if !state.has(PRIMARY_CONTROLS, Primary::ACTIVATE_SECONDARY.bits().into()) {
        state.set(SECONDARY_CONTROLS, 0);
    }
    needs! { state,
        PIN_CONTROLS Pin::VIRTUAL_NMIS => PIN_CONTROLS Pin::NMI_EXITING;
        PRIMARY_CONTROLS Primary::NMI_WINDOW_EXITING => PIN_CONTROLS Pin::VIRTUAL_NMIS;
        SECONDARY_CONTROLS Secondary::VIRTUALIZE_X2APIC_MODE => PRIMARY_CONTROLS Primary::USE_TPR_SHADOW;
        SECONDARY_CONTROLS Secondary::APIC_REGISTER_VIRTUALIZATION => PRIMARY_CONTROLS Primary::USE_TPR_SHADOW;
        SECONDARY_CONTROLS Secondary::VIRTUAL_INTERRUPT_DELIVERY => PRIMARY_CONTROLS Primary::USE_TPR_SHADOW;
        SECONDARY_CONTROLS Secondary::VIRTUAL_INTERRUPT_DELIVERY => PIN_CONTROLS Pin::EXTERNAL_INTERRUPT_EXITING;
        PIN_CONTROLS Pin::PROCESS_POSTED_INTERRUPTS => SECONDARY_CONTROLS Secondary::VIRTUAL_INTERRUPT_DELIVERY;
        PIN_CONTROLS Pin::PROCESS_POSTED_INTERRUPTS => EXIT_CONTROLS ExitControls::ACKNOWLEDGE_INTERRUPT;
        SECONDARY_CONTROLS Secondary::UNRESTRICTED_GUEST => SECONDARY_CONTROLS Secondary::ENABLE_EPT;
        SECONDARY_CONTROLS Secondary::ENABLE_PML => SECONDARY_CONTROLS Secondary::ENABLE_EPT;
        SECONDARY_CONTROLS Secondary::MODE_BASED_EXECUTE => SECONDARY_CONTROLS Secondary::ENABLE_EPT;
        SECONDARY_CONTROLS Secondary::EPT_VIOLATION_VE => SECONDARY_CONTROLS Secondary::ENABLE_EPT;
    }
    if state.has(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_X2APIC_MODE.bits().into()) {
        state.clear(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES.bits().into());
    }
    if state.get(CR3_TARGET_COUNT) > caps.cr3_targets().into() {
        state.set(CR3_TARGET_COUNT, caps.cr3_targets().into());
    }
    if state.get(TSC_MULTIPLIER) == 0 {
        state.set(TSC_MULTIPLIER, 1);
    }
    if state.get(VPID) == 0 {
        state.set(VPID, 1);
    }
    state.set(TPR_THRESHOLD, 0);
    state.or(EXIT_CONTROLS, ExitControls::HOST_ADDRESS_SPACE_SIZE.bits().into());
    state.set(VM_FUNCTION_CONTROLS, state.get(VM_FUNCTION_CONTROLS) & caps.vmfunc);
}

fn addresses(state: &mut State, caps: &VmxCaps) {
    let physical = (1 << caps.physical_bits) - 1;
    for field in [IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, VIRTUAL_APIC_ADDRESS, APIC_ACCESS_ADDRESS, PML_ADDRESS] {
        state.set(field, state.get(field) & physical & !0xfff);
    }
    for field in [EPTP_LIST_ADDRESS, VMREAD_BITMAP, VMWRITE_BITMAP, VIRTUALIZATION_EXCEPTION_INFO] {
        state.set(field, state.get(field) & physical & !0xfff);
    }
    for field in [EXIT_MSR_STORE_ADDRESS, EXIT_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_ADDRESS] {
        state.set(field, state.get(field) & physical & !0xf);
    }
    state.clear(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, !physical | 0x3f);
    state.set(POSTED_INTERRUPT_NOTIFICATION_VECTOR, state.get(POSTED_INTERRUPT_NOTIFICATION_VECTOR) & 0xff);
    let eptp = state.get(EPT_POINTER) & physical & !0xf80;
    state.set(EPT_POINTER, eptp & !0x3f | 0x1e);
    if eptp & 7 == 0 && caps.ept_vpid >> 8 & 1 != 0 {
        state.clear(EPT_POINTER, 7);
    }
    if !state.has(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING.bits().into()) {
        state.set(VMCS_LINK_POINTER, u64::MAX);
    }
}

fn canonical(address: u64) -> u64 {
    (address << 16) as i64 as u64 >> 16 | if address >> 47 & 1 != 0 { 0xffff << 48 } else { 0 }
}

fn host(state: &mut State, caps: &VmxCaps) {
    state.set(HOST_CR0, state.get(HOST_CR0) & caps.cr0_fixed1 | caps.cr0_fixed0);
    state.set(HOST_CR4, state.get(HOST_CR4) & caps.cr4_fixed1 | caps.cr4_fixed0 | CR4_PAE);
    if !state.has(HOST_CR0, CR0_WP) {
        state.clear(HOST_CR4, CR4_CET);
    }
    state.set(HOST_EFER, state.get(HOST_EFER) & 0x801 | EFER_LMA | EFER_LME);
    for field in [HOST_SYSENTER_ESP, HOST_SYSENTER_EIP, HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE] {
        state.set(field, canonical(state.get(field)));
    }
    for field in [HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_ES_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR] {
        state.clear(field, 7);
    }
    pat(state, HOST_PAT);
}

/// Makes every byte a memory type.
fn pat(state: &mut State, field: Field<u64>) {
    let mut bytes = state.get(field).to_le_bytes();
    for byte in &mut bytes {
        if !matches!(*byte, 0 | 1 | 4..=7) {
            *byte = 6;
        }
    }
    state.set(field, u64::from_le_bytes(bytes));
}

fn control_registers(state: &mut State, caps: &VmxCaps) {
    let free = if is_unrestricted(state) { CR0_PE | CR0_PG } else { 0 };
    let ia32e = is_ia32e(state);
    let mut cr0 = state.get(GUEST_CR0) & caps.cr0_fixed1 | caps.cr0_fixed0 & !free;
    let mut cr4 = state.get(GUEST_CR4) & caps.cr4_fixed1 | caps.cr4_fixed0;
    if ia32e {
        (cr0, cr4) = (cr0 | CR0_PG, cr4 | CR4_PAE);
    } else {
        cr4 &= !CR4_PCIDE;
    }
    if cr0 & CR0_PG != 0 {
        cr0 |= CR0_PE;
    }
    if cr0 & CR0_WP == 0 {
        cr4 &= !CR4_CET;
    }
    state.set(GUEST_CR0, cr0).set(GUEST_CR4, cr4);
    state.set(GUEST_CR3, state.get(GUEST_CR3) & ((1 << caps.physical_bits) - 1));
    let efer = state.get(GUEST_EFER) & 0x801;
    state.set(GUEST_EFER, efer | if ia32e { EFER_LMA | EFER_LME } else { 0 });
    for field in GUEST_PDPTES {
        state.set(field, state.get(field) & ((1 << caps.physical_bits) - 1) & !0x1e6);
    }
}

fn registers(state: &mut State) {
    state.set(GUEST_DEBUGCTL, state.get(GUEST_DEBUGCTL) & 3);
    state.set(GUEST_DR7, state.get(GUEST_DR7) & 0xffff_ffff);
    pat(state, GUEST_PAT);
    for field in [GUEST_SYSENTER_ESP, GUEST_SYSENTER_EIP, GUEST_GDTR_BASE, GUEST_IDTR_BASE] {
        state.set(field, canonical(state.get(field)));
    }
    for field in [GUEST_GDTR_LIMIT, GUEST_IDTR_LIMIT] {
        state.set(field, state.get(field) & 0xffff);
    }
    let rip = state.get(GUEST_RIP);
    let is_64_bit = is_ia32e(state) && state.has(GUEST_CS_ACCESS_RIGHTS, 1 << 13);
    state.set(GUEST_RIP, if is_64_bit { canonical(rip) } else { rip & 0xffff_ffff });
    let rflags = state.get(GUEST_RFLAGS) & 0x3f_7fd7 | 2;
    let no_virtual_8086 = is_ia32e(state) || !state.has(GUEST_CR0, CR0_PE);
    state.set(GUEST_RFLAGS, if no_virtual_8086 { rflags & !RFLAGS_VM } else { rflags });
}

/// Makes G what the limit asks for.
fn granularity(limit: u64, rights: u64) -> u64 {
    const G: u64 = 1 << 15;
    match (limit & 0xfff, limit >> 20) {
        (_, 1..) => rights | G,
        (0xfff, _) => rights,
        _ => rights & !G,
    }
}

/// SDM 27.3.1.2 "Checks on Guest Segment Registers".
fn segments(state: &mut State) {
    const CODE_OR_DATA: u64 = 1 << 4;
    const PRESENT: u64 = 1 << 7;
    const DEFINED: u64 = 0x1_f0ff;
    for segment in SYSTEM_SEGMENTS {
        let rights = state.get(segment.access_rights) & DEFINED & !CODE_OR_DATA | PRESENT;
        state.set(segment.access_rights, granularity(state.get(segment.limit), rights));
        let base = canonical(state.get(segment.base));
        state.clear(segment.selector, 4).set(segment.base, base);
    }
    let tr = state.get(GUEST_TR_ACCESS_RIGHTS) & !(UNUSABLE | 0xf);
    state.set(GUEST_TR_ACCESS_RIGHTS, tr | 0xb);
    let ldtr = state.get(GUEST_LDTR_ACCESS_RIGHTS) & !0xf;
    state.set(GUEST_LDTR_ACCESS_RIGHTS, ldtr | 2);
    if state.has(GUEST_RFLAGS, RFLAGS_VM) {
        for segment in GUEST_SEGMENTS {
            state.set(segment.base, state.get(segment.selector) << 4);
            state.set(segment.limit, 0xffff).set(segment.access_rights, 0xf3);
        }
        return;
    }
    for segment in GUEST_SEGMENTS {
        let rights = state.get(segment.access_rights);
        if rights & UNUSABLE == 0 || segment.access_rights.id() == GUEST_CS_ACCESS_RIGHTS.id() {
            let rights = rights & DEFINED & !UNUSABLE | CODE_OR_DATA | PRESENT | 1;
            state.set(segment.access_rights, granularity(state.get(segment.limit), rights));
        }
    }
    for field in [GUEST_FS_BASE, GUEST_GS_BASE] {
        state.set(field, canonical(state.get(field)));
    }
    for field in [GUEST_CS_BASE, GUEST_SS_BASE, GUEST_DS_BASE, GUEST_ES_BASE] {
        state.set(field, state.get(field) & 0xffff_ffff);
    }
    privilege(state);
}

fn privilege(state: &mut State) {
    const DPL: u64 = 3 << 5;
    const TYPE: u64 = 0xf;
    const LONG: u64 = 1 << 13;
    const DEFAULT_32: u64 = 1 << 14;
    let unrestricted = is_unrestricted(state);
    let mut code = state.get(GUEST_CS_ACCESS_RIGHTS);
    if code & 8 == 0 && !(unrestricted && code & TYPE == 3) {
        code = code & !TYPE | 0xb;
    }
    if is_ia32e(state) && code & LONG != 0 {
        code &= !DEFAULT_32;
    }
    let mut stack = state.get(GUEST_SS_ACCESS_RIGHTS);
    if stack & 8 != 0 || stack & 2 == 0 {
        stack = stack & !TYPE | 3;
    }
    let rpl = state.get(GUEST_CS_SELECTOR) & 3;
    if code & TYPE == 3 || !state.has(GUEST_CR0, CR0_PE) {
        (code, stack) = (code & !DPL, stack & !DPL);
    } else {
        stack = stack & !DPL | rpl << 5;
        state.set(GUEST_SS_SELECTOR, state.get(GUEST_SS_SELECTOR) & !3 | rpl);
        let conforming = code & 4 != 0;
        code = code & !DPL | if conforming { 0 } else { rpl << 5 };
    }
    state.set(GUEST_CS_ACCESS_RIGHTS, code).set(GUEST_SS_ACCESS_RIGHTS, stack);
    for segment in [3, 0, 4, 5].map(|number| GUEST_SEGMENTS[number]) {
        let rights = state.get(segment.access_rights);
        // Code that cannot be read is no data segment.
        let rights = if rights & 8 != 0 { rights | 2 } else { rights };
        let rpl = state.get(segment.selector) & 3;
        let dpl = rights >> 5 & 3;
        let raised = if !unrestricted && rights & TYPE <= 0xb && dpl < rpl { rights | rpl << 5 } else { rights };
        state.set(segment.access_rights, raised);
    }
}

/// The injected event (SDM 27.2.1.3).
fn events(state: &mut State) {
    const VALID: u64 = 1 << 31;
    const ERROR_CODE: u64 = 1 << 11;
    let info = state.get(ENTRY_INTERRUPTION_INFO) & 0x8000_0fff;
    let (kind, vector) = (info >> 8 & 7, info & 0xff);
    let protected = state.has(GUEST_CR0, CR0_PE);
    let (vector, code) = match kind {
        2 => (2, false),
        3 if protected => (vector & 0x1f, matches!(vector & 0x1f, 8 | 10..=14 | 17)),
        3 => (vector & 0x1f, false),
        7 => (0, false),
        _ => (vector, false),
    };
    let kind = if kind == 1 { 0 } else { kind };
    let info = info & VALID | kind << 8 | vector | if code { ERROR_CODE } else { 0 };
    state.set(ENTRY_INTERRUPTION_INFO, info);
    state.set(ENTRY_EXCEPTION_ERROR_CODE, state.get(ENTRY_EXCEPTION_ERROR_CODE) & 0x7fff);
    let length = state.get(ENTRY_INSTRUCTION_LENGTH) & 0xf;
    state.set(ENTRY_INSTRUCTION_LENGTH, length.max(1));
    if info & VALID != 0 && kind == 0 {
        state.or(GUEST_RFLAGS, RFLAGS_IF);
    }
}

/// SDM 27.3.1.5 "Checks on Guest Non-Register State".
fn non_register(state: &mut State) {
    const STI: u64 = 1;
    const MOV_SS: u64 = 2;
    const NMI: u64 = 8;
    const ACTIVE: u64 = 0;
    const HLT: u64 = 1;
    let info = state.get(ENTRY_INTERRUPTION_INFO);
    let injected = (info >> 31 != 0).then_some(info >> 8 & 7);
    let mut blocking = state.get(GUEST_INTERRUPTIBILITY) & (STI | MOV_SS | NMI);
    if !state.has(GUEST_RFLAGS, RFLAGS_IF) || blocking & MOV_SS != 0 {
        blocking &= !STI;
    }
    match injected {
        Some(0) => blocking &= !(STI | MOV_SS),
        Some(2) => blocking &= !(STI | MOV_SS | NMI),
        _ => (),
    }
    let mut activity = state.get(GUEST_ACTIVITY_STATE);
    let is_user = state.get(GUEST_SS_ACCESS_RIGHTS) >> 5 & 3 != 0;
    let wakes = matches!((injected, info & 0xff), (None | Some(0 | 2 | 7), _) | (Some(3), 1 | 18));
    if activity > HLT || is_user || !wakes || blocking & (STI | MOV_SS) != 0 {
        activity = ACTIVE;
    }
    let mut pending = state.get(GUEST_PENDING_DEBUG) & 0x500f;
    if blocking & (STI | MOV_SS) != 0 || activity == HLT {
        let steps = state.has(GUEST_RFLAGS, RFLAGS_TF) && !state.has(GUEST_DEBUGCTL, 2);
        pending = pending & !0x4000 | if steps { 0x4000 } else { 0 };
    }
    state.set(GUEST_INTERRUPTIBILITY, blocking).set(GUEST_ACTIVITY_STATE, activity).set(GUEST_PENDING_DEBUG, pending);
}

/// Whether an entry with this state does not end in wait-for-SIPI, which nothing on one processor ends.
pub fn never_waits_for_sipi(state: &State) -> bool {
    state.get(GUEST_ACTIVITY_STATE) != 3 && !state.has(ENTRY_CONTROLS, EntryControls::ENTRY_TO_SMM.bits().into())
}
