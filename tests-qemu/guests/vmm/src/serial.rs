//! A 16450 at COM1: enough for Linux's console and for processes that write to it.

/// First of the eight ports.
pub const BASE: u16 = 0x3f8;
/// Last of the eight ports.
pub const LAST: u16 = BASE + 7;
/// Interrupt line.
pub const IRQ: u32 = 4;

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const INTERRUPT_ID: u16 = 2;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;

const DIVISOR_LATCH: u8 = 1 << 7;
const ENABLE_TRANSMIT: u8 = 1 << 1;
const NOTHING_PENDING: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x02;
const READY_TO_SEND: u8 = 0x60;
const CARRIER: u8 = 0xb0;

/// The UART's registers and the line that is being written.
#[derive(Debug, Default)]
pub struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
    transmit_pending: bool,
    line: Vec<u8>,
}

impl Serial {
    /// A guest's write; returns a line when it completes one.
    pub fn write(&mut self, port: u16, value: u8) -> Option<String> {
        match port - BASE {
            register @ (DATA | INTERRUPT_ENABLE) if self.latched() => self.divisor[usize::from(register)] = value,
            DATA => {
                self.transmit_pending = true;
                if value == b'\n' {
                    let line = std::mem::take(&mut self.line);
                    return Some(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned());
                }
                self.line.push(value);
            }
            INTERRUPT_ENABLE => {
                self.registers[1] = value & 0x0f;
                // The holding register is always empty: enabling its interrupt raises it.
                self.transmit_pending = value & ENABLE_TRANSMIT != 0;
            }
            INTERRUPT_ID | LINE_STATUS | MODEM_STATUS => {}
            register => self.registers[usize::from(register)] = value,
        }
        None
    }

    /// A guest's read.
    pub fn read(&mut self, port: u16) -> u8 {
        match port - BASE {
            register @ (DATA | INTERRUPT_ENABLE) if self.latched() => self.divisor[usize::from(register)],
            DATA => 0,
            INTERRUPT_ID if self.interrupt() => {
                self.transmit_pending = false;
                TRANSMITTER_EMPTY
            }
            INTERRUPT_ID => NOTHING_PENDING,
            LINE_STATUS => READY_TO_SEND,
            MODEM_STATUS => CARRIER,
            register => self.registers[usize::from(register)],
        }
    }

    /// Whether the interrupt line is up.
    pub fn interrupt(&self) -> bool {
        self.transmit_pending && self.registers[usize::from(INTERRUPT_ENABLE)] & ENABLE_TRANSMIT != 0
    }

    fn latched(&self) -> bool {
        self.registers[usize::from(LINE_CONTROL)] & DIVISOR_LATCH != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_returned_when_it_is_complete() {
        let mut serial = Serial::default();
        assert_eq!(serial.write(BASE, b'o'), None);
        assert_eq!(serial.write(BASE, b'k'), None);
        assert_eq!(serial.write(BASE, b'\n').as_deref(), Some("ok"));
    }

    #[test]
    fn the_transmitter_interrupts_until_its_cause_is_read() {
        let mut serial = Serial::default();
        serial.write(BASE + INTERRUPT_ENABLE, ENABLE_TRANSMIT);
        assert!(serial.interrupt());
        assert_eq!(serial.read(BASE + INTERRUPT_ID), TRANSMITTER_EMPTY);
        assert!(!serial.interrupt());
        assert_eq!(serial.read(BASE + INTERRUPT_ID), NOTHING_PENDING);
    }

    #[test]
    fn the_divisor_hides_the_data_register() {
        let mut serial = Serial::default();
        serial.write(BASE + LINE_CONTROL, DIVISOR_LATCH);
        assert_eq!(serial.write(BASE, b'\n'), None);
        assert_eq!(serial.read(BASE), b'\n');
    }
}
