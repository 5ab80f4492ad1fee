//! Random programs: edits of EPT12, accesses of the nested guest, and INVEPT after each edit that takes rights away, so
//! that the outcome of each access is determined (SDM 29.4.3.4 "Guidelines for Use of the INVEPT Instruction").
//!
//! ```text
//!   two EPT12s, by their PML4 tables; each window of 2 MiB by a page table, a directory entry, or the PDPT
//! ```

use shadow::fields::*;

use super::ept::{ACCESSED_DIRTY, LARGE, WithEntries};
use crate::code;
use crate::cpu::invept;
use crate::memory::{Page, guest_stack};
use crate::nested_paging::*;
use crate::output::Suite;
use crate::random::Random;
use crate::vm::Vm;

const PROGRAMS: u64 = 48;
const STEPS: usize = 40;
const RIGHTS: u64 = 7;

static OTHER_PML4: Page = Page::new();

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    for seed in 0..PROGRAMS {
        program(suite, seed);
    }
    OTHER_PML4.fill(0);
    reset_guest();
}

fn program(suite: &mut Suite, seed: u64) {
    let mut random = Random(seed);
    let mut vm = Vm::new(code!("nop"));
    fill_large_page();
    let flags = ACCESSED_DIRTY * random.below(2);
    OTHER_PML4.set(0, PML4.get(0));
    let eptps = [eptp() | flags, (eptp() - PML4.address() + OTHER_PML4.address()) | flags];
    for page in 0..WINDOW_PAGES {
        PAGES.set(page * 512 + 1, 0);
        PAGES.set(page * 512 + 2, page as u64);
    }
    let _ = invept(2, [0; 2]);
    for step in 0..STEPS {
        match random.below(8) {
            0..3 => edit(&mut random, eptps),
            3 => _ = vm.set(EPT_POINTER, eptps[random.below(2) as usize]),
            _ => {
                let (name, code) = access(&mut random);
                let page = random.below(WINDOW_PAGES as u64);
                vm.registers.rax = WINDOW + page * 4096;
                vm.set(GUEST_RIP, code).set(GUEST_RSP, guest_stack()).set(GUEST_RFLAGS, 2);
                let verdict = vm.run();
                let (found, entry) = (vm.registers.rcx, WINDOW_PT.get(page as usize) & 0xfff);
                suite.case(
                    format_args!("{seed}-{step}-{name}"),
                    format_args!("{} rcx={found:x} entry={entry:x}", WithEntries(verdict)),
                );
            }
        }
    }
}

fn access(random: &mut Random) -> (&'static str, u64) {
    match random.below(4) {
        0 => ("read", code!("mov rcx, [rax + 16]")),
        1 => ("write", code!("mov [rax + 8], cl")),
        2 => ("fetch", code!("jmp rax")),
        _ => ("read-write", code!("lock inc dword ptr [rax + 8]")),
    }
}

/// Changes an entry. INVEPT follows if the entry granted any right before.
fn edit(random: &mut Random, eptps: [u64; 2]) {
    let page = random.below(WINDOW_PAGES as u64) as usize;
    let small = (PAGES.address() + random.below(WINDOW_PAGES as u64) * 4096) | 6 << 3;
    let (table, index, tables_entry, leaf) = match random.below(8) {
        0 => (&PDPT, 1, WINDOW_PD.address() | RIGHTS, WINDOW_PD.address()),
        1 => (&WINDOW_PD, 0, WINDOW_PT.address() | RIGHTS, LARGE_PAGE | LARGE | 6 << 3),
        _ => (&WINDOW_PT, page, small | RIGHTS, small),
    };
    let old = table.get(index);
    let new = match random.below(6) {
        0 => 0,
        1 | 2 => tables_entry,
        3 => old & !RIGHTS | random.below(8),
        4 => old & !(3 << 8),
        // Misconfigured now and then: rights of any kind, memory types that do not exist.
        _ => leaf | random.below(8) | (random.below(2) * (3 << 3)),
    };
    table.set(index, new);
    if old & RIGHTS == 0 {
        return;
    }
    if random.below(2) == 0 {
        let _ = invept(2, [0; 2]);
    } else {
        let _ = eptps.map(|eptp| invept(1, [eptp, 0]));
    }
}
