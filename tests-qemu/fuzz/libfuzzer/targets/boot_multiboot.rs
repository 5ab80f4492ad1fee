//! See `fuzz::boot::multiboot`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::boot::multiboot(bytes));
