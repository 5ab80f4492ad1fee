//! See `fuzz::ept::paging`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::ept::paging(bytes));
