//! vmcs01 and vmcs02 before their first entry.

use boot::guest::GuestEntry;
use boot::stop::StopKind;
use ept::{Eptp01, Hpa};
use shadow::VmxCaps;
use shadow::caps::CapabilityWord;
use shadow::controls::{EntryControls, ExitControls, Pin, Primary, Secondary, VmFunctions};
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::registers::*;

use crate::arch::enter::GuestRegisters;
use crate::arch::host_state::PAT_AT_RESET;
use crate::stop::{StopReason, stop};
use shadow::nested::control_registers::Masks;
use shadow::nested::{MsrAreas, SHARED_VPID02, VPID01};

/// A control word with the bits that the host wants. The boot's checks name the controls that some machines are known
/// to lack; a stop here names any other control, or one whose field is missing.
fn choose<W: CapabilityWord>(caps: &VmxCaps, on: W, off: W) -> W {
    caps.choose(on, off).unwrap_or_else(|conflict| {
        let message =
            format_args!("this machine's VMX, {conflict}: use a processor, or a hypervisor below, that allows it");
        stop(StopReason::new(StopKind::NoVmxFeature, message))
    })
}

/// Controls of vmcs01: pass-through, and the exits that nesting needs.
pub fn controls01(vmcs01: &mut impl VmcsAccess, caps: &VmxCaps, ept01: Eptp01, msr_bitmap01: Hpa) {
    let wanted = Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST | Secondary::ENABLE_VPID;
    // Controls of instructions that cause #UD in a guest unless the control is 1. `shadow::cpuid` withholds the
    // instructions whose controls the processor lacks.
    let pass_through = Secondary::ENABLE_RDTSCP
        | Secondary::ENABLE_INVPCID
        | Secondary::ENABLE_XSAVES
        | Secondary::ENABLE_USER_WAIT_AND_PAUSE;
    let secondary = wanted | pass_through & Secondary::from_bits_retain(caps.secondary.may_be_1);
    let primary = Primary::USE_MSR_BITMAPS | Primary::ACTIVATE_SECONDARY;
    // Exits that a processor causes by default, for compatibility with the first generation. A processor without the
    // TRUE capability MSRs always causes them.
    let cr3_exits = Primary::CR3_LOAD_EXITING | Primary::CR3_STORE_EXITING;
    let cr3_exits = cr3_exits - Primary::from_bits_retain(caps.primary.must_be_1);
    vmcs01.write(PIN_CONTROLS, choose(caps, Pin::empty(), Pin::empty()));
    vmcs01.write(PRIMARY_CONTROLS, choose(caps, primary, cr3_exits));
    vmcs01.write(SECONDARY_CONTROLS, choose(caps, secondary, Secondary::empty()));
    vmcs01.write(EXIT_CONTROLS, choose(caps, ExitControls::FORCED, ExitControls::empty()));
    vmcs01.write(ENTRY_CONTROLS, choose(caps, EntryControls::FORCED, EntryControls::empty()));
    vmcs01.write(VMCS_LINK_POINTER, u64::MAX);
    vmcs01.write(EPT_POINTER, ept01.bits());
    vmcs01.write(MSR_BITMAP, msr_bitmap01.0);
    vmcs01.write(VPID, VPID01);
    if caps.has_secondary(Secondary::ENABLE_XSAVES) {
        vmcs01.write(XSS_EXITING_BITMAP, 0);
    }
}

/// What of vmcs02 no merge writes.
///
/// Its VM-entry MSR-load area is for `entry_load_count` entries from the beginning, its VM-exit MSR-load area for those
/// of `exit_load` for ever.
pub fn constants02(
    vmcs02: &mut impl VmcsAccess,
    caps: &VmxCaps,
    ept01: Eptp01,
    msr_bitmap02: Hpa,
    areas: &MsrAreas,
    exit_load: (Hpa, u32),
) {
    vmcs02.write(VMCS_LINK_POINTER, u64::MAX);
    vmcs02.write(EPT_POINTER, ept01.bits());
    vmcs02.write(MSR_BITMAP, msr_bitmap02.0);
    vmcs02.write(VPID, SHARED_VPID02);
    vmcs02.write(ENTRY_MSR_LOAD_ADDRESS, areas.entry_load.address.0);
    vmcs02.write(ENTRY_MSR_LOAD_COUNT, areas.entry_load_count);
    vmcs02.write(EXIT_MSR_LOAD_ADDRESS, exit_load.0.0);
    vmcs02.write(EXIT_MSR_LOAD_COUNT, exit_load.1);
    // The host does what VMCS12's areas ask for when it reflects an exit.
    vmcs02.write(EXIT_MSR_STORE_COUNT, 0);
    if caps.has_secondary(Secondary::ENABLE_VM_FUNCTIONS) {
        vmcs02.write(VM_FUNCTION_CONTROLS, VmFunctions::empty());
    }
}

/// Writes the state that does not depend on how a processor begins: the values after power-up.
pub fn power_up01(vmcs01: &mut impl VmcsAccess, masks: Masks) {
    FORCED_CR0.set_mask(vmcs01, CR0_ET, masks.cr0);
    FORCED_CR4.set_mask(vmcs01, 0, masks.cr4);
    vmcs01.write(GUEST_PAT, PAT_AT_RESET);
    vmcs01.write(GUEST_DR7, 0x400);
    vmcs01.write(GUEST_RFLAGS, 2);
}

/// Writes the guest hypervisor's initial state on the boot processor: flat segments, interrupts off.
pub fn guest_state01(vmcs01: &mut impl VmcsAccess, registers: &mut GuestRegisters, entry: GuestEntry, masks: Masks) {
    let (cr0, cr3, cr4, efer, code) = match entry {
        GuestEntry::Linux64 { cr3, .. } => {
            (CR0_PE | CR0_ET | CR0_NE | CR0_PG, cr3.0, CR4_PAE, EFER_LME | EFER_LMA, access_rights::CODE_64)
        }
        GuestEntry::Protected32 { .. } => (CR0_PE | CR0_ET, 0, 0, 0, access_rights::CODE_32),
    };
    FORCED_CR0.show(vmcs01, cr0, masks.cr0);
    vmcs01.write(GUEST_CR3, cr3);
    FORCED_CR4.show(vmcs01, cr4, masks.cr4);
    vmcs01.write(GUEST_EFER, efer);
    if efer != 0 {
        let entry_controls = vmcs01.read(ENTRY_CONTROLS) | EntryControls::IA32E_MODE_GUEST;
        vmcs01.write(ENTRY_CONTROLS, entry_controls);
    }
    segments(vmcs01, code);
    match entry {
        GuestEntry::Linux64 { gdt_base, gdt_limit, rip, rsi, rsp, .. } => {
            vmcs01.write(GUEST_GDTR_BASE, gdt_base.0);
            vmcs01.write(GUEST_GDTR_LIMIT, gdt_limit.into());
            vmcs01.write(GUEST_RIP, rip);
            vmcs01.write(GUEST_RSP, rsp);
            registers[RSI] = rsi;
        }
        GuestEntry::Protected32 { rip, eax, ebx, esp } => {
            vmcs01.write(GUEST_RIP, rip.into());
            vmcs01.write(GUEST_RSP, esp.into());
            registers[RAX] = eax.into();
            registers[RBX] = ebx.into();
        }
    }
}

/// Writes the segments: __BOOT_CS and __BOOT_DS of the Linux boot protocol. Multiboot does not specify the selectors.
fn segments(vmcs01: &mut impl VmcsAccess, code: u32) {
    const BOOT_CS: u16 = 0x10;
    const BOOT_DS: u16 = 0x18;
    let mut set = |segment: &SegmentFields, selector, limit, rights| {
        vmcs01.write(segment.selector, selector);
        vmcs01.write(segment.limit, limit);
        vmcs01.write(segment.access_rights, rights);
    };
    for segment in &GUEST_SEGMENTS {
        set(segment, BOOT_DS, u32::MAX, access_rights::DATA);
    }
    set(&GUEST_SEGMENTS[CS], BOOT_CS, u32::MAX, code);
    set(&GUEST_TR, 0, 0xffff, access_rights::BUSY_TSS);
    set(&GUEST_LDTR, 0, 0xffff, access_rights::UNUSABLE);
}

/// Writes the address of vmcs01's VM-entry MSR-load area, which is used once it has entries.
pub fn load_area01(vmcs01: &mut impl VmcsAccess, address: Hpa) {
    vmcs01.write(ENTRY_MSR_LOAD_ADDRESS, address.0);
    vmcs01.write(ENTRY_MSR_LOAD_COUNT, 0);
}

/// The I/O bitmaps, where the host looks at ports.
pub fn io_bitmaps01(vmcs01: &mut impl VmcsAccess, [a, b]: [Hpa; 2]) {
    vmcs01.write(IO_BITMAP_A, a.0);
    vmcs01.write(IO_BITMAP_B, b.0);
    vmcs01.write(PRIMARY_CONTROLS, vmcs01.read(PRIMARY_CONTROLS) | Primary::USE_IO_BITMAPS);
}

/// The VMREAD and VMWRITE bitmaps, for when VMCS shadowing is on.
pub fn bitmaps01(vmcs01: &mut impl VmcsAccess, caps: &VmxCaps, [vmread, vmwrite]: [Hpa; 2]) {
    if caps.has_secondary(Secondary::VMCS_SHADOWING) {
        vmcs01.write(VMREAD_BITMAP, vmread.0);
        vmcs01.write(VMWRITE_BITMAP, vmwrite.0);
    }
}
