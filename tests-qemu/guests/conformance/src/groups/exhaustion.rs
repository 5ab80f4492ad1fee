//! What makes a host that maps memory on demand spend its tables: a word in each GiB of the address space, where hardly
//! anything is, and an MSR bitmap in each of many large pages. A nested guest runs right afterwards.

use core::arch::x86_64::__cpuid;

use shadow::fields::*;

use super::ept::{TARGET, accesses};
use crate::attempt;
use crate::code;
use crate::cpu::{invept, set_cr3};
use crate::memory::{WINDOW as LINEAR, host_cr3, peek, poke, set_window};
use crate::nested_paging::{LEAF, VMCALL, WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::Vm;

const GIB: u64 = 1 << 30;
/// Where the machine's memory has ended, with that of every machine that runs the suite.
const FIRST: u64 = 16;
/// More would take the emulator too long.
const MOST: u64 = 1 << 10;
/// The page of [`LINEAR`] that leads to the address.
const PAGE: usize = 4;
/// Memory that no other group of this size uses.
const POOL: u64 = 320 << 20;
const BITMAPS: u64 = 60;
const LARGE_PAGE: u64 = 2 << 20;

/// All of them.
pub fn run(suite: &mut Suite) {
    let bits = __cpuid(0x8000_0008).eax & 0xff;
    touch_each_gib(suite, (1 << bits) / GIB);
    bitmap_in_each_large_page(suite);
    nested_guest(suite);
}

fn touch_each_gib(suite: &mut Suite, gibs: u64) {
    const PRESENT_WRITE: u64 = 3;
    let (mut ones, mut faults) = (0, 0);
    for gib in FIRST..gibs.min(MOST) {
        set_window(PAGE, (gib * GIB) | 0x5000 | PRESENT_WRITE);
        let _ = set_cr3(host_cr3());
        let mut value = 0_u64;
        let linear = LINEAR + PAGE as u64 * 0x1000;
        let outcome = attempt!("mov {value}, [{linear}]"; value = out(reg) value, linear = in(reg) linear);
        ones += u64::from(value == u64::MAX);
        faults += u64::from(outcome != crate::fault::Outcome::Success);
    }
    set_window(PAGE, 0);
    let _ = set_cr3(host_cr3());
    suite.case("a-word-in-each-gib", format_args!("{ones} are ones, {faults} faults"));
}

fn bitmap_in_each_large_page(suite: &mut Suite) {
    /// IA32_SYSENTER_CS.
    const MSR: u64 = 0x174;
    let mut right = 0;
    for number in 0..BITMAPS {
        let bitmap = POOL + number * LARGE_PAGE;
        (0..512).for_each(|word| poke(bitmap + word * 8, 0));
        let exits = number % 2;
        poke(bitmap + MSR / 64 * 8, exits << (MSR % 64));
        let mut vm = Vm::new(code!("rdmsr"));
        vm.set(MSR_BITMAP, bitmap);
        vm.registers.rcx = MSR;
        let _ = vm.run();
        right += u64::from((vm.get(EXIT_REASON) == 31) == (exits != 0));
    }
    suite.case("a-bitmap-in-each-large-page", format_args!("{right} of {BITMAPS}"));
}

/// Reads and writes in the window, after its tables were taken away.
fn nested_guest(suite: &mut Suite) {
    for number in 0..BITMAPS {
        poke(POOL + number * LARGE_PAGE, VMCALL);
    }
    let mut right = 0;
    for number in 0..BITMAPS {
        let page = POOL + number * LARGE_PAGE;
        let mut vm = Vm::new(code!("mov rcx, [rax]", "mov [rax + 8], rcx"));
        WINDOW_PT.set(TARGET, page | LEAF);
        let _ = invept(2, [0; 2]);
        vm.registers.rax = WINDOW + TARGET as u64 * 4096;
        let _ = vm.run();
        right += u64::from(vm.registers.rcx == VMCALL && peek(page + 8) == VMCALL);
    }
    suite.case("pages-of-a-nested-guest", format_args!("{right} of {BITMAPS}"));
    for (name, code) in accesses() {
        let mut vm = Vm::new(code);
        vm.registers.rax = WINDOW + TARGET as u64 * 4096;
        suite.case(format_args!("access-{name}"), vm.run());
    }
}
