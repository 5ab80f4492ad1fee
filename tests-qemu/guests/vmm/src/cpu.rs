//! Instructions that the standard library marks unsafe or hides.
#![allow(unsafe_code, reason = "RDTSC and the emulator's mark")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _rdtsc};

use guest_abi::mark;
use protocol::statistics;

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: Linux leaves CR4.TSD clear for its processes; RDTSC has no other effect.
    unsafe { _rdtsc() }
}

/// CPUID leaves: features, those of hypervisors, the highest extended one, the brand string.
const FEATURES: u32 = 1;
const HYPERVISOR: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;
const BRAND: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// CPUID.1:ECX: a hypervisor is present.
const IS_HYPERVISOR_PRESENT: u32 = 1 << 31;

/// The processor's name.
pub fn brand() -> String {
    if __cpuid_count(EXTENDED, 0).eax < *BRAND.end() {
        return "unknown".to_owned();
    }
    text(BRAND.map(|leaf| __cpuid_count(leaf, 0)).flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]))
}

/// The signature of the hypervisor below, if it shows one.
pub fn hypervisor() -> Option<String> {
    let is_present = __cpuid_count(FEATURES, 0).ecx & IS_HYPERVISOR_PRESENT != 0;
    let leaf = is_present.then(|| __cpuid_count(HYPERVISOR, 0))?;
    Some(text([leaf.ebx, leaf.ecx, leaf.edx].into_iter()))
}

/// The characters that registers hold.
fn text(registers: impl Iterator<Item = u32>) -> String {
    let bytes: Vec<u8> = registers.flat_map(u32::to_le_bytes).filter(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// Makes l1hv write its statistics to its log; on other machines this is a CPUID of an unknown leaf.
pub fn request_host_stats() {
    __cpuid_count(statistics::LEAF, statistics::SUBLEAF);
}

/// Makes our Bochs print its counters under the first 16 characters of `name`; on other machines this has no effect.
pub fn count(name: &str) {
    let (low, high) = mark::words(name.as_bytes());
    // SAFETY: the instruction exchanges a register with itself; only the emulator uses the inputs.
    unsafe {
        asm!("xchg bx, bx", in("rcx") mark::SIGNATURE, in("rax") low, in("rdx") high, options(nomem, nostack, preserves_flags));
    }
}
