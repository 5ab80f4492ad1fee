//! Page-modification logging (SDM 29.3.6): the index and its limits, and which accesses are logged.

use shadow::controls::Secondary;
use shadow::fields::*;

use super::{Change, flip};
use crate::code;
use crate::cpu::invept;
use crate::memory::{FAR_FROM_THE_IMAGE, MODIFICATION_LOG, guest_stack};
use crate::nested_paging::{self, LINEAR, WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::{Verdict, Vm};

const ACCESSED_DIRTY: u64 = 1 << 6;
const DIRTY: u64 = 1 << 9;
/// The value of a log entry that the processor has not written.
const UNUSED: u64 = u64::MAX;
const LAST: u16 = 511;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    indices(suite);
    accesses(suite);
    dirty_already(suite);
    resumed(suite);
    flip(suite, "address", PML_ADDRESS, 0..64, |vm| {
        logging(vm, LAST);
        vm.set(PML_ADDRESS, FAR_FROM_THE_IMAGE);
    });
}

fn logging(vm: &mut Vm, index: u16) {
    MODIFICATION_LOG.fill(UNUSED);
    nested_paging::clear_accessed_and_dirty();
    vm.or(EPT_POINTER, ACCESSED_DIRTY).or(SECONDARY_CONTROLS, Secondary::ENABLE_PML);
    vm.set(PML_ADDRESS, MODIFICATION_LOG.address()).set(PML_INDEX, index);
    vm.registers.rcx = WINDOW;
    let _ = invept(2, [0; 2]);
}

/// The verdict, the index, and each entry of the log that was written, with its place. The addresses of the image's own
/// pages depend on its linking, and are the same on both machines.
fn print(suite: &mut Suite, name: impl core::fmt::Display, vm: &Vm, verdict: &Verdict) {
    let mut entries = [(0, 0); 8];
    let written = (0..512).map(|place| (place, MODIFICATION_LOG.get(place))).filter(|(_, entry)| *entry != UNUSED);
    let mut count = 0;
    for (slot, entry) in entries.iter_mut().zip(written) {
        *slot = entry;
        count += 1;
    }
    let flags: [u64; 4] = core::array::from_fn(|page| WINDOW_PT.get(page) >> 8 & 3);
    let index = vm.get(PML_INDEX);
    suite.case(name, format_args!("{verdict} index={index:#x} log={:x?} flags={flags:x?}", &entries[..count]));
}

fn case(suite: &mut Suite, name: impl core::fmt::Display, code: u64, index: u16, change: impl FnOnce(&mut Vm)) {
    let mut vm = Vm::new(code);
    logging(&mut vm, index);
    change(&mut vm);
    let verdict = vm.run();
    print(suite, name, &vm, &verdict);
}

/// Writes three pages, with room for fewer or more: the index wraps below 0, and above 511 the log is full.
fn indices(suite: &mut Suite) {
    let three = code!("mov [rcx + 8], al", "mov [rcx + 0x1008], al", "mov [rcx + 0x2ff8], al");
    for index in [0, 1, 2, 3, 4, 255, 510, LAST, 512, 513, 0x7fff, 0x8000, 0xfffe, 0xffff] {
        case(suite, format_args!("index-{index:#x}"), three, index, |_| ());
    }
}

/// Ways to modify a page, or not to.
fn accesses(suite: &mut Suite) {
    let codes: [(&str, u64); 9] = [
        ("nothing", code!("nop")),
        ("read", code!("mov al, [rcx]")),
        ("write", code!("mov [rcx + 0x18], al")),
        ("read-write", code!("lock inc dword ptr [rcx + 8]")),
        ("compare", code!("mov eax, 1", "lock cmpxchg [rcx + 8], edx")),
        ("crossing", code!("mov [rcx + 0xffc], rax")),
        ("string", code!("lea rdi, [rcx + 0xff0]", "mov ecx, 8", "rep stosq")),
        ("push", code!("lea rsp, [rcx + 0x1010]", "push rax", "push rax", "push rax")),
        ("guest-tables", code!("mov rax, 0x140000000", "mov [rax + 8], al")),
    ];
    let ways: [(&str, Change); 4] = [
        ("plain", |_| ()),
        ("no-flags", |vm| _ = vm.clear(EPT_POINTER, ACCESSED_DIRTY)),
        ("read-only", |_| {
            for page in 0..nested_paging::WINDOW_PAGES {
                WINDOW_PT.set(page, WINDOW_PT.get(page) & !2);
            }
        }),
        ("off", |vm| _ = vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_PML)),
    ];
    for (name, code) in codes {
        for (way, change) in ways {
            for index in [LAST, 0, 0xffff] {
                case(suite, format_args!("{name}-{way}-{index:#x}"), code, index, change);
            }
        }
    }
    // An event that is delivered on a page that is not dirty.
    for index in [LAST, 0xffff] {
        case(suite, format_args!("delivery-{index:#x}"), code!("nop"), index, |vm| {
            vm.set(GUEST_RSP, WINDOW + 0x1100).set(ENTRY_INTERRUPTION_INFO, 0x8000_0306);
        });
    }
}

/// A dirty flag that is set already is not set again, so nothing is logged.
fn dirty_already(suite: &mut Suite) {
    for dirty in [0, DIRTY] {
        for (name, address) in [("identity", WINDOW), ("linear", LINEAR)] {
            let code = code!("mov [rcx + 8], al", "mov [rcx + 16], al");
            case(suite, format_args!("{name}-dirty-{}", dirty >> 9), code, LAST, |vm| {
                WINDOW_PT.set(0, WINDOW_PT.get(0) | dirty);
                vm.registers.rcx = address;
            });
        }
    }
}

/// After "page-modification log full": with a new index the same instruction is repeated, and is logged.
fn resumed(suite: &mut Suite) {
    let code = code!("mov [rcx + 8], al", "mov [rcx + 0x1008], al", "mov [rcx + 0x2008], al", "mov [rcx + 0x3008], al");
    let mut vm = Vm::new(code);
    logging(&mut vm, 2);
    for entry in 0..4 {
        let verdict = vm.run();
        print(suite, format_args!("resumed-{entry}"), &vm, &verdict);
        vm.set(PML_INDEX, LAST - entry);
    }
    // After flags are cleared and invalidated, pages are logged again. Clearing alone is not tried: a cached
    // translation may still be dirty.
    let mut vm = Vm::new(code);
    logging(&mut vm, LAST);
    for round in 0..2 {
        vm.set(GUEST_RIP, code).set(GUEST_RSP, guest_stack()).set(PML_INDEX, LAST);
        nested_paging::clear_accessed_and_dirty();
        let _ = invept(2, [0; 2]);
        let verdict = vm.run();
        print(suite, format_args!("again-{round}"), &vm, &verdict);
    }
}
