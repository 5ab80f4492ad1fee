//! The screen that the firmware leaves behind: with a BIOS text, 25 rows of 80 cells at B8000H, a character and its colours
//! each; with EFI pixels.

use core::sync::atomic::{AtomicU32, Ordering};

use boot::multiboot::Pixels;
use boot::phys::PhysMemory;
use ept::Hpa;
use font8x8::legacy::BASIC_LEGACY;
use spin::Once;

use super::phys::{BootMemory, is_mapped, phys_to_virt};

/// A glyph's pixels; each of its eight rows is there twice.
const GLYPH_WIDTH: u32 = 8;
const GLYPH_HEIGHT: u32 = 16;

static SCREEN: Once<Screen> = Once::new();

/// The place of the next character.
static COLUMN: AtomicU32 = AtomicU32::new(0);
static ROW: AtomicU32 = AtomicU32::new(0);

enum Screen {
    Text,
    Pixels(Pixels),
}

/// Uses the text screen, if the firmware's data area says that there is one. Returns whether there is.
pub fn use_text() -> bool {
    const VIDEO_MODE: u64 = 0x449;
    const TEXT_OF_80_COLUMNS: [[u8; 3]; 2] = [[2, Text::COLUMNS as u8, 0], [3, Text::COLUMNS as u8, 0]];
    let mut mode_and_columns = [0; 3];
    let is_there = BootMemory.read(VIDEO_MODE, &mut mode_and_columns).is_ok();
    if is_there && TEXT_OF_80_COLUMNS.contains(&mode_and_columns) {
        SCREEN.call_once(|| Screen::Text);
        // What the loader has written scrolls up.
        ROW.store(Text::ROWS - 1, Ordering::Relaxed);
    }
    SCREEN.is_completed()
}

/// Uses a screen of pixels, if the direct map covers it. Returns whether there is a screen.
pub fn use_pixels(pixels: Pixels) -> bool {
    if is_mapped(Hpa(pixels.address), pixels.bytes() as usize) {
        SCREEN.call_once(|| Screen::Pixels(pixels));
    }
    SCREEN.is_completed()
}

/// Writes a character of a line, or ends the line.
pub fn write(character: u8) {
    let Some(screen) = SCREEN.get() else { return };
    let (columns, rows) = screen.size();
    let (mut column, mut row) = (COLUMN.load(Ordering::Relaxed), ROW.load(Ordering::Relaxed));
    if character == b'\n' || column >= columns {
        column = 0;
        row = screen.end_row(row, columns, rows);
    }
    if character != b'\n' {
        screen.draw(column, row, character);
        column += 1;
    }
    COLUMN.store(column, Ordering::Relaxed);
    ROW.store(row, Ordering::Relaxed);
}

impl Screen {
    fn size(&self) -> (u32, u32) {
        match self {
            Self::Text => (Text::COLUMNS, Text::ROWS),
            Self::Pixels(pixels) => (pixels.width / GLYPH_WIDTH, pixels.height / GLYPH_HEIGHT),
        }
    }

    /// Makes room for the next row, and returns it. Text scrolls. Pixels are slow to read: after the last row comes the
    /// first one.
    fn end_row(&self, row: u32, columns: u32, rows: u32) -> u32 {
        let next = match self {
            Self::Text => {
                Text::scroll();
                row
            }
            Self::Pixels(_) => (row + 1) % rows.max(1),
        };
        (0..columns).for_each(|column| self.draw(column, next, b' '));
        next
    }

    fn draw(&self, column: u32, row: u32, character: u8) {
        match self {
            Self::Text => Text::set(row * Text::COLUMNS + column, character),
            Self::Pixels(pixels) => draw_glyph(pixels, column, row, character),
        }
    }
}

struct Text;

impl Text {
    const COLUMNS: u32 = 80;
    const ROWS: u32 = 25;
    const CELLS: Hpa = Hpa(0xb8000);
    const WHITE_ON_BLACK: u16 = 0x0f00;

    fn cell(number: u32) -> *mut u16 {
        phys_to_virt(Self::CELLS).cast::<u16>().wrapping_add(number as usize)
    }

    fn set(number: u32, character: u8) {
        // SAFETY: the number is that of a cell of the screen. The direct map covers them; they are memory of the display
        // adapter, or nothing, and no object of Rust.
        unsafe { Self::cell(number).write_volatile(Self::WHITE_ON_BLACK | u16::from(character)) }
    }

    fn scroll() {
        for number in 0..(Self::ROWS - 1) * Self::COLUMNS {
            // SAFETY: as for `set`.
            unsafe { Self::cell(number).write_volatile(Self::cell(number + Self::COLUMNS).read_volatile()) };
        }
    }
}

/// Draws a character that is whole on the screen.
fn draw_glyph(pixels: &Pixels, column: u32, row: u32, character: u8) {
    let glyph = BASIC_LEGACY.get(usize::from(character)).unwrap_or(&BASIC_LEGACY[usize::from(b'?')]);
    for y in 0..GLYPH_HEIGHT {
        let bits = glyph[(y / 2) as usize];
        for x in 0..GLYPH_WIDTH {
            let shade = if bits >> x & 1 != 0 { 0xff } else { 0 };
            let at = pixels.offset(column * GLYPH_WIDTH + x, row * GLYPH_HEIGHT + y);
            for byte in 0..u64::from(pixels.bytes_per_pixel) {
                // SAFETY: the pixel is on the screen, which the direct map covers; it is memory of the display adapter,
                // and no object of Rust.
                unsafe { phys_to_virt(Hpa(pixels.address + at + byte)).write_volatile(shade) };
            }
        }
    }
}
