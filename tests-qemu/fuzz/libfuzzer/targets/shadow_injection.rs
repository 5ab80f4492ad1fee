//! See `fuzz::shadow::injection`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::injection(bytes));
