//! How the others start (SDM 10.4 "Multiple-Processor (MP) Initialization").

use crate::apic::{self, Message};
use crate::port::{inb, outw};

use super::local;

/// Where the trampoline is copied: memory below 1 MiB that firmware and loaders leave alone.
const TRAMPOLINE: u64 = 0x8000;
const PAGE: u64 = 0x1000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static trampoline_cr3: u8;
}

/// How many processors the machine has, as QEMU's firmware configuration device says; 1 without such a device.
pub fn count() -> usize {
    const SELECTOR: u16 = 0x510;
    const DATA: u16 = 0x511;
    const SIGNATURE: u16 = 0;
    const PROCESSORS: u16 = 5;
    let item = |number| {
        outw(SELECTOR, number);
        u16::from_le_bytes([inb(DATA), inb(DATA)])
    };
    if item(SIGNATURE) == u16::from_le_bytes(*b"QE") { usize::from(item(PROCESSORS)) } else { 1 }
}

/// Memory of its own for a processor that has not been started yet. Its page tables are those that the next start uses.
pub fn prepare(number: usize) {
    aim(local::copy_for(number));
}

/// Puts the trampoline where a SIPI can name it; page tables below 4 GiB.
fn aim(pml4: u64) {
    let start = (&raw const trampoline).addr();
    let length = (&raw const trampoline_end).addr() - start;
    for offset in 0..length {
        // SAFETY: between the symbols, and in a page that is nobody's.
        unsafe {
            let byte = core::ptr::with_exposed_provenance::<u8>(start + offset).read();
            core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE as usize + offset).write_volatile(byte);
        }
    }
    let cr3 = TRAMPOLINE as usize + (&raw const trampoline_cr3).addr() - start;
    // SAFETY: as above.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(cr3).write_unaligned(pml4 as u32) };
}

/// The message that ends the wait for it.
pub fn send_start_up(number: usize) {
    apic::send(number, Message::StartUp((TRAMPOLINE / PAGE) as u8));
}
