//! The code that takes the other processors from their start into the image.

use boot::entry::{TrampolineParameters, trampoline};
use ept::Hpa;
use spin::Once;
use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer, EferFlags};

use super::cpu;
use crate::mem::{GuestRam, PAGE_BYTES};

/// The processors' destination.
struct Destination {
    /// The value for CR3, in place of the tables that map the trampoline.
    cr3: u64,
    arrive: extern "sysv64" fn() -> !,
}

static DESTINATION: Once<Destination> = Once::new();

/// The page with the trampoline. Dropping this restores the page's former content.
pub struct TrampolinePage<'a> {
    page: Hpa,
    ram: &'a GuestRam,
    saved: [u8; PAGE_BYTES as usize],
    cr3: Hpa,
}

impl<'a> TrampolinePage<'a> {
    /// Puts the trampoline into `page`, below 1 MiB, which the tables at `cr3` map to itself. The processors go to
    /// `arrive`, with the page tables that this processor uses now. Called once.
    pub fn install(ram: &'a GuestRam, page: Hpa, cr3: Hpa, arrive: extern "sysv64" fn() -> !) -> Self {
        let mut saved = [0; PAGE_BYTES as usize];
        ram.read(page, &mut saved);
        ram.write(page, trampoline());
        let (table, flags) = Cr3::read_raw();
        let host_cr3 = table.start_address().as_u64() | u64::from(flags);
        DESTINATION.call_once(|| Destination { cr3: host_cr3, arrive });
        Self { page, ram, saved, cr3 }
    }

    /// The vector of the SIPI that starts a processor here.
    pub const fn vector(&self) -> u8 {
        (self.page.0 / PAGE_BYTES) as u8
    }

    /// The next processor arrives on the stack that ends there.
    pub fn prepare(&self, stack_end: u64) {
        let parameters = TrampolineParameters {
            stack: stack_end,
            entry: enter as *const () as u64,
            cr0: Cr0::read_raw() as u32,
            cr3: self.cr3.0 as u32,
            cr4: Cr4::read_raw() as u32,
            // The processor sets LMA itself.
            efer: (Efer::read() - EferFlags::LONG_MODE_ACTIVE).bits() as u32,
        };
        let bytes = parameters.to_bytes();
        self.ram.write(self.page + (trampoline().len() - bytes.len()) as u64, &bytes);
    }
}

impl Drop for TrampolinePage<'_> {
    fn drop(&mut self) {
        self.ram.write(self.page, &self.saved);
    }
}

/// The trampoline jumps here, on the processor's own stack.
extern "sysv64" fn enter() -> ! {
    let Some(Destination { cr3, arrive }) = DESTINATION.get() else { cpu::halt_forever() };
    // SAFETY: these are the boot processor's tables, which map everything that the trampoline's tables map but the
    // trampoline's page.
    unsafe { core::arch::asm!("mov cr3, {}", in(reg) *cr3, options(nostack, preserves_flags)) };
    arrive()
}
