//! See `fuzz::shadow::vmcs12`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::vmcs12(bytes));
