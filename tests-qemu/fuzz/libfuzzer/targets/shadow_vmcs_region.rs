//! See `fuzz::shadow::vmcs_region`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::shadow::vmcs_region(bytes));
