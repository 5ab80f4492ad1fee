//! A boot sector that prints what the BIOS tells of memory, on the debug port. The runner takes the section `.sector`
//! out of the ELF file.
//!
//! Lines begin with `sector: `. `call AX: CF AX BX CX DX` is an answer of interrupt 15H, `base: AX` that of interrupt
//! 12H, and `map: CX ...` an entry of the memory map in five dwords, all in hexadecimal.

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the program is assembly")]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(
    include_str!("sector.S"),
    debug_port = const protocol::DEBUG_PORT,
    exit_port = const protocol::EXIT_PORT,
    options(att_syntax)
);

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
