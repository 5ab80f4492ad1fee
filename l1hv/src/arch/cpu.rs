//! The few processor instructions that are neither VMX, MSR nor port accesses.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};

use boot::machine::VmxSupport;
use shadow::mitigations::Speculation;
use shadow::msr::{
    IA32_ARCH_CAPABILITIES, IA32_EFER, IA32_FEATURE_CONTROL, IA32_VMX_ENTRY_CTLS, IA32_VMX_EPT_VPID_CAP,
    IA32_VMX_EXIT_CTLS, IA32_VMX_PROCBASED_CTLS, IA32_VMX_PROCBASED_CTLS2,
};
use shadow::registers::{CR4_PKE, EFER_NXE};

use super::fixup::fallible;
use super::msr::{self, GpFault};

/// Halts with interrupts off, again after each NMI, for ever.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: halting has no effect on memory, and nothing after it runs but the loop.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Sets an extended control register, or says that the processor refused the value.
///
/// # Safety
///
/// CR4.OSXSAVE is set. The host itself uses no extended state, so any value that the processor accepts is fine.
pub unsafe fn try_xsetbv(register: u32, value: u64) -> Result<(), GpFault> {
    let fault: u8;
    // SAFETY: the caller's promise; execution resumes after the instruction if it raises a general-protection
    // exception.
    unsafe {
        asm!(
            fallible!("xsetbv"),
            "setc {fault}",
            fault = out(reg_byte) fault,
            in("ecx") register,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack)
        );
    }
    if fault == 0 { Ok(()) } else { Err(GpFault) }
}

/// PKRU of a guest that has set CR4.PKE, so the processor has PKRU.
pub fn pkru() -> u32 {
    let pkru: u32;
    // SAFETY: RDPKRU needs CR4.PKE, which decides about user-mode pages only, and the host has none.
    unsafe {
        asm!(
            "mov {cr4}, cr4",
            "mov {with_pke}, {cr4}",
            "or {with_pke}, {pke}",
            "mov cr4, {with_pke}",
            "rdpkru",
            "mov cr4, {cr4}",
            cr4 = out(reg) _,
            with_pke = out(reg) _,
            pke = const CR4_PKE,
            out("eax") pkru,
            in("ecx") 0,
            out("edx") _,
            options(nomem, nostack)
        );
    }
    pkru
}

/// CR2: the address that caused the last page fault.
pub fn cr2() -> u64 {
    let value: u64;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reading the counter has no effect; CR4.TSD does not matter at CPL 0.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CPUID: EAX, EBX, ECX and EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = __cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// CPUID.07H.0: structured extended features; none on a processor without the leaf.
pub fn structured_features() -> [u32; 4] {
    if __cpuid(0).eax >= 7 { cpuid(7, 0) } else { [0; 4] }
}

/// What this processor says of its speculation.
pub fn speculation() -> Speculation {
    let [_, features_ebx, _, features_edx] = structured_features();
    let has_capabilities = features_edx & Speculation::ARCH_CAPABILITIES != 0;
    let arch_capabilities = if has_capabilities { msr::try_read(IA32_ARCH_CAPABILITIES).unwrap_or(0) } else { 0 };
    Speculation { features_ebx, features_edx, arch_capabilities }
}

/// Whether the firmware has put the processor into x2APIC mode for good: IA32_XAPIC_DISABLE_STATUS, if
/// IA32_ARCH_CAPABILITIES says that it exists.
pub fn is_locked_in_x2apic_mode() -> bool {
    const IA32_XAPIC_DISABLE_STATUS: u32 = 0xbd;
    const LEGACY_XAPIC_DISABLED: u64 = 1 << 0;
    const HAS_STATUS: u64 = 1 << 21;
    let has_status = speculation().arch_capabilities & HAS_STATUS != 0;
    has_status && msr::try_read(IA32_XAPIC_DISABLE_STATUS).is_some_and(|status| status & LEGACY_XAPIC_DISABLED != 0)
}

/// Whether the processor maps 1 GiB pages: `CPUID.80000001H:EDX[26]`.
pub fn has_1gib_pages() -> bool {
    __cpuid(0x8000_0001).edx & 1 << 26 != 0
}

/// This processor's APIC id: from the extended topology leaf, or from leaf 1 in a processor without it.
pub fn apic_id() -> u32 {
    const TOPOLOGY: u32 = 0xb;
    let has_topology = __cpuid(0).eax >= TOPOLOGY && __cpuid(TOPOLOGY).ebx != 0;
    if has_topology { __cpuid(TOPOLOGY).edx } else { __cpuid(1).ebx >> 24 }
}

/// Whether the processor says that it is one of several: CPUID.01H:EDX\[28\] and EBX\[23:16\].
pub fn is_one_of_several() -> bool {
    let answer = __cpuid(1);
    answer.edx >> 28 & 1 != 0 && answer.ebx >> 16 & 0xff > 1
}

/// Reads what [`VmxSupport::check`] needs to know.
pub fn vmx_support() -> VmxSupport {
    let vmx = __cpuid(1).ecx & 1 << 5 != 0;
    // Without VMX none of its MSRs exists, and some emulators answer an absent MSR with 0 instead of a fault.
    let vmx_msr = |number| if vmx { msr::try_read(number).unwrap_or(0) } else { 0 };
    VmxSupport {
        vmx,
        execute_disable: msr::try_read(IA32_EFER).unwrap_or(0) & EFER_NXE != 0,
        feature_control: vmx_msr(IA32_FEATURE_CONTROL),
        primary_controls: vmx_msr(IA32_VMX_PROCBASED_CTLS),
        exit_controls: vmx_msr(IA32_VMX_EXIT_CTLS),
        entry_controls: vmx_msr(IA32_VMX_ENTRY_CTLS),
        secondary_controls: vmx_msr(IA32_VMX_PROCBASED_CTLS2),
        ept_vpid: vmx_msr(IA32_VMX_EPT_VPID_CAP),
    }
}

/// Writes IA32_FEATURE_CONTROL, which the firmware left unlocked: `value` enables VMX outside SMX and locks the MSR.
pub fn lock_feature_control(value: u64) -> Result<(), GpFault> {
    // SAFETY: the register enables VMX and changes nothing that runs now.
    unsafe { msr::try_write(IA32_FEATURE_CONTROL, value) }
}
