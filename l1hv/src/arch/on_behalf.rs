//! Instructions that the host executes on a guest's behalf.
//!
//! They are safe to call: they change only state that the host does not use. The host runs with interrupts off, on page
//! tables, descriptor tables and an EFER that every VM exit restores, and uses no extended state, no debug register and
//! no performance counter.

use core::arch::asm;
use core::arch::x86_64::__cpuid;
use core::num::NonZeroU32;

use shadow::caps::usable_physical_bits;
use shadow::msr::{CLEARED_AT_START, IA32_TME_ACTIVATE};
use shadow::{FieldSet, VmxCaps};

use crate::mem::HostPages;

use super::enter::{GuestRegisters, REQUESTED, enter};
use super::msr::{self, GpFault};
use super::{cpu, vmx};

/// The result of [`enter`] if the guest did not run. It stays the word that [`enter`] returns, so that it costs no
/// further test if the guest ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotEntered(NonZeroU32);

impl NotEntered {
    /// Whether requests must be handled first. Otherwise the processor refused the current VMCS with VMfail.
    pub const fn is_requested(self) -> bool {
        self.0.get() == REQUESTED
    }
}

/// Runs the guest of the current VMCS until its next exit.
#[inline(always)]
pub fn run_guest(registers: &mut GuestRegisters, vmcs: &vmx::Vmcss) -> Result<(), NotEntered> {
    // SAFETY: both VMCSs got their host state from `host_state::write`, whose caller has promised these registers, and
    // no other code can write to it. EPT01 and every EPT02 derived from it do not map the host's memory, which confines
    // the guest.
    match NonZeroU32::new(unsafe { enter(registers, vmcs.is_launched()) }) {
        None => Ok(()),
        Some(how) => Err(NotEntered(how)),
    }
}

/// XSETBV for a guest hypervisor: its XCR0 is that of the machine.
pub fn xsetbv(register: u32, value: u64) -> Result<(), GpFault> {
    // SAFETY: the host state sets CR4.OSXSAVE if the processor has XSAVE, and without XSAVE no XSETBV exits.
    unsafe { cpu::try_xsetbv(register, value) }
}

/// WRMSR for a guest. The caller has kept back or changed what `shadow::msr::held` lists.
pub fn wrmsr(number: u32, value: u64) -> Result<(), GpFault> {
    // SAFETY: the list has the MSRs that reach memory past EPT, and those that change how the host runs. Every exit
    // restores the others that the host relies on, EFER, FS_BASE, GS_BASE and SYSENTER_*, from the host state.
    unsafe { msr::try_write(number, value) }
}

/// Ends what the firmware may have left on: recording of branches and events by the processor.
pub fn stop_tracing() {
    for number in CLEARED_AT_START {
        if let Some(value) = msr::try_read(number)
            && value != 0
        {
            log::info!("MSR {number:#x}: the firmware left {value:#x} in it: cleared");
            // SAFETY: nothing here asks for what the MSR makes the processor do.
            _ = unsafe { msr::try_write(number, 0) };
        }
    }
}

/// IN for a guest, of one, two or four bytes.
pub fn port_in(port: u16, bytes: u8) -> u32 {
    let mut value = 0_u32;
    // SAFETY: the port is the guest's, who could read it without the host but for one register.
    unsafe {
        match bytes {
            1 => asm!("in al, dx", in("dx") port, inout("eax") value, options(nostack, preserves_flags)),
            2 => asm!("in ax, dx", in("dx") port, inout("eax") value, options(nostack, preserves_flags)),
            _ => asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)),
        }
    }
    value
}

/// OUT for a guest, of one, two or four bytes. The caller has made sure that the machine does not sleep.
pub fn port_out(port: u16, bytes: u8, value: u32) {
    // SAFETY: as for `port_in`; a device's effects are the guest's, as without the host.
    unsafe {
        match bytes {
            1 => asm!("out dx, al", in("dx") port, in("eax") value, options(nostack, preserves_flags)),
            2 => asm!("out dx, ax", in("dx") port, in("eax") value, options(nostack, preserves_flags)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)),
        }
    }
}

/// WBINVD.
pub fn write_back_caches() {
    // SAFETY: WBINVD changes no data.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}

/// Sets CR2, for which the VMCS has no field. The host has no page faults, so it needs no CR2 of its own.
pub fn set_cr2(address: u64) {
    // SAFETY: CR2 only informs page-fault handlers.
    unsafe { asm!("mov cr2, {}", in(reg) address, options(nomem, nostack, preserves_flags)) };
}

/// Sets DR6.BT, for which the VMCS has no field. The host uses no debug registers.
pub fn note_task_switch_trap() {
    const BT: u64 = 1 << 15;
    // SAFETY: DR6 only informs #DB handlers.
    unsafe {
        asm!("mov {0}, dr6", "or {0}, {1:r}", "mov dr6, {0}", out(reg) _, in(reg) BT, options(nomem, nostack));
    }
}

/// Enters VMX operation with two VMCSs. The regions are pages of zeros.
pub fn start_vmx(vmxon: HostPages, vmcs01: HostPages, vmcs02: HostPages, revision: u32, caps: &VmxCaps) -> vmx::Vmcss {
    // SAFETY: `host::check_processor` has found that the processor has VMX and that IA32_FEATURE_CONTROL allows it; the
    // pages are owned.
    unsafe {
        vmx::vmxon(vmxon.phys(), revision, caps.cr0_fixed0, caps.cr4_fixed0);
        vmx::Vmcss::new(vmcs01.phys(), vmcs02.phys(), revision)
    }
}

/// The VMCS fields that VMREAD knows. The regions are pages of zeros.
pub fn known_fields(vmxon: HostPages, vmcs: HostPages, caps: &VmxCaps) -> FieldSet {
    // SAFETY: as for `start_vmx`, before which no processor is in VMX operation.
    unsafe { vmx::known_fields(vmxon.phys(), vmcs.phys(), caps) }
}

/// The width of physical addresses that guests can have.
pub fn physical_address_bits() -> u32 {
    let [_, _, features, _] = cpu::structured_features();
    let has_encryption = features >> 13 & 1 != 0;
    let tme_activate = if has_encryption { msr::try_read(IA32_TME_ACTIVATE) } else { None };
    usable_physical_bits(__cpuid(0x8000_0008).eax & 0xff, tme_activate.unwrap_or(0))
}

/// The width of linear addresses that the processor supports: 57 with 5-level paging, `CPUID.07H:ECX[16]`.
pub fn linear_address_bits() -> u32 {
    let [_, _, features, _] = cpu::structured_features();
    if features >> 16 & 1 != 0 { 57 } else { 48 }
}

/// CPUID.01H:EAX: what RDX holds after a reset.
pub fn signature() -> u32 {
    __cpuid(1).eax
}
