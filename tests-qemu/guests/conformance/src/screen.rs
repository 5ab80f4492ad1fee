//! With the argument `screen`, the image prints what the text screen shows.

use core::str;

use crate::output::{power_off, print};

/// The argument.
pub const WORD: &str = "screen";

const COLUMNS: usize = 80;
const ROWS: usize = 25;
const CELLS: usize = 0xb8000;

/// Prints the rows, and ends the machine.
pub fn run() -> ! {
    let cells = core::ptr::with_exposed_provenance::<[[u8; 2]; COLUMNS]>(CELLS);
    for row in 0..ROWS {
        // SAFETY: the display adapter's memory is mapped to itself, and no object of Rust.
        let characters = unsafe { cells.add(row).read_volatile() }.map(|[character, _]| character);
        print(format_args!("{WORD}: {}", str::from_utf8(&characters).unwrap_or("?").trim_end()));
    }
    power_off()
}
