//! EPT12 and the nested guest's own page tables, edited while walks are under way.

use shadow::fields::*;

use super::arena::{self, EPT_PD, EPT_PT, PAGE_TABLE, target};
use super::{Race, VMCALL, enter};
use crate::code;
use crate::cpu::{invept, invvpid};
use crate::nested_paging::*;
use crate::random::Random;
use crate::vm::{Verdict, Vm};

const EXCEPTION: u64 = 0;
const EPT_VIOLATION: u64 = 48;
const EPT_MISCONFIGURATION: u64 = 49;

const LARGE: u64 = 1 << 7;
const ACCESSED_DIRTY: u64 = 1 << 6;
const WRITE_BACK: u64 = 6 << 3;

pub const RACES: &[Race] = &[
    Race {
        name: "ept",
        build: arena::build_spaces,
        exists: || true,
        prepare: arena::enter_spaces,
        step: |vm, random| access(vm, random, WINDOW),
        edit: |random, _| edit_ept(random),
        allowed: &[VMCALL, EPT_VIOLATION, EPT_MISCONFIGURATION],
    },
    Race {
        name: "ept-accessed-dirty",
        build: arena::build_spaces,
        exists: || true,
        prepare: |vm| {
            arena::enter_spaces(vm);
            vm.or(EPT_POINTER, ACCESSED_DIRTY);
        },
        step: |vm, random| access(vm, random, WINDOW),
        edit: |random, _| edit_ept(random),
        allowed: &[VMCALL, EPT_VIOLATION, EPT_MISCONFIGURATION],
    },
    Race {
        name: "page-tables",
        build: arena::build_spaces,
        exists: || true,
        prepare: |vm| {
            arena::enter_spaces(vm);
            vm.set(VPID, 9);
        },
        step: |vm, random| access(vm, random, LINEAR),
        edit: |random, _| edit_page_table(random),
        allowed: &[VMCALL, EXCEPTION, EPT_VIOLATION],
    },
    Race {
        name: "ept-and-page-tables",
        build: arena::build_spaces,
        exists: || true,
        prepare: arena::enter_spaces,
        step: |vm, random| access(vm, random, LINEAR),
        edit: |random, _| {
            edit_ept(random);
            edit_page_table(random);
        },
        allowed: &[VMCALL, EXCEPTION, EPT_VIOLATION, EPT_MISCONFIGURATION],
    },
];

/// An access to a page of the window; an invalidation now and then.
fn access(vm: &mut Vm, random: &mut Random, window: u64) -> Verdict {
    match random.below(8) {
        0 => _ = invept(2, [0; 2]),
        1 => _ = invept(1, [vm.get(EPT_POINTER), 0]),
        2 => _ = invvpid(1, [9, 0]),
        _ => (),
    }
    vm.registers.rax = window + random.below(WINDOW_PAGES as u64) * 4096;
    let code = match random.below(4) {
        0 => code!("mov [rax + 8], cl"),
        1 => code!("jmp rax"),
        2 => code!("lock inc dword ptr [rax + 8]"),
        _ => code!("mov rcx, [rax + 16]"),
    };
    enter(vm, code)
}

/// Writes another entry of EPT12. Only the race's own pages may be writable or executable; any page may be readable.
fn edit_ept(random: &mut Random) {
    let entry = match random.below(8) {
        0 => 0,
        // Misconfigured: writable and not readable, or with a memory type that does not exist.
        1 => target(0) | 2,
        2 => target(0) | 7 | 7 << 3,
        3 => (random.below(1 << 52) >> random.below(40)) & !0xfff | 1 | WRITE_BACK,
        4 => target(random.below(WINDOW_PAGES as u64)) | WRITE_BACK | 1,
        _ => target(random.below(WINDOW_PAGES as u64)) | LEAF,
    };
    EPT_PT.set(random.below(WINDOW_PAGES as u64) as usize, entry);
    match random.below(16) {
        0 => EPT_PD.set(0, 0),
        1 => EPT_PD.set(0, LARGE_PAGE | LARGE | LEAF),
        2 => EPT_PD.set(0, EPT_PT.address() | 2),
        3..8 => EPT_PD.set(0, EPT_PT.address() | 7),
        _ => (),
    }
}

/// Another entry of the nested guest's page table. Above 3 GiB, the local APIC is the only memory that EPT12 maps and
/// that accesses must not touch.
fn edit_page_table(random: &mut Random) {
    const PRESENT: u64 = 1;
    const PRESENT_WRITE_USER: u64 = 7;
    const RESERVED: u64 = 1 << 51;
    let page = WINDOW + random.below(WINDOW_PAGES as u64) * 4096;
    let entry = match random.below(8) {
        0 => 0,
        1 => page | PRESENT_WRITE_USER | RESERVED,
        2 => page | PRESENT,
        3 => 1 << 33 | random.below(1 << 32) & !0xfff | PRESENT_WRITE_USER,
        _ => page | PRESENT_WRITE_USER,
    };
    PAGE_TABLE.set(random.below(WINDOW_PAGES as u64) as usize, entry);
}
