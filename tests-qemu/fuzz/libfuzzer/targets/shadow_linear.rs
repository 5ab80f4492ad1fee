//! See `fuzz::shadow::linear`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::linear(bytes));
