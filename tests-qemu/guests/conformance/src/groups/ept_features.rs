//! Mode-based execute control (SDM 29.3.3.2), EPTP switching by VMFUNC (26.5.6), virtualization exceptions (26.5.7).

use core::fmt;

use shadow::controls::{Secondary, VmFunctions};
use shadow::fields::*;
use shadow::registers::CR0_PE;

use super::ept::{ACCESSED_DIRTY, TARGET, WithEntries, accesses, replace_bits};
use super::exits::user;
use super::{as_it_is, entry_guest::protected, flip};
use crate::cpu::invept;
use crate::memory::{FAR_FROM_THE_IMAGE, Page, SPARE};
use crate::nested_paging::*;
use crate::output::Suite;
use crate::vm::{Verdict, Vm};
use crate::{code, code_32};

const LEVELS: [(&str, &Page, usize); 3] = [("pt", &WINDOW_PT, TARGET), ("pd", &WINDOW_PD, 0), ("pdpt", &PDPT, 1)];
const RIGHTS: u64 = 7;
const USER_EXECUTE: u64 = 1 << 10;
const SUPPRESS_VE: u64 = 1 << 63;

static EPTP_LIST: Page = Page::new();
static OTHER_PML4: Page = Page::new();
static OTHER_PDPT: Page = Page::new();
static OTHER_PD: Page = Page::new();
static OTHER_PT: Page = Page::new();

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    mode_based_execute(suite);
    mode_based_later(suite);
    vm_functions(suite);
    vm_function_fields(suite);
    virtualization_exceptions(suite);
    conditions_of_virtualization_exceptions(suite);
    reset_guest();
}

/// Accesses to [`TARGET`] by a user-mode and by a supervisor-mode linear address.
fn mode_accesses() -> [(&'static str, u64, u64); 6] {
    const SUPERVISOR: u64 = LINEAR + TARGET as u64 * 4096;
    const USER: u64 = WINDOW + TARGET as u64 * 4096;
    let (read, write, fetch) = (code!("mov cl, [rax]"), code!("mov [rax + 8], cl"), code!("jmp rax"));
    [
        ("user-read", read, USER),
        ("user-write", write, USER),
        ("user-fetch", fetch, USER),
        ("supervisor-read", read, SUPERVISOR),
        ("supervisor-write", write, SUPERVISOR),
        ("supervisor-fetch", fetch, SUPERVISOR),
    ]
}

fn by_mode(vm: &mut Vm, address: u64) {
    const GUEST_USER: u64 = 4;
    allow_user_execution();
    vm.or(SECONDARY_CONTROLS, Secondary::MODE_BASED_EXECUTE);
    GUEST_PT.set(TARGET, GUEST_PT.get(TARGET) & !GUEST_USER);
    vm.registers.rax = address;
}

/// Bits 2:0 and 10 of an entry.
fn rights(bits: u64) -> u64 {
    bits & RIGHTS | bits >> 3 << 10
}

fn mode_based_execute(suite: &mut Suite) {
    for (level, table, index) in LEVELS {
        for bits in 0..16 {
            for (access, code, address) in mode_accesses() {
                for dirty in [0, ACCESSED_DIRTY] {
                    answer_calls();
                    let mut vm = Vm::new(code);
                    vm.or(EPT_POINTER, dirty);
                    by_mode(&mut vm, address);
                    replace_bits(table, index, RIGHTS | USER_EXECUTE, rights(bits));
                    let _ = invept(2, [0; 2]);
                    let verdict = vm.run();
                    let name = format_args!("by-mode-{level}-{bits:04b}-{access}-ad-{}", dirty >> 6);
                    suite.case(name, WithEntries(verdict));
                }
            }
        }
    }
}

/// Several accesses to a page that permits some of them, with the control switched off and on in between.
fn mode_based_later(suite: &mut Suite) {
    for bits in [0b0001, 0b0101, 0b1001, 0b1101, 0b0100, 0b1000, 0b1100] {
        for (first, first_code, first_address) in mode_accesses() {
            answer_calls();
            let mut vm = Vm::new(first_code);
            by_mode(&mut vm, first_address);
            replace_bits(&WINDOW_PT, TARGET, RIGHTS | USER_EXECUTE, rights(bits));
            let _ = invept(2, [0; 2]);
            let verdict = vm.run();
            suite.case(format_args!("by-mode-then-{bits:04b}-{first}"), WithEntries(verdict));
            for (second, second_code, second_address) in mode_accesses() {
                vm.set_entry_point(second_code);
                vm.registers.rax = second_address;
                let verdict = vm.rerun();
                suite.case(format_args!("by-mode-then-{bits:04b}-{first}-{second}"), WithEntries(verdict));
            }
            vm.clear(SECONDARY_CONTROLS, Secondary::MODE_BASED_EXECUTE);
            let _ = invept(2, [0; 2]);
            let verdict = vm.rerun();
            suite.case(format_args!("by-mode-then-{bits:04b}-{first}-off"), WithEntries(verdict));
        }
    }
}

/// An EPT12 whose window shows the pages in reverse order; returns its EPTP.
fn other_ept() -> u64 {
    OTHER_PML4.set(0, OTHER_PDPT.address() | RIGHTS);
    OTHER_PDPT.set(0, low_directory() | RIGHTS);
    OTHER_PDPT.set(1, OTHER_PD.address() | RIGHTS);
    OTHER_PD.set(0, OTHER_PT.address() | RIGHTS);
    for page in 0..WINDOW_PAGES {
        OTHER_PT.set(page, (PAGES.address() + (WINDOW_PAGES - 1 - page) as u64 * 4096) | LEAF);
    }
    eptp() - PML4.address() + OTHER_PML4.address()
}

/// Fills the EPTP list: valid entries at 0, 1 and 511, and one entry for each way to be invalid.
fn fill_list(flags: u64) {
    let (this, other) = (eptp() | flags, other_ept() | flags);
    let entries =
        [this, other, 0, other & !7 | 1, other & !(7 << 3), other | 1 << 7, other | 1 << 11, other | 1 << 51, u64::MAX];
    for (at, entry) in entries.into_iter().enumerate() {
        EPTP_LIST.set(at, entry);
    }
    EPTP_LIST.set(511, other);
}

pub(super) fn switching(vm: &mut Vm) {
    fill_list(0);
    for page in 0..WINDOW_PAGES {
        PAGES.set(page * 512 + 1, 0x1111 * page as u64);
    }
    vm.or(SECONDARY_CONTROLS, Secondary::ENABLE_VM_FUNCTIONS);
    vm.set(VM_FUNCTION_CONTROLS, VmFunctions::EPTP_SWITCHING).set(EPTP_LIST_ADDRESS, EPTP_LIST.address());
    vm.registers.rdx = WINDOW + 0x1008;
    let _ = invept(2, [0; 2]);
}

/// The state after a switch: the EPTP of the VMCS, the EPTP index, and the values that the guest read.
struct Switched<'a>(Verdict, &'a Vm);

impl fmt::Display for Switched<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(verdict, vm) = self;
        let eptp = vm.get(EPT_POINTER);
        let at = (0..512).find(|&at| EPTP_LIST.get(at) == eptp);
        write!(f, "{verdict} eptp={at:?} index={:#x} read={:#x}", vm.get(EPTP_INDEX), vm.registers.rbx)
    }
}

fn vm_functions(suite: &mut Suite) {
    // The page is read before and after, so that a translation of the old EPT is in every cache.
    let code = code!("mov rbx, [rdx]", "vmfunc", "mov rbx, [rdx]");
    let mut case = |name: fmt::Arguments<'_>, function: u64, entry: u64, change: &dyn Fn(&mut Vm)| {
        let mut vm = Vm::new(code);
        switching(&mut vm);
        (vm.registers.rax, vm.registers.rcx) = (function, entry);
        change(&mut vm);
        let verdict = vm.run();
        suite.case(name, Switched(verdict, &vm));
    };
    for entry in (0..10).chain([511, 512, 513, 0xffff_ffff, 1 << 32, (1 << 32) + 1]) {
        case(format_args!("vmfunc-entry-{entry:#x}"), 0, entry, &as_it_is);
        case(format_args!("vmfunc-entry-{entry:#x}-off"), 0, entry, &|vm| {
            _ = vm.set(VM_FUNCTION_CONTROLS, VmFunctions::empty())
        });
        case(format_args!("vmfunc-entry-{entry:#x}-user"), 0, entry, &user);
        case(format_args!("vmfunc-entry-{entry:#x}-ad"), 0, entry, &|vm| {
            fill_list(ACCESSED_DIRTY);
            vm.or(EPT_POINTER, ACCESSED_DIRTY);
        });
        case(format_args!("vmfunc-entry-{entry:#x}-without-vpid"), 0, entry, &|vm| {
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VPID);
        });
    }
    for function in [1, 2, 31, 32, 63, 64, 0xffff_ffff, 1 << 32] {
        case(format_args!("vmfunc-function-{function:#x}"), function, 1, &as_it_is);
        case(format_args!("vmfunc-function-{function:#x}-off"), function, 1, &|vm| {
            _ = vm.set(VM_FUNCTION_CONTROLS, VmFunctions::empty())
        });
    }
    case(format_args!("vmfunc-disabled"), 0, 1, &|vm| {
        vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VM_FUNCTIONS);
    });
    // Many switches there and back, and an entry after the last switch.
    let code = code!(
        "2: mov ecx, 1",
        "vmfunc",
        "add rbx, [rdx]",
        "mov ecx, 0",
        "vmfunc",
        "add rbx, [rdx]",
        "dec rbp",
        "jnz 2b"
    );
    let mut vm = Vm::new(code);
    switching(&mut vm);
    vm.registers.rbp = 100;
    for round in 0..3 {
        let verdict = vm.rerun();
        suite.case(format_args!("vmfunc-often-{round}"), Switched(verdict, &vm));
        vm.registers.rbp = 10;
    }
}

fn vm_function_fields(suite: &mut Suite) {
    flip(suite, "vmfunc-controls", VM_FUNCTION_CONTROLS, 0..64, switching);
    flip(suite, "vmfunc-list", EPTP_LIST_ADDRESS, 0..64, switching);
    flip(suite, "vmfunc-list-off", EPTP_LIST_ADDRESS, 0..64, |vm| {
        switching(vm);
        vm.set(VM_FUNCTION_CONTROLS, VmFunctions::empty());
    });
    flip(suite, "vmfunc-no-ept", VM_FUNCTION_CONTROLS, 0..2, |vm| {
        switching(vm);
        vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
    });
    flip(suite, "ve-area", VIRTUALIZATION_EXCEPTION_INFO, 0..64, |vm| {
        converting(vm);
        vm.set(VIRTUALIZATION_EXCEPTION_INFO, FAR_FROM_THE_IMAGE);
    });
}

fn converting(vm: &mut Vm) {
    vm.or(SECONDARY_CONTROLS, Secondary::EPT_VIOLATION_VE);
}

/// The information area, and the stack frame of the exception.
struct Area(Verdict);

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: [u64; 4] = core::array::from_fn(|word| SPARE.get(word));
        write!(f, "{} area={words:x?} index={:#x}", self.0, SPARE.get(4) & 0xffff)?;
        if let Verdict::Exited(exit) = &self.0 {
            write!(f, " pushed={}", exit.pushed_words())?;
        }
        Ok(())
    }
}

fn virtualization_exceptions(suite: &mut Suite) {
    const VE: u32 = 1 << 20;
    for (level, table, index) in LEVELS {
        for bits in 0..8 {
            for suppress in [0, SUPPRESS_VE] {
                for (access, code) in accesses() {
                    for (dirty, bitmap) in [(0, 0), (ACCESSED_DIRTY, 0), (0, VE)] {
                        answer_calls();
                        let mut vm = Vm::new(code);
                        converting(&mut vm);
                        vm.or(EPT_POINTER, dirty).set(EXCEPTION_BITMAP, !VE | bitmap);
                        replace_bits(table, index, RIGHTS | SUPPRESS_VE, bits | suppress);
                        let _ = invept(2, [0; 2]);
                        let verdict = vm.run();
                        suite.case(
                            format_args!(
                                "ve-{level}-{bits:03b}-{access}-suppress-{}-ad-{}-bitmap-{}",
                                suppress >> 63,
                                dirty >> 6,
                                bitmap >> 20
                            ),
                            Area(verdict),
                        );
                    }
                }
            }
        }
    }
}

/// A busy area, modes without exceptions, delivery of an event, and the nested guest's own page walk.
fn conditions_of_virtualization_exceptions(suite: &mut Suite) {
    const INJECTED_BREAKPOINT: u32 = 0x8000_0306;
    let read = code!("mov rax, 0x40001000", "mov al, [rax]");
    let read_32 = code_32!("mov eax, 0x40001000", "mov al, [eax]");
    let mut case = |name: fmt::Arguments<'_>, code: u64, change: &dyn Fn(&mut Vm)| {
        let mut vm = Vm::new(code);
        converting(&mut vm);
        vm.set(EXCEPTION_BITMAP, 0);
        WINDOW_PT.set(TARGET, 0);
        change(&mut vm);
        let _ = invept(2, [0; 2]);
        let verdict = vm.run();
        suite.case(name, Area(verdict));
    };
    for busy in [0, 1, 0x8000_0000, 0xffff_ffff] {
        case(format_args!("ve-busy-{busy:#x}"), read, &|_| SPARE.set(0, busy << 32));
    }
    case(format_args!("ve-eptp-index"), read, &|vm| _ = vm.set(EPTP_INDEX, 0x1234));
    case(format_args!("ve-reason-is-not-busy"), read, &|_| SPARE.set(0, 0xffff_ffff));
    for suppress in [0, SUPPRESS_VE] {
        case(format_args!("ve-real-{}", suppress >> 63), read_32, &|vm| {
            protected(vm);
            vm.clear(GUEST_CR0, CR0_PE);
            WINDOW_PT.set(TARGET, suppress);
        });
        case(format_args!("ve-delivering-{}", suppress >> 63), read, &|vm| {
            WINDOW_PT.set(TARGET, suppress);
            vm.set(GUEST_RSP, WINDOW + 0x1100).set(ENTRY_INTERRUPTION_INFO, INJECTED_BREAKPOINT);
            vm.set(ENTRY_INSTRUCTION_LENGTH, 1);
        });
        case(format_args!("ve-page-walk-{}", suppress >> 63), code!("mov rax, 0x140001000", "mov al, [rax]"), &|_| {
            guest_linear_table(WINDOW + 0x1000);
            WINDOW_PT.set(TARGET, suppress);
        });
        case(format_args!("ve-misconfigured-{}", suppress >> 63), read, &|_| WINDOW_PT.set(TARGET, suppress | 2));
        case(format_args!("ve-user-{}", suppress >> 63), read, &|vm| {
            user(vm);
            WINDOW_PT.set(TARGET, suppress);
        });
        case(format_args!("ve-off-{}", suppress >> 63), read, &|vm| {
            vm.clear(SECONDARY_CONTROLS, Secondary::EPT_VIOLATION_VE);
            WINDOW_PT.set(TARGET, suppress);
        });
    }
}
