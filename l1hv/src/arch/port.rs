//! Port I/O, limited to the ports that the host itself uses.

use core::arch::asm;

/// A port that the host can read and write without an effect on its own memory.
///
/// The list is closed on purpose: a DMA engine or the chipset's configuration ports could be made to overwrite the
/// host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Port(u16);

impl Port {
    /// The emulators' debug console.
    pub const DEBUG_CONSOLE: Self = Self(protocol::DEBUG_PORT);
    /// QEMU's isa-debug-exit device.
    pub const EXIT: Self = Self(protocol::EXIT_PORT);
    /// Bochs's shutdown port.
    pub const SHUTDOWN: Self = Self(protocol::SHUTDOWN_PORT);

    /// Counter 2 of the interval timer.
    pub const TIMER_2: Self = Self(0x42);
    /// Command register of the interval timer.
    pub const TIMER_COMMAND: Self = Self(0x43);
    /// The gate and the output of counter 2.
    pub const SYSTEM_CONTROL: Self = Self(0x61);

    /// The chipset's reset control register.
    pub const RESET_CONTROL: Self = Self(0xcf9);
    /// The keyboard controller's command register.
    pub const KEYBOARD_CONTROLLER: Self = Self(0x64);

    /// Register `offset` (0 to 7) of the UART at COM1.
    pub const fn com1(offset: u16) -> Self {
        assert!(offset < 8, "a 16550 has eight registers");
        Self(0x3f8 + offset)
    }

    /// Reads a byte.
    pub fn read(self) -> u8 {
        let value: u8;
        // SAFETY: the constructors name only ports whose access has no effect on memory.
        unsafe { asm!("in al, dx", in("dx") self.0, out("al") value, options(nomem, nostack, preserves_flags)) };
        value
    }

    /// Writes a byte.
    pub fn write(self, value: u8) {
        // SAFETY: as for `read`.
        unsafe { asm!("out dx, al", in("dx") self.0, in("al") value, options(nomem, nostack, preserves_flags)) };
    }

    /// Writes four bytes at once.
    pub fn write_dword(self, value: u32) {
        // SAFETY: as for `read`.
        unsafe { asm!("out dx, eax", in("dx") self.0, in("eax") value, options(nomem, nostack, preserves_flags)) };
    }
}
