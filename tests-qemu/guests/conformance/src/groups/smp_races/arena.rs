//! The memory that several processors use and edit.

use crate::memory::{Page, Table};
use crate::nested_paging::*;
use crate::smp::{MAX, number};
use crate::vm::Vm;

use shadow::fields::*;

/// MSR bitmaps, I/O bitmaps A and B.
#[unsafe(link_section = ".shared")]
pub static BITMAPS: Table<{ 3 * 512 }> = Table::new();
/// MSR areas: VM-exit store, VM-exit load, VM-entry load, a quarter page each.
#[unsafe(link_section = ".shared")]
pub static AREAS: Page = Page::new();
/// VMREAD and VMWRITE bitmaps.
#[unsafe(link_section = ".shared")]
pub static SHADOWING: Table<1024> = Table::new();
/// EPT12 below the PDPT, for [`WINDOW`]; the nested guest's page table of [`LINEAR`].
#[unsafe(link_section = ".shared")]
pub static EPT_PD: Page = Page::new();
/// See [`EPT_PD`].
#[unsafe(link_section = ".shared")]
pub static EPT_PT: Page = Page::new();
/// See [`EPT_PD`].
#[unsafe(link_section = ".shared")]
pub static PAGE_TABLE: Page = Page::new();
/// The pages that the window maps.
#[unsafe(link_section = ".shared")]
pub static TARGETS: Table<{ 512 * WINDOW_PAGES }> = Table::new();
/// A VMCS, a shadow VMCS, a virtual-APIC page or a posted-interrupt descriptor of each user.
#[unsafe(link_section = ".shared")]
static OWN: [Page; MAX] = [const { Page::new() }; MAX];
/// EPTP and CR3 of the address spaces that all use: the first processor's.
#[unsafe(link_section = ".shared")]
static SPACES: Table<2> = Table::new();

/// The page that belongs to a user.
pub fn own(user: usize) -> &'static Page {
    &OWN[user]
}

/// The page that belongs to this processor.
pub fn mine() -> &'static Page {
    own(number() / 2)
}

/// Build: sets the whole arena to zero.
pub fn clear() {
    BITMAPS.fill(0);
    AREAS.fill(0);
    SHADOWING.fill(0);
    OWN.iter().for_each(|page| page.fill(0));
}

/// Build: address spaces whose window is in the arena.
pub fn build_spaces() {
    clear();
    let eptp = reset();
    fill_large_page();
    PDPT.set(1, EPT_PD.address() | 7);
    EPT_PD.set(0, EPT_PT.address() | 7);
    guest_linear_table(PAGE_TABLE.address());
    for page in 0..WINDOW_PAGES {
        TARGETS.set(page * 512, VMCALL);
        EPT_PT.set(page, target(page as u64) | LEAF);
        PAGE_TABLE.set(page, (WINDOW + page as u64 * 4096) | 7);
    }
    SPACES.set(0, eptp);
    SPACES.set(1, guest_cr3());
}

/// The physical address of a page of [`TARGETS`].
pub fn target(page: u64) -> u64 {
    TARGETS.address() + page * 4096
}

/// A nested guest in these address spaces.
pub fn enter_spaces(vm: &mut Vm) {
    vm.set(EPT_POINTER, SPACES.get(0)).set(GUEST_CR3, SPACES.get(1));
}

/// Restores the tables after a race.
pub fn tidy_up() {
    let _ = reset();
    reset_guest();
}
