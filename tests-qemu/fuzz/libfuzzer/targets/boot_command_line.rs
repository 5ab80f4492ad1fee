//! See `fuzz::boot::command_line`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzz::boot::command_line(bytes));
