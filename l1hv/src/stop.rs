//! The end of the machine: one line that says what happened and what to do, then a status that the runner sees. All
//! processors stop.

use core::fmt;

use boot::stop::{LINE_PREFIX, StopKind};
use protocol::SHUTDOWN_TEXT;

use crate::arch::cpu;
use crate::arch::port::Port;
use crate::{iommu, log, processor};

/// Why the host stops: the kind, and a message of one line that says what is wrong and what to do.
pub struct StopReason<'a> {
    kind: StopKind,
    message: fmt::Arguments<'a>,
}

impl<'a> StopReason<'a> {
    /// A stop of `kind`; `message` is one line without a line feed.
    pub const fn new(kind: StopKind, message: fmt::Arguments<'a>) -> Self {
        Self { kind, message }
    }
}

/// Stops the machine: says the reason, then tries each emulator's way to exit, then halts for ever, which is the only
/// way on a real machine.
pub fn stop(reason: StopReason<'_>) -> ! {
    log::show_on_screen(true);
    iommu::report();
    log::write_line(format_args!("{LINE_PREFIX}{}: {}", reason.kind.name(), reason.message));
    processor::stop_others();
    for &byte in SHUTDOWN_TEXT {
        Port::SHUTDOWN.write(byte);
    }
    Port::EXIT.write_dword(reason.kind.status());
    cpu::halt_forever()
}

/// Resets the machine by the chipset, or else by the keyboard controller. Returns if neither resets it.
pub fn reset_machine() {
    const RESET_CPU: u8 = 1 << 2;
    const SYSTEM_RESET: u8 = 1 << 1;
    const PULSE_RESET_LINE: u8 = 0xfe;
    processor::stop_others();
    Port::RESET_CONTROL.write(SYSTEM_RESET);
    Port::RESET_CONTROL.write(SYSTEM_RESET | RESET_CPU);
    Port::KEYBOARD_CONTROLLER.write(PULSE_RESET_LINE);
}

/// [`stop`] for a defect of the host itself.
macro_rules! stop_internal {
    ($($argument:tt)*) => {
        $crate::stop::stop($crate::stop::StopReason::new(
            boot::stop::StopKind::Internal,
            format_args!("{}: this is a defect of l1hv: please report it with the log", format_args!($($argument)*)),
        ))
    };
}
pub(crate) use stop_internal;
