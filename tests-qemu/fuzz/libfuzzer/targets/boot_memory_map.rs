//! See `fuzz::boot::memory_map`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::boot::memory_map(bytes));
