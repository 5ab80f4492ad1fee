//! The VMCS that every case starts from: a 64-bit nested guest with EPT as an unrestricted guest, and a guard against
//! hangs.

use shadow::Field;
use shadow::controls::{Allowed, EntryControls, ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;

use super::enter::{CR0, CR4, exit_point};
use crate::cpu::{self, rdmsr};
use crate::memory::*;
use crate::nested_paging;

const EFER_LME_LMA_NXE: u64 = 0xd00;
const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;
/// Ticks of the VMX-preemption timer. No case takes longer.
const GUARD: u32 = 3_000_000;

fn set<T: FieldValue>(field: Field<T>, value: T) {
    let _ = cpu::vmwrite(field.id().encoding().0.into(), value.into_word());
}

/// A control word with the wanted bits that exist, from its TRUE capability MSR.
fn control<W: FieldValue>(msr: u32, wanted: W) -> W {
    let allowed = Allowed::from_msr(rdmsr(msr).unwrap_or(0));
    W::from_word(wanted.into_word() & u64::from(allowed.may_be_1) | u64::from(allowed.must_be_1))
}

/// Writes the whole VMCS.
pub fn write(code: u64) {
    controls();
    addresses();
    host();
    guest(code);
    // The case before has left translations of this VPID.
    const ALL_CONTEXTS: u64 = 2;
    let _ = cpu::invvpid(ALL_CONTEXTS, [0; 2]);
}

/// With VPID, virtual NMIs and an exit that loads all that it can, as hypervisors have it.
fn controls() {
    let pin = Pin::ACTIVATE_PREEMPTION_TIMER | Pin::NMI_EXITING | Pin::VIRTUAL_NMIS;
    let primary = Primary::ACTIVATE_SECONDARY | Primary::USE_MSR_BITMAPS;
    let secondary = Secondary::ENABLE_EPT
        | Secondary::ENABLE_VPID
        | Secondary::UNRESTRICTED_GUEST
        | Secondary::ENABLE_RDTSCP
        | Secondary::ENABLE_INVPCID
        | Secondary::ENABLE_XSAVES;
    let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE
        | ExitControls::SAVE_EFER
        | ExitControls::LOAD_EFER
        | ExitControls::SAVE_PAT
        | ExitControls::LOAD_PAT;
    let entry = EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_EFER | EntryControls::LOAD_PAT;
    set(PIN_CONTROLS, control(0x48d, pin));
    set(PRIMARY_CONTROLS, control(0x48e, primary));
    set(SECONDARY_CONTROLS, control(0x48b, secondary));
    set(EXIT_CONTROLS, control(0x48f, exit));
    set(ENTRY_CONTROLS, control(0x490, entry));
    set(PREEMPTION_TIMER_VALUE, GUARD);
    set(EXCEPTION_BITMAP, u32::MAX);
    set(TSC_MULTIPLIER, 1 << 48);
}

/// Valid addresses for every control that needs one.
fn addresses() {
    IO_BITMAPS.fill(0);
    MSR_BITMAPS.fill(0);
    MSR_AREAS.fill(0);
    VIRTUAL_APIC.fill(0);
    SPARE.fill(0);
    set(IO_BITMAP_A, IO_BITMAPS.address());
    set(IO_BITMAP_B, IO_BITMAPS.address() + 0x1000);
    set(MSR_BITMAP, MSR_BITMAPS.address());
    set(EXIT_MSR_STORE_ADDRESS, MSR_AREAS.address());
    set(EXIT_MSR_LOAD_ADDRESS, MSR_AREAS.address() + 0x400);
    set(ENTRY_MSR_LOAD_ADDRESS, MSR_AREAS.address() + 0x800);
    set(VIRTUAL_APIC_ADDRESS, VIRTUAL_APIC.address());
    for field in [APIC_ACCESS_ADDRESS, PML_ADDRESS, VMREAD_BITMAP, VMWRITE_BITMAP, VIRTUALIZATION_EXCEPTION_INFO] {
        set(field, SPARE.address());
    }
    set(EPT_POINTER, nested_paging::reset());
    set(VPID, 1);
    set(VMCS_LINK_POINTER, u64::MAX);
}

/// The host state of this processor.
pub fn host() {
    set(HOST_CR0, CR0);
    set(HOST_CR3, host_cr3());
    set(HOST_CR4, CR4);
    set(HOST_EFER, EFER_LME_LMA_NXE);
    set(HOST_PAT, PAT_AT_RESET);
    set(HOST_CS_SELECTOR, CODE);
    for field in [HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_ES_SELECTOR] {
        set(field, DATA);
    }
    set(HOST_TR_SELECTOR, HOST_TSS);
    set(HOST_TR_BASE, HOST_TSS_AREA.address());
    set(HOST_GDTR_BASE, gdt_table().address());
    set(HOST_IDTR_BASE, HOST_IDT.address());
    set(HOST_RIP, exit_point());
}

fn guest(code: u64) {
    set(GUEST_CR0, CR0);
    set(GUEST_CR3, nested_paging::guest_cr3());
    set(GUEST_CR4, CR4);
    set(GUEST_EFER, EFER_LME_LMA_NXE);
    set(GUEST_PAT, PAT_AT_RESET);
    set(GUEST_DR7, 0x400);
    set(GUEST_RFLAGS, 2);
    set(GUEST_RSP, guest_stack());
    set(GUEST_RIP, code);
    set(GUEST_GDTR_BASE, gdt_table().address());
    set(GUEST_GDTR_LIMIT, 0x5f);
    set(GUEST_IDTR_BASE, GUEST_IDT.address());
    set(GUEST_IDTR_LIMIT, 0xfff);
    segments();
}

fn segments() {
    const CODE_64: u32 = 0xa09b;
    const DATA_32: u32 = 0xc093;
    const BUSY_TSS: u32 = 0x8b;
    const UNUSABLE: u32 = 1 << 16;
    set(GUEST_CS_SELECTOR, CODE);
    set(GUEST_CS_ACCESS_RIGHTS, CODE_64);
    set(GUEST_CS_LIMIT, u32::MAX);
    let data = [
        (GUEST_SS_SELECTOR, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
        (GUEST_DS_SELECTOR, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS),
        (GUEST_ES_SELECTOR, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS),
        (GUEST_FS_SELECTOR, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS),
        (GUEST_GS_SELECTOR, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
    ];
    for (selector, limit, rights) in data {
        set(selector, DATA);
        set(limit, u32::MAX);
        set(rights, DATA_32);
    }
    set(GUEST_TR_SELECTOR, GUEST_TSS);
    set(GUEST_TR_BASE, GUEST_TSS_AREA.address());
    set(GUEST_TR_LIMIT, 0x67);
    set(GUEST_TR_ACCESS_RIGHTS, BUSY_TSS);
    set(GUEST_LDTR_ACCESS_RIGHTS, UNUSABLE);
}
