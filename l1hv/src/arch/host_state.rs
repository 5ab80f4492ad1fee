//! The host-state area of a VMCS: the state that a VM exit loads.

use core::arch::x86_64::__cpuid;

use shadow::fields::*;
use x86_64::registers::control::{Cr0, Cr3, Cr4, Cr4Flags, Efer};

use super::enter::{GuestRegisters, exit_address};
use super::gdt::HostSegments;
use super::vmx::CurrentVmcs;

/// The PAT at reset: the host's pages use only its first entry, write-back.
pub const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;

/// Writes the whole area, from the present state of this processor.
///
/// # Safety
///
/// [`super::on_behalf::run_guest`] gets these registers, at this address, whenever it runs the guest of this VMCS.
pub unsafe fn write(vmcs: &mut CurrentVmcs, segments: &HostSegments, registers: &GuestRegisters) {
    let xsave = __cpuid(1).ecx & 1 << 26 != 0;
    // The host executes XSETBV on the guest's behalf, which needs OSXSAVE.
    let osxsave = if xsave { Cr4Flags::OSXSAVE.bits() } else { 0 };
    let (table, flags) = Cr3::read_raw();
    let cr3 = table.start_address().as_u64() | u64::from(flags);
    let HostSegments { cs, data, tr, .. } = *segments;
    let selectors = [
        (HOST_CS_SELECTOR, cs),
        (HOST_SS_SELECTOR, data),
        (HOST_DS_SELECTOR, data),
        (HOST_ES_SELECTOR, data),
        (HOST_FS_SELECTOR, 0),
        (HOST_GS_SELECTOR, 0),
        (HOST_TR_SELECTOR, tr),
    ];
    let words = [
        (HOST_CR0, Cr0::read_raw()),
        (HOST_CR3, cr3),
        (HOST_CR4, Cr4::read_raw() | osxsave),
        (HOST_FS_BASE, 0),
        (HOST_GS_BASE, segments.gs_base),
        (HOST_TR_BASE, segments.tr_base),
        (HOST_GDTR_BASE, segments.gdt_base),
        (HOST_IDTR_BASE, segments.idt_base),
        (HOST_SYSENTER_ESP, 0),
        (HOST_SYSENTER_EIP, 0),
        (HOST_RSP, registers.exit_stack()),
        (HOST_RIP, exit_address()),
        (HOST_EFER, Efer::read_raw()),
        (HOST_PAT, PAT_AT_RESET),
    ];
    // SAFETY: the control registers, tables and bases are those that the host uses now; RSP and RIP lead to `vm_exit`
    // with the registers that the caller promises.
    unsafe {
        selectors.into_iter().for_each(|(field, selector)| vmcs.set_host_state(field, selector));
        words.into_iter().for_each(|(field, word)| vmcs.set_host_state(field, word));
        vmcs.set_host_state(HOST_SYSENTER_CS, 0);
    }
}
