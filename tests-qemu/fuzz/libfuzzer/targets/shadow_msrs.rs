//! See `fuzz::shadow::msrs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::msrs(bytes));
