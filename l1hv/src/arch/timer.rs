//! Waiting, at boot only: the PC's interval timer needs no calibration (8254, counter 2, which the speaker's gate
//! starts).

use super::port::Port;

const HERTZ: u32 = 1_193_182;
/// Port 61H.
const GATE: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const OUTPUT: u8 = 1 << 5;
/// Counter 2, both bytes, mode 0: the output rises at the end of the count.
const COMMAND: u8 = 0b1011_0000;

/// Polls until the timer is assumed to be absent: some seconds.
const POLLS: u32 = 5_000_000;

/// Waits for at most 50 milliseconds.
pub fn wait_milliseconds(milliseconds: u16) {
    debug_assert!(milliseconds <= 50, "the counter has 16 bits");
    let [low, high] = ((HERTZ / 1000 * u32::from(milliseconds)) as u16).to_le_bytes();
    let control = Port::SYSTEM_CONTROL.read();
    Port::SYSTEM_CONTROL.write(control & !(SPEAKER | GATE));
    Port::TIMER_COMMAND.write(COMMAND);
    Port::TIMER_2.write(low);
    Port::TIMER_2.write(high);
    Port::SYSTEM_CONTROL.write(control & !SPEAKER | GATE);
    _ = (0..POLLS).find(|_| Port::SYSTEM_CONTROL.read() & OUTPUT != 0);
    Port::SYSTEM_CONTROL.write(control);
}
