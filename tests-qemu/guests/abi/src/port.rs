//! Port I/O.

#![allow(unsafe_code, reason = "IN and OUT")]

use core::arch::asm;

/// Reads a byte.
#[inline]
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the guests name ports of the console, of the interrupt controllers, of PCI's configuration and of the
    // emulator, which touch no memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads a word.
#[inline]
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads a dword.
#[inline]
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as for `inb`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte.
#[inline]
pub fn outb(port: u16, value: u8) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes a word.
#[inline]
pub fn outw(port: u16, value: u16) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes a dword.
#[inline]
pub fn outl(port: u16, value: u32) {
    // SAFETY: as for `inb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes bytes one after the other.
#[inline]
pub fn write_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads the slice, and as for `inb`.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags));
    }
}
