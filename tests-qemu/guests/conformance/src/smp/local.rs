//! The memory that each processor has of its own: every static of the image that is not in `.shared`, at the same
//! linear address on each.
//!
//! ```text
//!   linear                       processor 0      processor n
//!   local_start .. + 2 MiB       itself           COPIES + (n - 1) * 2 MiB
//!   everything else              itself           itself
//! ```
//!
//! So a group's code runs unchanged on any processor. It gives physical addresses to the processor and to other
//! processors. Physical addresses are linear addresses too: only [`physical`] makes a difference.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::arguments;
use crate::memory::Page;

const LARGE_PAGE: u64 = 2 << 20;
/// Memory for the copies: above the image and the loader's data behind it, below the memory that cases use.
const COPIES: u64 = 64 << 20;

/// Physical minus linear address of this processor's own memory.
static OFFSET: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    static local_start: u8;
    static local_end: u8;
    static host_pml4: u8;
    static supervisor_pdpt: u8;
    static supervisor_pd: u8;
    static user_pdpt: u8;
    static user_pd: u8;
}

fn start() -> u64 {
    (&raw const local_start).addr() as u64
}

/// The physical address of a static.
pub fn physical(linear: u64) -> u64 {
    if linear >= start() { linear + OFFSET.load(Relaxed) } else { linear }
}

/// Copies this processor's own memory in its present state for processor `number`. Returns the physical address of the
/// copy's PML4 table.
pub fn copy_for(number: usize) -> u64 {
    let copy = COPIES + (number as u64 - 1) * LARGE_PAGE;
    let hole = arguments::reserved_memory().unwrap_or(0..0);
    assert!(!(hole.start < copy + LARGE_PAGE && copy < hole.end), "the host is where the copies belong");
    let offset = copy - start();
    let bytes = (&raw const local_end).addr() as u64 - start();
    for at in (0..bytes).step_by(8) {
        write(copy + at, read(start() + at));
    }
    write((&raw const OFFSET).addr() as u64 + offset, offset);
    // The copied tables still point to the original tables and map the original memory. Make them point to the copies
    // and map the copy.
    let copied = |table: *const u8| table.addr() as u64 + offset;
    let move_entry = |at: u64| write(at, read(at) + offset);
    let pml4 = copied(&raw const host_pml4);
    let views = [(&raw const supervisor_pdpt, &raw const supervisor_pd), (&raw const user_pdpt, &raw const user_pd)];
    for (index, (pdpt, pd)) in (0..).zip(views) {
        move_entry(pml4 + index * 8);
        move_entry(copied(pdpt));
        move_entry(copied(pd) + start() / LARGE_PAGE * 8);
    }
    pml4
}

/// Changes a word of another processor's copy of `page`, for those that do not mind what they destroy. The first
/// processor has no copy.
pub fn write_to(number: usize, page: &Page, word: usize, value: u64) {
    assert!(number != 0 && word < 512, "not in a copy");
    let linear = page.address() - OFFSET.load(Relaxed);
    write(COPIES + (number as u64 - 1) * LARGE_PAGE + linear - start() + word as u64 * 8, value);
}

fn read(address: u64) -> u64 {
    // SAFETY: all memory is mapped, and the callers read memory between the image's symbols, or memory that they have
    // written.
    unsafe { core::ptr::with_exposed_provenance::<u64>(address as usize).read_volatile() }
}

fn write(address: u64, value: u64) {
    // SAFETY: no Rust object is in the copies until their processor runs.
    unsafe { core::ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(value) };
}
