//! A panic is a stop of kind `internal` that names the place.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::arch::cpu;
use crate::stop::stop_internal;

static PANICKING: AtomicBool = AtomicBool::new(false);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if PANICKING.swap(true, Ordering::Relaxed) {
        // Formatting the first panic's message panicked: no message can be given.
        cpu::halt_forever();
    }
    match info.location() {
        Some(location) => {
            stop_internal!("panic at {}:{}: {}", location.file(), location.line(), info.message())
        }
        None => stop_internal!("panic: {}", info.message()),
    }
}
