//! Instructions that the standard library marks unsafe or hides.
#![allow(unsafe_code, reason = "RDTSC and the emulator's mark")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _rdtsc};

#[path = "../../mark.rs"]
mod mark;

/// l1hv's CPUID leaf and its statistics function, as in `tests-qemu/src/protocol.rs`.
const HYPERCALL_LEAF: u32 = 0x6c31_6876;
const HYPERCALL_STATS: u32 = 1;

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: Linux leaves CR4.TSD clear for its processes; RDTSC has no other effect.
    unsafe { _rdtsc() }
}

/// l1hv writes its statistics to its log; other machines answer like for every unknown leaf.
pub fn request_host_stats() {
    __cpuid_count(HYPERCALL_LEAF, HYPERCALL_STATS);
}

/// Our Bochs prints its counters under `name`, of which 16 characters count; other machines do nothing.
pub fn count(name: &str) {
    let (low, high) = mark::words(name.as_bytes());
    // SAFETY: exchanges a register with itself; the inputs mean something to the emulator alone.
    unsafe {
        asm!("xchg bx, bx", in("rcx") mark::SIGNATURE, in("rax") low, in("rdx") high, options(nomem, nostack, preserves_flags));
    }
}
