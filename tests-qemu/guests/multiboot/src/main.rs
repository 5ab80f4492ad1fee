//! A multiboot 1 kernel that prints what its loader told it and switches the machine off.
//!
//! It runs in the 32-bit state of the Multiboot Specification 0.6.96, section 3.2. On COM1:
//!
//! ```text
//!   multiboot guest: command line: ARGUMENTS
//!   multiboot guest: module ARGUMENTS: CONTENT
//! ```

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the kernel is assembly")]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(
    include_str!("kernel.S"),
    shutdown_port = const protocol::SHUTDOWN_PORT,
    shutdown_text = sym SHUTDOWN_TEXT,
    shutdown_length = const protocol::SHUTDOWN_TEXT.len(),
    options(att_syntax)
);

static SHUTDOWN_TEXT: [u8; 8] = *protocol::SHUTDOWN_TEXT;

/// Rust requires a panic handler. No code here panics.
#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
