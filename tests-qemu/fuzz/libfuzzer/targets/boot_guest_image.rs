//! See `fuzz::boot::guest_image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::boot::guest_image(bytes));
