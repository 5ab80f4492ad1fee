//! With the argument `screen`, the image prints what the screen shows: the loader's pixels, else text.

use core::str;

use font8x8::legacy::BASIC_LEGACY;

use crate::arguments;
use crate::output::{power_off, print};

/// The argument.
pub const WORD: &str = "screen";

const COLUMNS: usize = 80;
const TEXT_ROWS: usize = 25;
const CELLS: usize = 0xb8000;

/// Prints the rows, and ends the machine.
pub fn run() -> ! {
    match arguments::pixels() {
        Some(pixels @ [_, _, width, height, _]) => {
            print(format_args!("{WORD}: {width} x {height} pixels"));
            let row = |row| core::array::from_fn(|column| read(pixels, column as u32, row));
            (0..height / 16).for_each(|number| print_row(row(number)));
        }
        None => (0..TEXT_ROWS).for_each(|row| print_row(text(row))),
    }
    power_off()
}

fn print_row(characters: [u8; COLUMNS]) {
    print(format_args!("{WORD}: {}", str::from_utf8(&characters).unwrap_or("?").trim_end()));
}

fn text(row: usize) -> [u8; COLUMNS] {
    let cells = core::ptr::with_exposed_provenance::<[[u8; 2]; COLUMNS]>(CELLS);
    // SAFETY: the display adapter's memory is mapped to itself, and no object of Rust.
    unsafe { cells.add(row).read_volatile() }.map(|[character, _]| character)
}

/// The character whose pixels are at this place, each row of them twice.
fn read([address, pitch, _, _, bytes]: [u32; 5], column: u32, row: u32) -> u8 {
    let is_set = |x: u32, y: u32| {
        let address = address + (row * 16 + y) * pitch + (column * 8 + x) * bytes;
        // SAFETY: as for the text.
        unsafe { core::ptr::with_exposed_provenance::<u8>(address as usize).read_volatile() != 0 }
    };
    let line = |y: u32| (0..8).fold(0, |bits, x| bits | u8::from(is_set(x, y)) << x);
    let glyph: [[u8; 8]; 2] = core::array::from_fn(|half| core::array::from_fn(|y| line(y as u32 * 2 + half as u32)));
    let found = BASIC_LEGACY.iter().skip(usize::from(b' ')).position(|known| glyph == [*known; 2]);
    found.map_or(b'~', |at| at as u8 + b' ')
}
