//! The text screen that a PC's firmware leaves behind: 25 rows of 80 cells at B8000H, a character and its colours each.

use core::sync::atomic::{AtomicUsize, Ordering};

use boot::phys::PhysMemory;
use ept::Hpa;

use super::phys::{BootMemory, phys_to_virt};

const COLUMNS: usize = 80;
const ROWS: usize = 25;
const CELLS: Hpa = Hpa(0xb8000);
const WHITE_ON_BLACK: u16 = 0x0f00;

/// The column of the next character, in the last row: what the loader has written scrolls up.
static COLUMN: AtomicUsize = AtomicUsize::new(0);

/// Whether the firmware's data area says that the screen shows text in this form.
pub fn is_there() -> bool {
    const VIDEO_MODE: u64 = 0x449;
    const TEXT_OF_80_COLUMNS: [[u8; 3]; 2] = [[2, COLUMNS as u8, 0], [3, COLUMNS as u8, 0]];
    let mut mode_and_columns = [0; 3];
    BootMemory.read(VIDEO_MODE, &mut mode_and_columns).is_ok() && TEXT_OF_80_COLUMNS.contains(&mode_and_columns)
}

/// The address of a cell.
fn cell(number: usize) -> *mut u16 {
    phys_to_virt(CELLS).cast::<u16>().wrapping_add(number)
}

fn set(number: usize, character: u8) {
    // SAFETY: `write` numbers cells of the screen. The direct map covers them; they are memory of the display adapter,
    // or nothing, and no object of Rust.
    unsafe { cell(number).write_volatile(WHITE_ON_BLACK | u16::from(character)) }
}

/// Writes a character of a line, or ends the line.
pub fn write(character: u8) {
    const LAST_ROW: usize = (ROWS - 1) * COLUMNS;
    let column = COLUMN.load(Ordering::Relaxed);
    if character == b'\n' || column >= COLUMNS {
        for number in 0..LAST_ROW {
            // SAFETY: as for `set`.
            unsafe { cell(number).write_volatile(cell(number + COLUMNS).read_volatile()) };
        }
        (LAST_ROW..LAST_ROW + COLUMNS).for_each(|number| set(number, b' '));
        COLUMN.store(0, Ordering::Relaxed);
    }
    if character != b'\n' {
        let column = COLUMN.fetch_add(1, Ordering::Relaxed).min(COLUMNS - 1);
        set(LAST_ROW + column, character);
    }
}
