//! A byte of the real-time clock's memory: it survives a reset, and so counts the boots since the machine was switched
//! on.
#![allow(unsafe_code, reason = "Linux gives access to ports by a system call that only libc names")]

use anyhow::{Result, ensure};
use guest_abi::port;

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;

/// A byte that neither firmware nor Linux uses.
const BOOTS: u8 = 0x60;

/// The number of earlier calls on this machine.
pub fn count_boot() -> Result<u8> {
    // SAFETY: the call changes only which ports this process may access.
    let result = unsafe { libc::ioperm(INDEX.into(), 2, 1) };
    ensure!(result == 0, "ioperm: {}", std::io::Error::last_os_error());
    port::outb(INDEX, BOOTS);
    let boots = port::inb(DATA);
    port::outb(INDEX, BOOTS);
    port::outb(DATA, boots + 1);
    Ok(boots)
}
