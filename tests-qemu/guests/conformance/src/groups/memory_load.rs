//! More memory and more EPT12s than a host with a small budget of tables can keep: 2 GiB touched page by page, and 16
//! EPT12s in turn.
//!
//! Physical memory from [`POOL`] on, which has no other use: the tables, then the pages that they map.

use shadow::controls::Pin;
use shadow::fields::*;

use super::ept::{ACCESSED_DIRTY, LARGE};
use crate::code;
use crate::cpu::{invept, request_host_statistics};
use crate::memory::{peek, poke};
use crate::nested_paging::{self, LEAF, VMCALL, WINDOW, low_directory};
use crate::output::Suite;
use crate::vm::Vm;

const POOL: u64 = 320 << 20;
/// The bytes of each EPT12 that takes turns: PML4 table, PDPT, page directory, page table, and the mapped pages.
const ROOT_BYTES: u64 = (4 + PAGES) * 4096;
const ROOTS: u64 = 16;
const PAGES: u64 = 8;
const ROUNDS: u64 = 48;
/// The tables of the large EPT12: PML4 table, PDPT, two page directories, 1024 page tables.
const LARGE_EPT: u64 = 384 << 20;
/// The memory that the large EPT12 maps, eight times over.
const TARGET: u64 = 512 << 20;
const TARGET_PAGES: u64 = (256 << 20) / 4096;
const TOUCHED: u64 = 2 << 30;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    take_turns(suite);
    touch_2_gib(suite);
    request_host_statistics();
}

fn root(number: u64) -> u64 {
    POOL + number * ROOT_BYTES
}

fn content(root: u64, page: u64) -> u64 {
    0x1_0000 * (root + 1) + page
}

fn eptp(root: u64, flags: u64) -> u64 {
    nested_paging::eptp() & 0xfff | root | flags
}

/// An EPT12 with pages of its own in the window.
fn build(number: u64) {
    let [pml4, pdpt, directory, table] = [0, 1, 2, 3].map(|page| root(number) + page * 4096);
    for at in 0..512 * (4 + PAGES) {
        poke(pml4 + at * 8, 0);
    }
    poke(pml4, pdpt | 7);
    poke(pdpt, low_directory() | 7);
    poke(pdpt + 8, directory | 7);
    poke(directory, table | 7);
    for page in 0..PAGES {
        let address = root(number) + (4 + page) * 4096;
        poke(table + page * 8, address | LEAF);
        poke(address, VMCALL);
        poke(address + 16, content(number, page));
    }
}

/// Uses each EPT12 in turn, with another page each time. Now and then executes INVEPT, sometimes after a page has
/// moved.
fn take_turns(suite: &mut Suite) {
    for flags in [0, ACCESSED_DIRTY] {
        (0..ROOTS).for_each(build);
        let mut right = [0_u64; ROOTS as usize];
        let mut vm = Vm::new(code!("mov rcx, [rax + 16]", "mov [rax + 8], rcx"));
        for (round, number) in (0..ROUNDS).flat_map(|round| (0..ROOTS).map(move |number| (round, number))) {
            let page = (round + number) % PAGES;
            let moves = round % 16 == 15;
            if moves {
                // Two pages change places.
                let table = root(number) + 3 * 4096;
                let [one, other] = [page, page ^ 1].map(|page| peek(table + page * 8));
                poke(table + page * 8, other);
                poke(table + (page ^ 1) * 8, one);
            }
            if moves || round % 8 == 7 {
                let _ = invept(1, [eptp(root(number), flags), 0]);
            }
            let address = peek(root(number) + 3 * 4096 + page * 8) & !0xfff;
            vm.set(EPT_POINTER, eptp(root(number), flags));
            vm.registers.rax = WINDOW + page * 4096;
            poke(address + 8, 0);
            let _ = vm.rerun();
            let is_right = vm.registers.rcx == peek(address + 16) && peek(address + 8) == vm.registers.rcx;
            right[number as usize] += u64::from(is_right);
        }
        for (number, right) in right.into_iter().enumerate() {
            suite.case(format_args!("turns-{number}-ad-{}", flags >> 6), format_args!("{right} of {ROUNDS}"));
        }
    }
}

/// Reads, writes and reads again the first word of every page of 2 GiB. With accessed and dirty flags it is an eighth
/// of that, as each page of 4 KiB then causes an exit for each flag.
fn touch_2_gib(suite: &mut Suite) {
    let read = code!("2: add rdx, [rax]", "add rax, 4096", "dec rcx", "jnz 2b");
    let write = code!("2: inc qword ptr [rax]", "add rax, 4096", "dec rcx", "jnz 2b");
    for (size, step) in [("4k", 4096), ("2m", 2 << 20)] {
        for flags in [0, ACCESSED_DIRTY] {
            let touched = if flags == 0 { TOUCHED } else { TOUCHED / 8 };
            build_large(step);
            for page in 0..TARGET_PAGES {
                poke(TARGET + page * 4096, page);
            }
            let mut vm = Vm::new(read);
            vm.clear(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER).set(EPT_POINTER, eptp(LARGE_EPT, flags));
            let _ = invept(2, [0; 2]);
            for (pass, code) in [("read", read), ("write", write), ("read-again", read)] {
                (vm.registers.rax, vm.registers.rcx, vm.registers.rdx) = (WINDOW, touched / 4096, 0);
                vm.set_entry_point(code);
                let verdict = vm.rerun();
                suite.case(
                    format_args!("touch-{size}-{pass}-ad-{}", flags >> 6),
                    format_args!("{verdict} sum={:#x} left={}", vm.registers.rdx, vm.registers.rcx),
                );
            }
        }
    }
}

/// 2 GiB from [`WINDOW`] on, by pages of `size` bytes.
fn build_large(size: u64) {
    let [pdpt, directories, tables] = [1, 2, 4].map(|page| LARGE_EPT + page * 4096);
    for at in 0..512 * 2 {
        poke(LARGE_EPT + at * 8, 0);
    }
    poke(LARGE_EPT, pdpt | 7);
    poke(pdpt, low_directory() | 7);
    for directory in 0..TOUCHED >> 30 {
        poke(pdpt + (1 + directory) * 8, (directories + directory * 4096) | 7);
    }
    for at in 0..TOUCHED >> 21 {
        let small = size == 4096;
        let mapped = TARGET + (at << 21) % (TARGET_PAGES * 4096);
        poke(directories + at * 8, if small { (tables + at * 4096) | 7 } else { mapped | LARGE | LEAF });
        for page in 0..512 * u64::from(small) {
            poke(tables + at * 4096 + page * 8, (mapped + page * 4096) | LEAF);
        }
    }
}
