//! The instructions, each as a function. All of them may exit. None accesses memory that Rust knows of.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

use guest_abi::mark::SIGNATURE;
use guest_abi::payload::CHAIN_LENGTH;

/// The time-stamp counter after all earlier instructions have completed and before any later one has begun (SDM volume
/// 2B, "RDTSC").
///
/// The LFENCE before RDTSC waits as RDTSCP would. LFENCE needs no feature, and makes KVM switch no IA32_TSC_AUX.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.TSD is clear; the fences have no effect that Rust knows of.
    unsafe { asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Multiplies, [`CHAIN_LENGTH`] times.
#[inline(always)]
pub fn multiply() {
    // SAFETY: the instructions change one register only.
    unsafe {
        asm!(".rept {}", "imul {1}, {1}", ".endr", const CHAIN_LENGTH, inout(reg) 3_u64 => _, options(nomem, nostack))
    };
}

/// `EAX` of a CPUID subleaf.
#[inline(always)]
pub fn cpuid(leaf: u32, subleaf: u32) -> u32 {
    __cpuid_count(leaf, subleaf).eax
}

/// KVM's hypercall `number` with one argument.
#[inline(always)]
pub fn vmcall(number: u64, argument: u64) -> u64 {
    let reply;
    // SAFETY: by KVM's convention RAX is the reply, RBX the argument, and no other register changes.
    unsafe {
        asm!(
            "xchg {argument}, rbx", "vmcall", "xchg {argument}, rbx",
            argument = inout(reg) argument => _, inlateout("rax") number => reply, options(nostack)
        );
    }
    reply
}

/// Reads an MSR.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the callers name an MSR that the VMM's KVM knows.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
#[inline(always)]
pub fn wrmsr(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the callers name an MSR that KVM stores and that has no other effect.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nomem, nostack)) };
}

/// Writes a dword to a port.
#[inline(always)]
pub fn outl(port: u16, value: u32) {
    // SAFETY: the VMM's ports do not write the payload's memory. They read it, hence no `nomem`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

/// Reads a dword from a port.
#[inline(always)]
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `outl`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack)) };
    value
}

/// Writes a dword to a physical address that the VMM emulates.
#[inline(always)]
pub fn store(address: u64, value: u32) {
    // SAFETY: the address is identity-mapped and in no memory that Rust knows of.
    unsafe { asm!("mov dword ptr [{}], {:e}", in(reg) address, in(reg) value, options(nostack)) };
}

/// Reads a dword from a physical address outside the payload.
#[inline(always)]
pub fn load(address: u64) -> u32 {
    let value;
    // SAFETY: as for `store`.
    unsafe { asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) address, options(nostack)) };
    value
}

/// Loads CR3 with its present value.
#[inline(always)]
pub fn reload_cr3() {
    // SAFETY: the page tables stay the same.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags)) };
}

/// Makes our Bochs print its counters under the name in `words`.
#[inline(always)]
pub fn count(words: (u64, u64)) {
    // SAFETY: the instruction exchanges a register with itself; only the emulator uses the inputs.
    unsafe {
        asm!("xchg bx, bx", in("rcx") SIGNATURE, in("rax") words.0, in("rdx") words.1, options(nostack, preserves_flags));
    }
}

/// Stops the payload.
pub fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off, HLT ends the payload's work.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
