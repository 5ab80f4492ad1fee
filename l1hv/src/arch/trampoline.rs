//! The way of the other processors from their start into the image.

use core::sync::atomic::{AtomicU64, Ordering};

use boot::entry::{TrampolineParameters, trampoline};
use ept::Hpa;
use x86_64::registers::control::{Cr0, Cr3, Cr4, Efer, EferFlags};

use crate::mem::{GuestRam, HostPages, PAGE_BYTES};

/// What goes to CR3 in place of the tables that map the trampoline.
static HOST_CR3: AtomicU64 = AtomicU64::new(0);

/// The page with the trampoline. What was there before comes back when this goes.
pub struct TrampolinePage<'a> {
    page: Hpa,
    ram: &'a GuestRam,
    saved: [u8; PAGE_BYTES as usize],
    cr3: Hpa,
}

impl<'a> TrampolinePage<'a> {
    /// Puts the trampoline into `page`, below 1 MiB, which the tables at `cr3` map to itself.
    pub fn install(ram: &'a GuestRam, page: Hpa, cr3: Hpa) -> Self {
        let mut saved = [0; PAGE_BYTES as usize];
        ram.read(page, &mut saved);
        ram.write(page, trampoline());
        let (table, flags) = Cr3::read_raw();
        HOST_CR3.store(table.start_address().as_u64() | u64::from(flags), Ordering::Release);
        Self { page, ram, saved, cr3 }
    }

    /// What a SIPI has to say.
    pub const fn vector(&self) -> u8 {
        (self.page.0 / PAGE_BYTES) as u8
    }

    /// The next processor comes to `crate::startup::arrive` on this stack.
    pub fn prepare(&self, stack: &HostPages) {
        let parameters = TrampolineParameters {
            stack: stack.as_mut_ptr().addr() as u64 + stack.bytes(),
            entry: enter as *const () as u64,
            cr0: Cr0::read_raw() as u32,
            cr3: self.cr3.0 as u32,
            cr4: Cr4::read_raw() as u32,
            // LMA is the processor's to set.
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

/// Where the trampoline goes to, on the processor's own stack.
extern "sysv64" fn enter() -> ! {
    let host_cr3 = HOST_CR3.load(Ordering::Acquire);
    // SAFETY: the tables of the boot processor, which map everything that the trampoline's do but its page.
    unsafe { core::arch::asm!("mov cr3, {}", in(reg) host_cr3, options(nostack, preserves_flags)) };
    crate::startup::arrive()
}
