//! EPT: permissions, misconfigurations, page sizes, accessed and dirty flags, the nested guest's own page walk,
//! invalidation (SDM 29.3, 29.4).

use core::fmt;

use shadow::fields::*;

use super::exits::user;
use crate::code;
use crate::cpu::{invept, invvpid};
use crate::fault::Outcome;
use crate::memory::{Page, SPARE};
use crate::nested_paging::*;
use crate::output::Suite;
use crate::vm::{Verdict, Vm};

/// EPTP: accessed and dirty flags.
pub const ACCESSED_DIRTY: u64 = 1 << 6;
/// An entry that maps a page of 2 MiB or 1 GiB.
pub const LARGE: u64 = 1 << 7;
/// The page that most cases access: the second of the window.
pub const TARGET: usize = 1;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    permissions(suite);
    reserved_bits(suite);
    memory_types(suite);
    sizes(suite);
    flags(suite);
    guest_walk(suite);
    present_later(suite);
    invalidation(suite);
    vpids(suite);
    beyond(suite);
}

/// Ways to access [`TARGET`] through the identity map.
pub fn accesses() -> [(&'static str, u64); 6] {
    [
        ("read", code!("mov rax, 0x40001000", "mov al, [rax]")),
        ("write", code!("mov rax, 0x40001000", "mov [rax + 8], al")),
        ("fetch", code!("mov rax, 0x40001000", "jmp rax")),
        ("read-write", code!("mov rax, 0x40001000", "lock inc dword ptr [rax + 8]")),
        ("push", code!("mov rsp, 0x40001100", "push rax", "mov rsp, 0x40001100")),
        ("crossing", code!("mov rax, 0x40000ffc", "mov rcx, [rax]")),
    ]
}

/// Prints the entries that lead to [`TARGET`] as well: their flags may have changed.
pub struct WithEntries(pub Verdict);

impl fmt::Display for WithEntries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = [PML4.get(0), PDPT.get(1), WINDOW_PD.get(0), WINDOW_PT.get(TARGET), WINDOW_PT.get(0)];
        write!(f, "{} {:x?}", self.0, entries.map(|entry| entry & 0xfff))
    }
}

/// Runs a guest at `code`. `change` edits the VMCS and the tables after they were written anew.
fn case(suite: &mut Suite, name: impl fmt::Display, code: u64, change: impl FnOnce(&mut Vm)) {
    let mut vm = Vm::new(code);
    change(&mut vm);
    invalidate_all();
    let verdict = vm.run();
    suite.case(name, WithEntries(verdict));
}

fn invalidate_all() {
    let _ = invept(2, [0; 2]);
}

/// Replaces the bits of `mask` in an entry.
pub fn replace_bits(table: &Page, index: usize, mask: u64, bits: u64) {
    table.set(index, table.get(index) & !mask | bits);
}

/// Every combination of read, write and execute at every level, for every access.
fn permissions(suite: &mut Suite) {
    let levels: [(&str, &Page, usize); 3] = [("pt", &WINDOW_PT, TARGET), ("pd", &WINDOW_PD, 0), ("pdpt", &PDPT, 1)];
    for (level, table, index) in levels {
        for rights in 0..8 {
            for (access, code) in accesses() {
                for dirty in [0, ACCESSED_DIRTY] {
                    let name = format_args!("{level}-rights-{rights:03b}-{access}-ad-{}", dirty >> 6);
                    case(suite, name, code, |vm| {
                        vm.or(EPT_POINTER, dirty);
                        replace_bits(table, index, 7, rights);
                    });
                    if dirty == 0 {
                        let name = format_args!("{level}-rights-{rights:03b}-{access}-cpl-3");
                        case(suite, name, code, |vm| {
                            replace_bits(table, index, 7, rights);
                            user(vm);
                        });
                    }
                }
            }
        }
    }
}

/// Bits that are reserved, ignored or neither, at each level.
fn reserved_bits(suite: &mut Suite) {
    let read = accesses()[0].1;
    let levels: [(&str, &Page, usize); 4] =
        [("pml4", &PML4, 0), ("pdpt", &PDPT, 1), ("pd", &WINDOW_PD, 0), ("pt", &WINDOW_PT, TARGET)];
    for (level, table, index) in levels {
        // Bit 7 of a PDPT or PD entry makes it a large page: see `sizes`. The PML4 entry also maps the code.
        for bit in (3..12).chain(40..64).filter(|bit| *bit != 7 || level == "pml4" || level == "pt") {
            case(suite, format_args!("{level}-bit-{bit}"), read, |_| table.set(index, table.get(index) ^ 1 << bit));
        }
        for bit in (3..12).chain(40..64).filter(|_| level != "pml4") {
            let name = format_args!("{level}-absent-bit-{bit}");
            case(suite, name, read, |_| table.set(index, table.get(index) & !7 ^ 1 << bit));
        }
    }
    for bit in 12..21 {
        case(suite, format_args!("large-2m-bit-{bit}"), read, |_| WINDOW_PD.set(0, 2 << 20 | LARGE | LEAF | 1 << bit));
    }
    for bit in 12..30 {
        case(suite, format_args!("large-1g-bit-{bit}"), read, |_| PDPT.set(1, LARGE | LEAF | 1 << bit));
    }
}

fn memory_types(suite: &mut Suite) {
    for kind in 0..8 {
        for (access, code) in &accesses()[..3] {
            case(suite, format_args!("type-{kind}-{access}"), *code, |_| {
                replace_bits(&WINDOW_PT, TARGET, 7 << 3, kind << 3);
            });
        }
        case(suite, format_args!("type-{kind}-absent"), accesses()[0].1, |_| {
            replace_bits(&WINDOW_PT, TARGET, 7 << 3 | 7, kind << 3);
        });
    }
}

/// Writes through a page of each size reach the memory behind it.
fn sizes(suite: &mut Suite) {
    let code = code!("mov qword ptr [rax], 0x1234567", "mov rcx, [rax]");
    let offset = SPARE.address() & ((2 << 20) - 1);
    let cases: [(&str, u64, fn()); 3] = [
        ("2m", WINDOW + offset, || WINDOW_PD.set(0, SPARE.address() & !((2 << 20) - 1) | LARGE | LEAF)),
        ("1g", WINDOW + SPARE.address(), || PDPT.set(1, LARGE | LEAF)),
        ("4k", WINDOW + 0x1000, || WINDOW_PT.set(TARGET, SPARE.address() | LEAF)),
    ];
    for (name, address, map) in cases {
        for rights in 0..8 {
            let mut vm = Vm::new(code);
            map();
            let (table, index) = match name {
                "2m" => (&WINDOW_PD, 0),
                "1g" => (&PDPT, 1),
                _ => (&WINDOW_PT, TARGET),
            };
            replace_bits(table, index, 7, rights);
            invalidate_all();
            vm.registers.rax = address;
            let verdict = vm.run();
            let (rcx, memory) = (vm.registers.rcx, SPARE.get(0));
            suite.case(
                format_args!("size-{name}-rights-{rights:03b}"),
                format_args!("{} rcx={rcx:#x} memory={memory:#x}", WithEntries(verdict)),
            );
        }
        for dirty in [0, ACCESSED_DIRTY] {
            let mut vm = Vm::new(code!("mov rcx, [rax]"));
            map();
            vm.or(EPT_POINTER, dirty);
            invalidate_all();
            vm.registers.rax = address;
            let verdict = vm.run();
            suite.case(format_args!("size-{name}-read-ad-{}", dirty >> 6), WithEntries(verdict));
            vm.set(GUEST_RIP, code);
            let verdict = vm.run();
            suite.case(format_args!("size-{name}-then-write-ad-{}", dirty >> 6), WithEntries(verdict));
        }
    }
}

/// Accessed and dirty flags after each access, one after the other.
fn flags(suite: &mut Suite) {
    for dirty in [0, ACCESSED_DIRTY] {
        for (first_name, first) in accesses() {
            for (second_name, second) in accesses() {
                let mut vm = Vm::new(first);
                vm.or(EPT_POINTER, dirty);
                invalidate_all();
                let verdict = vm.run();
                let first_result = WithEntries(verdict);
                let name = format_args!("flags-ad-{}-{first_name}-{second_name}", dirty >> 6);
                suite.case(format_args!("{name}-first"), first_result);
                vm.set(GUEST_RIP, second).set(GUEST_RSP, crate::memory::guest_stack());
                let verdict = vm.run();
                suite.case(name, WithEntries(verdict));
            }
        }
    }
}

/// Violations and misconfigurations of pages that hold the nested guest's page table (SDM 28.2.1, bits 7 and 8).
fn guest_walk(suite: &mut Suite) {
    const GUEST_PT_PAGE: usize = 6;
    let codes = [
        ("read", code!("mov rax, 0x140001000", "mov al, [rax]")),
        ("write", code!("mov rax, 0x140001000", "mov [rax + 8], al")),
        ("fetch", code!("mov rax, 0x140001000", "jmp rax")),
    ];
    for (access, code) in codes {
        for rights in 0..8 {
            for dirty in [0, ACCESSED_DIRTY] {
                for guest_flags in [0, 0x20, 0x60] {
                    let mut vm = Vm::new(code);
                    vm.or(EPT_POINTER, dirty);
                    for index in 0..WINDOW_PAGES {
                        let entry = (WINDOW + index as u64 * 4096) | 7 | guest_flags;
                        PAGES.set(GUEST_PT_PAGE * 512 + index, entry);
                    }
                    guest_linear_table(WINDOW + GUEST_PT_PAGE as u64 * 4096);
                    replace_bits(&WINDOW_PT, GUEST_PT_PAGE, 7, rights);
                    invalidate_all();
                    let verdict = vm.run();
                    let entry = PAGES.get(GUEST_PT_PAGE * 512 + 1) & 0xfff;
                    suite.case(
                        format_args!("walk-{access}-rights-{rights:03b}-ad-{}-guest-{guest_flags:#x}", dirty >> 6),
                        format_args!("{} guest={entry:#x}", WithEntries(verdict)),
                    );
                }
            }
        }
    }
    for index in 0..WINDOW_PAGES {
        PAGES.set(GUEST_PT_PAGE * 512 + index, 0);
    }
    answer_calls();
}

/// An entry that was not present, or permitted less, may be changed without INVEPT after the violation.
fn present_later(suite: &mut Suite) {
    let levels: [(&str, &Page, usize); 3] = [("pt", &WINDOW_PT, TARGET), ("pd", &WINDOW_PD, 0), ("pdpt", &PDPT, 1)];
    for (level, table, index) in levels {
        for rights in [0, 1, 4, 5] {
            for (access, code) in accesses() {
                let mut vm = Vm::new(code);
                let whole = table.get(index);
                replace_bits(table, index, 7, rights);
                invalidate_all();
                let verdict = vm.run();
                suite.case(format_args!("later-{level}-{rights:03b}-{access}-before"), WithEntries(verdict));
                table.set(index, whole);
                let verdict = vm.rerun();
                suite.case(format_args!("later-{level}-{rights:03b}-{access}-after"), WithEntries(verdict));
            }
        }
    }
}

/// Changes that need INVEPT are seen after it.
fn invalidation(suite: &mut Suite) {
    let code = code!("mov rax, 0x40001008", "mov rcx, [rax]");
    PAGES.set(512 + 1, 0x1111);
    PAGES.set(2 * 512 + 1, 0x2222);
    type Invalidate = fn() -> Outcome;
    let ways: [(&str, Invalidate); 2] = [("single", || invept(1, [eptp(), 0])), ("global", || invept(2, [0; 2]))];
    for (way, invalidate) in ways {
        for vpid in [false, true] {
            let mut vm = if vpid { Vm::new(code) } else { Vm::without_vpid(code) };
            invalidate_all();
            let first = vm.run();
            suite.case(
                format_args!("invept-{way}-vpid-{vpid}-first"),
                format_args!("{first} rcx={:#x}", vm.registers.rcx),
            );
            WINDOW_PT.set(TARGET, (PAGES.address() + 0x2000) | LEAF);
            let _ = invalidate();
            let second = vm.rerun();
            suite.case(
                format_args!("invept-{way}-vpid-{vpid}-moved"),
                format_args!("{second} rcx={:#x}", vm.registers.rcx),
            );
            replace_bits(&WINDOW_PT, TARGET, 7, 0);
            let _ = invalidate();
            let third = vm.rerun();
            suite.case(format_args!("invept-{way}-vpid-{vpid}-removed"), third);
            replace_bits(&WINDOW_PT, TARGET, 7, 3);
            let fourth = vm.rerun();
            suite.case(
                format_args!("invept-{way}-vpid-{vpid}-back"),
                format_args!("{fourth} rcx={:#x}", vm.registers.rcx),
            );
            replace_bits(&WINDOW_PD, 0, 7, 0);
            let _ = invalidate();
            let fifth = vm.rerun();
            suite.case(format_args!("invept-{way}-vpid-{vpid}-table-removed"), fifth);
        }
    }
}

/// The hypervisor edits the nested guest's page tables: the guest sees the edits after INVVPID, or without VPID after
/// any entry.
fn vpids(suite: &mut Suite) {
    let code = code!("mov rax, 0x140001008", "mov rcx, [rax]");
    PAGES.set(512 + 1, 0x1111);
    PAGES.set(2 * 512 + 1, 0x2222);
    for kind in [None, Some(0), Some(1), Some(2), Some(3)] {
        let mut vm = if kind.is_some() { Vm::new(code) } else { Vm::without_vpid(code) };
        vm.set(VPID, 5);
        let _ = invvpid(2, [0; 2]);
        let first = vm.run();
        suite.case(format_args!("invvpid-{kind:?}-first"), format_args!("{first} rcx={:#x}", vm.registers.rcx));
        GUEST_PT.set(TARGET, (WINDOW + 0x2000) | 7);
        if let Some(kind) = kind {
            let _ = invvpid(kind, [5, LINEAR + 0x1000]);
        }
        let second = vm.rerun();
        suite.case(format_args!("invvpid-{kind:?}-moved"), format_args!("{second} rcx={:#x}", vm.registers.rcx));
        GUEST_PT.set(TARGET, 0);
        if let Some(kind) = kind {
            let _ = invvpid(kind, [5, LINEAR + 0x1000]);
        }
        let third = vm.rerun();
        suite.case(format_args!("invvpid-{kind:?}-removed"), third);
    }
}

/// Guest-physical addresses that EPT12 does not map, and physical addresses without memory or device.
fn beyond(suite: &mut Suite) {
    for address in [2_u64 << 30, (2 << 30) + 0xfff] {
        let code = code!("mov ecx, [rax]");
        case(suite, format_args!("unmapped-{address:#x}"), code, |vm| vm.registers.rax = address);
    }
    // 768 MiB into the window's GiB, a physical address that the machine's memory does not reach.
    for physical in [0xd000_0000_u64, 1 << 36, (1 << 40) - 4096] {
        let code = code!("mov rax, 0x40001000", "mov ecx, [rax]");
        case(suite, format_args!("nothing-at-{physical:#x}"), code, |_| WINDOW_PT.set(TARGET, physical | 7));
    }
}
