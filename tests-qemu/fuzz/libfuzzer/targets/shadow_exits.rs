//! See `fuzz::shadow::exits`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::exits(bytes));
