//! The start of the other processors (SDM 10.4 "Multiple-Processor (MP) Initialization").

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use guest_abi::port::{inb, outw};

use super::{MAX, local};

/// The page of the trampoline: memory below 1 MiB that firmware and loaders leave alone.
pub const PAGE: u8 = 8;
const TRAMPOLINE: usize = PAGE as usize * 0x1000;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static trampoline_cr3: u8;
    static trampoline_fault: u8;
}

/// The two faults that the last processor caused during its start. For the one in real mode: its distance behind the
/// instruction, and the bytes that it pushed besides IP, CS and FLAGS. For the one with a 16-bit TSS: its distance
/// behind the instruction, its error code, and both halves of CR0 after it.
pub fn faults() -> [u16; 6] {
    let place = TRAMPOLINE + (&raw const trampoline_fault).addr() - (&raw const trampoline).addr();
    // SAFETY: the place is in the page of the trampoline, and the processor that wrote it is past the trampoline.
    unsafe { core::ptr::with_exposed_provenance::<[u16; 6]>(place).read_unaligned() }
}

/// The number of processors by QEMU's firmware configuration device; 1 without such a device.
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

/// The page tables of each processor: below 4 GiB.
static PAGE_TABLES: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];

/// Makes memory for a processor that has not been started yet.
pub fn give_memory(number: usize) {
    PAGE_TABLES[number].store(local::copy_for(number) as u32, Relaxed);
}

/// Puts the trampoline for processor `number` where a SIPI can name it.
pub fn aim_at(number: usize) {
    let start = (&raw const trampoline).addr();
    let length = (&raw const trampoline_end).addr() - start;
    for offset in 0..length {
        // SAFETY: the source is between the symbols, and the destination is in an unused page.
        unsafe {
            let byte = core::ptr::with_exposed_provenance::<u8>(start + offset).read();
            core::ptr::with_exposed_provenance_mut::<u8>(TRAMPOLINE + offset).write_volatile(byte);
        }
    }
    let cr3 = TRAMPOLINE + (&raw const trampoline_cr3).addr() - start;
    // SAFETY: as above.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(cr3).write_unaligned(PAGE_TABLES[number].load(Relaxed)) };
}
