//! Port I/O.

use core::arch::asm;

/// Reads a byte.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the callers name ports that touch no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes a dword.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}
