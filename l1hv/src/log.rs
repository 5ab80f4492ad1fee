//! The host's log: lines like `[l1hv INFO] text` on the emulators' debug console. Where there is none, on COM1, and
//! until the guest starts, and at a stop, on the screen: a BIOS' text, or pixels of EFI firmware.
//!
//! COM1 and the screen are the guest hypervisor's later, so a host that has a debug console leaves them alone. No wait
//! is unbounded: a byte that the UART does not accept in time is lost.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use boot::multiboot::Framebuffer;
use log::{LevelFilter, Log, Metadata, Record};
use spin::Mutex;

use crate::arch::port::Port;
use crate::arch::screen;

/// The device that gets the bytes. [`SINK`] holds it as an atomic `u8`, because it is set before locks are of use.
const SINK_NONE: u8 = 0;
const SINK_DEBUG_CONSOLE: u8 = 1;
const SINK_COM1: u8 = 2;

static SINK: AtomicU8 = AtomicU8::new(SINK_NONE);

/// Whether there is a screen for want of a debug console, and whether lines go there now.
static HAS_SCREEN: AtomicBool = AtomicBool::new(false);
static IS_ON_SCREEN: AtomicBool = AtomicBool::new(false);

/// Polls of the line status register before a byte is given up: some 100 ms on a real bus, four characters at 300 baud.
const UART_POLLS: u32 = 100_000;

/// Finds the device and installs the logger at level info. To be called before anything else.
pub fn init() {
    let sink = if Port::DEBUG_CONSOLE.read() == protocol::DEBUG_PORT as u8 {
        SINK_DEBUG_CONSOLE
    } else if uart::init() {
        SINK_COM1
    } else {
        SINK_NONE
    };
    SINK.store(sink, Ordering::Relaxed);
    if sink != SINK_DEBUG_CONSOLE {
        has_screen(screen::use_text());
    }
    // The only error is a logger that is installed already; this runs once.
    let _ = log::set_logger(&Logger);
    log::set_max_level(LevelFilter::Info);
}

/// Uses the screen that the boot loader describes, if none is in use.
pub fn use_framebuffer(framebuffer: &Framebuffer) {
    if let Some(pixels) = framebuffer.pixels()
        && SINK.load(Ordering::Relaxed) != SINK_DEBUG_CONSOLE
    {
        has_screen(screen::use_pixels(pixels));
    }
}

fn has_screen(has: bool) {
    HAS_SCREEN.store(has, Ordering::Relaxed);
    show_on_screen(has);
}

/// Shows the lines that follow on the screen, if there is one, or leaves it to the guest.
pub fn show_on_screen(shown: bool) {
    IS_ON_SCREEN.store(shown && HAS_SCREEN.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// The lock of the processor that writes a line.
static LINE: Mutex<()> = Mutex::new(());

/// Attempts to take the lock before lines may mix: a processor that stopped while it wrote must not block the others.
const LOCK_ATTEMPTS: u32 = 10_000_000;

/// Writes without a level and without a prefix, whatever the level is.
pub fn write_line(line: fmt::Arguments<'_>) {
    let _alone = (0..LOCK_ATTEMPTS).find_map(|_| LINE.try_lock());
    let mut sink = Sink { device: SINK.load(Ordering::Relaxed), is_on_screen: IS_ON_SCREEN.load(Ordering::Relaxed) };
    // `Sink::write_str` never fails; an error could only come from a `Display` of ours, and the rest of the line is
    // still of use.
    let _ = sink.write_fmt(line);
    let _ = sink.write_char('\n');
}

/// Warnings that are left for events that a guest, or the machine below, can repeat at will.
static WARNINGS_LEFT: AtomicU32 = AtomicU32::new(64);

/// Warns of an event that a guest, or the machine below, can repeat at will: only the first warnings are logged.
#[cold]
pub fn warn_of_repeatable(line: fmt::Arguments<'_>) {
    let left = WARNINGS_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    match left {
        Ok(1) => log::warn!("{line}; more of this kind is not logged"),
        Ok(_) => log::warn!("{line}"),
        Err(_) => (),
    }
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            write_line(format_args!("[l1hv {}] {}", record.level(), record.args()));
        }
    }

    fn flush(&self) {}
}

struct Sink {
    device: u8,
    is_on_screen: bool,
}

impl Write for Sink {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            match self.device {
                SINK_DEBUG_CONSOLE => Port::DEBUG_CONSOLE.write(byte),
                SINK_COM1 => uart::write(byte),
                _ => {}
            }
            if self.is_on_screen {
                screen::write(byte);
            }
        }
        Ok(())
    }
}

/// A 16550 at COM1, 115200 baud, 8 data bits, no parity, 1 stop bit.
mod uart {
    use super::{Port, UART_POLLS};

    const DATA: Port = Port::com1(0);
    const INTERRUPT_ENABLE: Port = Port::com1(1);
    const FIFO_CONTROL: Port = Port::com1(2);
    const LINE_CONTROL: Port = Port::com1(3);
    const MODEM_CONTROL: Port = Port::com1(4);
    const LINE_STATUS: Port = Port::com1(5);
    const SCRATCH: Port = Port::com1(7);

    const DIVISOR_LATCH: u8 = 1 << 7;
    const EIGHT_N_ONE: u8 = 0x03;
    const TRANSMITTER_EMPTY: u8 = 1 << 5;

    /// Sets the UART up. Returns false if there is none.
    pub fn init() -> bool {
        SCRATCH.write(0x5a);
        if SCRATCH.read() != 0x5a {
            return false;
        }
        INTERRUPT_ENABLE.write(0);
        LINE_CONTROL.write(DIVISOR_LATCH);
        DATA.write(1);
        INTERRUPT_ENABLE.write(0);
        LINE_CONTROL.write(EIGHT_N_ONE);
        FIFO_CONTROL.write(0x07);
        MODEM_CONTROL.write(0x03);
        true
    }

    /// Sends a byte, with a carriage return before a line feed.
    pub fn write(byte: u8) {
        if byte == b'\n' {
            send(b'\r');
        }
        send(byte);
    }

    fn send(byte: u8) {
        for _ in 0..UART_POLLS {
            if LINE_STATUS.read() & TRANSMITTER_EMPTY != 0 {
                break;
            }
        }
        DATA.write(byte);
    }
}
