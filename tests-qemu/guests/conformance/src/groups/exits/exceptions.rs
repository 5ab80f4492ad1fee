//! Exceptions of the nested guest: the bitmap, page-fault masks, vectoring, triple faults (SDM 26.2, 28.2).

use shadow::fields::*;

use super::case;
use super::others::user;
use crate::code;
use crate::memory::GUEST_IDT;
use crate::nested_paging::{GUEST_PT, LINEAR};
use crate::output::Suite;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    bitmap(suite);
    page_faults(suite);
    vectoring(suite);
    triple_faults(suite);
}

/// Instructions that raise each exception, with its bit off and on.
fn bitmap(suite: &mut Suite) {
    const CR0_NE_TS_AM: u64 = 1 << 3 | 1 << 18;
    let instructions: &[(&str, u32, u64)] = &[
        ("de", 0, code!("xor eax, eax", "xor edx, edx", "xor ecx, ecx", "div ecx")),
        ("db-icebp", 1, code!(".byte 0xf1")),
        ("db-trap", 1, code!("pushfq", "or dword ptr [rsp], 0x100", "popfq", "nop", "nop")),
        ("bp", 3, code!("int3")),
        ("bp-int", 3, code!("int 3")),
        ("ud", 6, code!("ud2")),
        ("gp", 13, code!("mov rax, 0x800000000000", "mov al, [rax]")),
        ("gp-selector", 13, code!("mov eax, 0x1238", "mov ds, eax")),
        ("np", 11, code!("mov eax, 0x60", "mov fs, eax")),
        ("ss", 12, code!("mov rbp, 0x800000000000", "mov al, [rbp]")),
        ("nm", 7, code!("fnop")),
        ("gp-int", 13, code!("int 0x30")),
        ("int-80", 32, code!("int 0x80")),
        ("int-13", 13, code!("int 13")),
        ("int-14", 14, code!("int 14")),
        ("int-2", 2, code!("int 2")),
        ("gp-in", 13, code!("xor ecx, ecx", "mov cr8, rcx", "mov ecx, 0x100", "mov cr8, rcx")),
    ];
    for &(name, vector, code) in instructions {
        for (state, bits) in [("none", 0), ("all", u32::MAX), ("own", 1_u32.checked_shl(vector).unwrap_or(0))] {
            case(suite, format_args!("{name}-{state}"), code, |vm| {
                vm.set(EXCEPTION_BITMAP, bits);
                vm.or(GUEST_CR0, CR0_NE_TS_AM & if name == "nm" { u64::MAX } else { 0 });
            });
            case(suite, format_args!("{name}-{state}-cpl-3"), code, |vm| {
                vm.set(EXCEPTION_BITMAP, bits);
                user(vm);
            });
        }
    }
}

fn page_faults(suite: &mut Suite) {
    let kinds: &[(&str, u64)] = &[
        ("read", code!("mov rax, 0x140001000", "mov al, [rax]")),
        ("write", code!("mov rax, 0x140001000", "mov [rax], al")),
        ("fetch", code!("mov rax, 0x140001000", "jmp rax")),
        ("write-read-only", code!("mov rax, 0x140002000", "mov [rax], al")),
        ("reserved", code!("mov rax, 0x140003000", "mov al, [rax]")),
        ("no-execute", code!("mov rax, 0x140004000", "jmp rax")),
    ];
    for &(name, code) in kinds {
        for bit_14 in [0, 1 << 14] {
            for (mask, wanted) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (0x10, 0x10), (0xf, 4), (u32::MAX, 3)] {
                let pages = prepare_pages();
                case(
                    suite,
                    format_args!("pf-{name}-bit-{}-mask-{mask:#x}-match-{wanted:#x}", bit_14 >> 14),
                    code,
                    |vm| {
                        restore_pages(pages);
                        vm.set(EXCEPTION_BITMAP, bit_14);
                        vm.set(PAGE_FAULT_ERROR_CODE_MASK, mask).set(PAGE_FAULT_ERROR_CODE_MATCH, wanted);
                    },
                );
            }
        }
        let pages = prepare_pages();
        case(suite, format_args!("pf-{name}-cpl-3"), code, |vm| {
            restore_pages(pages);
            user(vm);
        });
    }
}

/// Guest page-table entries of pages 1 to 4: not present, read-only, reserved bit, no execute.
fn prepare_pages() -> [u64; 4] {
    let page = |number: u64| crate::nested_paging::WINDOW + number * 4096;
    [page(1) | 6, page(2) | 5, page(3) | 7 | 1 << 51, page(4) | 7 | 1 << 63]
}

/// Sets the entries again, after `Vm::new` has written the tables anew.
fn restore_pages(entries: [u64; 4]) {
    for (index, entry) in (1..).zip(entries) {
        GUEST_PT.set(index, entry);
    }
}

/// Exits while an event is delivered: the IDT entry is not mapped by EPT12 or is bad.
fn vectoring(suite: &mut Suite) {
    for (name, code) in [
        ("int", code!("int 0x80")),
        ("int3", code!("int3")),
        ("icebp", code!(".byte 0xf1")),
        ("ud", code!("ud2")),
        ("gp", code!("mov rax, 0x800000000000", "mov al, [rax]")),
    ] {
        for (place, base, limit) in [
            ("beyond-limit", GUEST_IDT.address(), 0),
            ("not-in-ept", 1 << 34, 0xfff),
            ("in-ept-hole", LINEAR + 0x8000, 0xfff),
        ] {
            for bitmap in [0, 1 << 8, 1 << 13 | 1 << 14, !0x4a] {
                case(suite, format_args!("vectoring-{name}-{place}-bitmap-{bitmap:#x}"), code, |vm| {
                    vm.set(EXCEPTION_BITMAP, bitmap).set(GUEST_IDTR_BASE, base).set(GUEST_IDTR_LIMIT, limit);
                });
            }
        }
    }
    for (name, info) in
        [("interrupt", 0x8000_0021_u32), ("nmi", 0x8000_0202), ("exception", 0x8000_0b0e), ("software", 0x8000_0480)]
    {
        for (place, base, limit) in [("beyond-limit", GUEST_IDT.address(), 0), ("in-ept-hole", LINEAR + 0x8000, 0xfff)]
        {
            case(suite, format_args!("vectoring-injected-{name}-{place}"), code!("nop"), |vm| {
                vm.or(GUEST_RFLAGS, 1 << 9).set(ENTRY_INTERRUPTION_INFO, info).set(ENTRY_EXCEPTION_ERROR_CODE, 2);
                vm.set(ENTRY_INSTRUCTION_LENGTH, 2).set(GUEST_IDTR_BASE, base).set(GUEST_IDTR_LIMIT, limit);
            });
        }
    }
}

fn triple_faults(suite: &mut Suite) {
    for (name, code) in
        [("ud", code!("ud2")), ("int", code!("int 0x80")), ("gp", code!("mov rax, 0x800000000000", "mov al, [rax]"))]
    {
        case(suite, format_args!("triple-fault-{name}"), code, |vm| {
            vm.set(EXCEPTION_BITMAP, 0).set(GUEST_IDTR_LIMIT, 0);
        });
        case(suite, format_args!("double-fault-{name}"), code, |vm| {
            vm.set(EXCEPTION_BITMAP, 1 << 8).set(GUEST_IDTR_LIMIT, 0);
        });
    }
}
