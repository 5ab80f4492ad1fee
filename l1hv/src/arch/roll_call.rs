//! Which processors the machine has, by asking all of them: a guest could start one that no list of the firmware's
//! names, and the host would not hold it.

use boot::entry::{RollCallList, roll_call};
use ept::Hpa;

use super::apic::{Ipi, send_to_all_others};
use super::phys::phys_to_virt;
use super::timer::wait_milliseconds;
use crate::mem::PAGE_BYTES;

/// Nobody comes any more after so long.
const QUIET_MILLISECONDS: u32 = 20;
/// As long as this, whoever comes.
const MOST_MILLISECONDS: u32 = 1000;

/// Makes all other processors enter their APIC ids into a list, and wait for a SIPI after that (SDM Volume 3A, 10.4.4.1
/// "Typical BSP Initialization Sequence"). `None` if this processor's APIC is off. `page` is free memory below 1 MiB;
/// what it holds comes back. Only for before the host has taken the machine over.
pub fn call(page: Hpa) -> Option<RollCallList> {
    let (code, list_at) = roll_call();
    assert!(page.0 < 1 << 20 && page.0.is_multiple_of(PAGE_BYTES), "a SIPI names a page below 1 MiB");
    assert!(code.len() <= PAGE_BYTES as usize, "the code and the list fit into a page");
    if !send_to_all_others(Ipi::Init) {
        return None;
    }
    let start = phys_to_virt(page);
    let mut saved = [0; PAGE_BYTES as usize];
    // SAFETY: the boot code's direct map has the page, in which nothing of the host's lies, as the image begins at 1 MiB;
    // `list` is within the page, at a multiple of eight.
    let list = unsafe {
        start.copy_to_nonoverlapping(saved.as_mut_ptr(), saved.len());
        start.copy_from_nonoverlapping(code.as_ptr(), code.len());
        start.add(list_at).cast::<RollCallList>()
    };
    // SAFETY: other processors write whole words there, and nothing depends on their order.
    let read = || unsafe { list.read_volatile() };
    wait_milliseconds(10);
    let startup = Ipi::Startup((page.0 / PAGE_BYTES) as u8);
    let (mut seen, mut quiet) = (0, 0);
    for millisecond in 0..MOST_MILLISECONDS {
        // The second one is for processors that have missed the first; the others do not wait any more.
        if millisecond < 2 {
            send_to_all_others(startup);
        }
        wait_milliseconds(1);
        let RollCallList { come, entered, .. } = read();
        quiet = if come == seen && come == entered { quiet + 1 } else { 0 };
        seen = come;
        if quiet == QUIET_MILLISECONDS {
            break;
        }
    }
    let found = read();
    // They leave the page before its content comes back.
    send_to_all_others(Ipi::Init);
    wait_milliseconds(1);
    // SAFETY: as above.
    unsafe { start.copy_from_nonoverlapping(saved.as_ptr(), saved.len()) };
    Some(found)
}
