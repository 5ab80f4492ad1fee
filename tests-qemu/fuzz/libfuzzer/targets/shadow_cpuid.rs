//! See `fuzz::shadow::cpuid`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::cpuid(bytes));
