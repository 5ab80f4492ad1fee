//! Two instructions that the standard library marks unsafe or hides.
#![allow(unsafe_code, reason = "RDTSC")]

use std::arch::x86_64::{__cpuid_count, _rdtsc};

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
