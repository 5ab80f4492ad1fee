//! Lines for the runner: to port 0xe9 if it is a debug console, else to COM1.

use core::fmt::{self, Write};

use guest_abi::port::{inb, outb, outl, write_bytes};
use protocol::{DEBUG_PORT, EXIT_PORT, SHUTDOWN_PORT, SHUTDOWN_TEXT};

use crate::permissions::Permissions;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Prints the cases, and counts them.
pub struct Suite {
    group: &'static str,
    is_silent: bool,
    cases: usize,
    permissions: Option<Permissions>,
}

impl Suite {
    /// The state before the first case.
    pub const fn new(permissions: Option<Permissions>) -> Self {
        Self { group: "", is_silent: false, cases: 0, permissions }
    }

    /// Begins `group`, to which the following cases belong.
    pub fn begin(&mut self, group: &'static str) {
        self.group = group;
    }

    /// Sets whether the following cases are printed. Others run without a line.
    pub fn print_cases(&mut self, wanted: bool) {
        self.is_silent = !wanted;
    }

    /// Prints the line of one case.
    pub fn case(&mut self, name: impl fmt::Display, result: impl fmt::Display) {
        if self.is_silent {
            return;
        }
        let mut line = Line::new();
        // A line that is too long ends early, the same on every machine.
        let _ = write!(line, "C {}/{name} {result}", self.group);
        line.print();
        self.cases += 1;
        if let Some(permissions) = &mut self.permissions {
            permissions.change();
        }
    }

    /// Prints the last line, and switches the machine off.
    pub fn end(self) -> ! {
        print(format_args!("C-END {}", self.cases));
        power_off()
    }
}

/// Prints a line that is not a case.
pub fn print(text: fmt::Arguments<'_>) {
    let mut line = Line::new();
    let _ = line.write_fmt(text);
    line.print();
}

/// Switches the machine off.
pub fn power_off() -> ! {
    for &byte in SHUTDOWN_TEXT {
        outb(SHUTDOWN_PORT, byte);
    }
    outl(EXIT_PORT, 0);
    loop {
        core::hint::spin_loop();
    }
}

/// Ends the machine with an exit code that says that the image could not do its work.
pub fn abandon() -> ! {
    outl(EXIT_PORT, 1);
    loop {
        core::hint::spin_loop();
    }
}

/// A line to print. It is written at once, so that no other processor writes between its bytes.
struct Line {
    bytes: [u8; 1024],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 1024], length: 0 }
    }

    fn print(&mut self) {
        self.bytes[self.length] = b'\n';
        let bytes = &self.bytes[..=self.length];
        if inb(DEBUG_PORT) == DEBUG_PORT as u8 {
            write_bytes(DEBUG_PORT, bytes);
            return;
        }
        for &byte in bytes {
            while inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            outb(COM1, byte);
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.length + 1 == self.bytes.len() {
                return Err(fmt::Error);
            }
            self.bytes[self.length] = byte;
            self.length += 1;
        }
        Ok(())
    }
}
