//! Waiting, at boot only: by the PC's interval timer, which needs no calibration (8254, counter 2, which the speaker's
//! gate starts), or where the chipset has switched that off, by the time-stamp counter.

use core::arch::x86_64::_rdtsc;

use boot::tsc;
use spin::Once;

use super::cpu;
use super::port::Port;

const HERTZ: u32 = 1_193_182;
/// Port 61H.
const GATE: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// Counter 2, both bytes, mode 0: the output rises at the end of the count.
const COMMAND: u8 = 0b1011_0000;

/// What counts.
enum Clock {
    IntervalTimer,
    /// Ticks in a millisecond.
    TimeStampCounter(u64),
}

static CLOCK: Once<Clock> = Once::new();

/// Waits for at most 50 milliseconds.
pub fn wait_milliseconds(milliseconds: u16) {
    debug_assert!(milliseconds <= 50, "the counter has 16 bits");
    match CLOCK.call_once(Clock::find) {
        Clock::IntervalTimer => _ = counts(milliseconds),
        Clock::TimeStampCounter(khz) => {
            let ticks = khz * u64::from(milliseconds);
            let start = now();
            while now().wrapping_sub(start) < ticks {
                core::hint::spin_loop();
            }
        }
    }
}

impl Clock {
    fn find() -> Self {
        const CRYSTAL: u32 = 0x15;
        const BASE: u32 = 0x16;
        if counts(1) {
            return Self::IntervalTimer;
        }
        let leaf = |number| if cpu::cpuid(0, 0)[0] >= number { cpu::cpuid(number, 0) } else { [0; 4] };
        let khz = tsc::khz(leaf(CRYSTAL), leaf(BASE)).unwrap_or(tsc::MOST_KHZ);
        log::info!("the interval timer does not count: l1hv waits by the time-stamp counter, {khz} kHz");
        Self::TimeStampCounter(khz)
    }
}

fn now() -> u64 {
    // SAFETY: RDTSC has no precondition in ring 0.
    unsafe { _rdtsc() }
}

/// Waits by the interval timer. Returns whether it has counted: its output begins low, and rises in less than twice the
/// time.
fn counts(milliseconds: u16) -> bool {
    let [low, high] = ((HERTZ / 1000 * u32::from(milliseconds)) as u16).to_le_bytes();
    let control = Port::SYSTEM_CONTROL.read();
    Port::SYSTEM_CONTROL.write(control & !(SPEAKER | GATE));
    Port::TIMER_COMMAND.write(COMMAND);
    Port::TIMER_2.write(low);
    Port::TIMER_2.write(high);
    Port::SYSTEM_CONTROL.write(control & !SPEAKER | GATE);
    let is_high = || Port::SYSTEM_CONTROL.read() & OUTPUT != 0;
    let begins_low = !is_high();
    let (start, limit) = (now(), 2 * tsc::MOST_KHZ * u64::from(milliseconds));
    let rises = loop {
        if is_high() {
            break true;
        }
        if now().wrapping_sub(start) > limit {
            break false;
        }
    };
    Port::SYSTEM_CONTROL.write(control);
    begins_low && rises
}
