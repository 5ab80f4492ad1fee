//! Single accesses: fields of every kind, by the bits of the bitmaps, with every kind of operand.

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use super::{ALL, NONE, SHADOW, VMREADS, VMWRITES, field_of, linked, observe, set_bit};
use crate::code;
use crate::cpu::invept;
use crate::groups::Change;
use crate::memory::{Page, STACKS, USER_CODE, USER_DATA, guest_stack};
use crate::nested_paging::{LEAF, WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::Vm;

/// The status flags, which both instructions define.
const STATUS_FLAGS: u64 = 0x8d5;
const TRAP_FLAG: u64 = 1 << 8;
const VALUE: u64 = 0xfedc_ba98_7654_3210;

static OPERAND: Page = Page::new();

/// Each width and area, both halves of a 64-bit field, the fields of the feature itself; fields that do not exist, one
/// that exists and may be hidden, and encodings beyond the bitmaps.
const ENCODINGS: [u64; 25] = [
    0x0000,
    0x0002,
    0x0802,
    0x0c02,
    0x2010,
    0x2011,
    0x2018,
    0x2026,
    0x2800,
    0x2801,
    0x2c00,
    0x4002,
    0x4400,
    0x4402,
    0x4816,
    0x4c00,
    0x6000,
    0x6400,
    0x681e,
    0x6c16,
    0x0900,
    0x7fff,
    0x8000,
    0x1_681e,
    1 << 32 | 0x681e,
];

/// An instruction: its code, and its bitmap.
struct Access {
    name: &'static str,
    code: u64,
    bitmap: &'static Page,
}

/// RCX holds the encoding, RAX is the register operand, RBX holds the address of the memory operand, and RDX gets the
/// flags.
fn accesses() -> [Access; 4] {
    [
        ("vmread", code!("popfq", "vmread rax, rcx", "pushfq", "pop rdx"), &VMREADS),
        ("vmread-memory", code!("popfq", "vmread [rbx], rcx", "pushfq", "pop rdx"), &VMREADS),
        ("vmwrite", code!("popfq", "vmwrite rcx, rax", "pushfq", "pop rdx"), &VMWRITES),
        ("vmwrite-memory", code!("popfq", "vmwrite rcx, [rbx]", "pushfq", "pop rdx"), &VMWRITES),
    ]
    .map(|(name, code, bitmap)| Access { name, code, bitmap })
}

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    for access in accesses() {
        for encoding in ENCODINGS {
            for (bit, others) in [(false, ALL), (true, NONE)] {
                let name = format_args!("{}-{encoding:#x}-bit-{}", access.name, u8::from(bit));
                case(suite, name, &access, encoding, |_| set_bit(access.bitmap, encoding, bit), others);
            }
        }
        for (way, change) in WAYS {
            for encoding in [0x2018, 0x681e, 0x0900] {
                let name = format_args!("{}-{encoding:#x}-{way}", access.name);
                case(suite, name, &access, encoding, change, NONE);
            }
        }
    }
}

/// Runs a nested guest whose bitmap words are `bits`, after `change`.
fn case(
    suite: &mut Suite,
    name: core::fmt::Arguments<'_>,
    access: &Access,
    encoding: u64,
    change: impl FnOnce(&mut Vm),
    bits: u64,
) {
    let mut vm = linked(access.code, bits);
    OPERAND.fill(!VALUE);
    vm.registers.rax = VALUE;
    vm.registers.rbx = OPERAND.address();
    vm.registers.rcx = encoding;
    vm.set(GUEST_RSP, guest_stack() - 8);
    set_flags(STATUS_FLAGS);
    change(&mut vm);
    let seen = observe(&mut vm);
    let (full, high) = (field_of(&SHADOW, encoding), field_of(&SHADOW, encoding | 1));
    suite.case(name, format_args!("{seen} memory={:#x} field={full:#x} {high:#x}", OPERAND.get(0)));
}

/// Sets the flags that POPFQ of the nested guest loads.
fn set_flags(flags: u64) {
    let index = (guest_stack() - 8 - STACKS.address()) / 8;
    STACKS.set(index as usize, flags | 2);
}

/// Other circumstances, with no bit of a bitmap set.
const WAYS: [(&str, Change); 9] = [
    ("no-link", |vm| _ = vm.set(VMCS_LINK_POINTER, u64::MAX)),
    ("off", |vm| {
        vm.clear(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING).set(VMCS_LINK_POINTER, u64::MAX);
    }),
    ("inactive", |vm| {
        vm.clear(PRIMARY_CONTROLS, Primary::ACTIVATE_SECONDARY).set(VMCS_LINK_POINTER, u64::MAX);
    }),
    ("user", user),
    ("user-bit-1", |vm| {
        user(vm);
        VMREADS.fill(ALL);
        VMWRITES.fill(ALL);
    }),
    ("user-no-link", |vm| {
        user(vm);
        vm.set(VMCS_LINK_POINTER, u64::MAX);
    }),
    ("single-step", |_| set_flags(TRAP_FLAG)),
    ("one-page", |vm| _ = vm.set(VMWRITE_BITMAP, VMREADS.address())),
    ("bitmap-is-operand", |vm| {
        // The window maps the bitmap itself: writes to it take effect at the next entry.
        WINDOW_PT.set(0, VMREADS.address() | LEAF);
        vm.registers.rbx = WINDOW + 0xff8;
        let _ = invept(2, [0; 2]);
    }),
];

fn user(vm: &mut Vm) {
    vm.set(GUEST_CS_SELECTOR, USER_CODE).or(GUEST_CS_ACCESS_RIGHTS, 0x60);
    vm.set(GUEST_SS_SELECTOR, USER_DATA).or(GUEST_SS_ACCESS_RIGHTS, 0x60);
}
