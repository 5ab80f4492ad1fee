//! CR0, CR3, CR4, CR8 and debug registers: masks, read shadows, targets (SDM 26.1.3, 26.3).

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;
use shadow::registers::CR0_TS;

use super::case;
use super::others::user;
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::nested_paging::guest_cr3;
use crate::output::Suite;
use crate::vm::{Registers, Vm};

const CR0: u64 = 0x8001_0033;
const CR4: u64 = 0x2020;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    cr0(suite);
    cr3(suite);
    cr4(suite);
    cr8(suite);
    debug(suite);
}

/// Runs a case, and prints the value that the guest read into RAX too.
fn reading(suite: &mut Suite, name: impl core::fmt::Display, code: u64, change: impl FnOnce(&mut Vm)) {
    let mut vm = Vm::new(code);
    change(&mut vm);
    let verdict = vm.run();
    let Registers { rax, .. } = vm.registers;
    let (cr0, cr4) = (vm.get(GUEST_CR0), vm.get(GUEST_CR4));
    suite.case(name, format_args!("{verdict} rax={rax:#x} cr0={cr0:#x} cr4={cr4:#x}"));
}

fn cr0(suite: &mut Suite) {
    let write = code!("mov cr0, rax", "mov rax, cr0");
    let masks = [0, CR0_TS, 1 << 5, 0x8000_0021, u64::MAX];
    for mask in masks {
        for shadow in [0, CR0_TS, CR0, u64::MAX] {
            for bit in [0, 1, 2, 3, 4, 5, 6, 16, 18, 29, 30, 31, 32, 63] {
                reading(suite, format_args!("mov-cr0-mask-{mask:#x}-shadow-{shadow:#x}-bit-{bit}"), write, |vm| {
                    vm.set(CR0_GUEST_HOST_MASK, mask).set(CR0_READ_SHADOW, shadow);
                    vm.registers.rax = CR0 ^ 1 << bit;
                });
            }
            let prepare = |vm: &mut Vm| _ = vm.set(CR0_GUEST_HOST_MASK, mask).set(CR0_READ_SHADOW, shadow);
            let name = |what| (what, mask, shadow);
            for (what, code) in [
                ("clts", code!("clts", "mov rax, cr0")),
                ("read", code!("mov rax, cr0")),
                ("read-r8", code!("mov r8, cr0", "mov rax, r8")),
                ("smsw", code!("smsw rax")),
                ("smsw-memory", code!("smsw [rsp - 8]", "movzx eax, word ptr [rsp - 8]")),
                ("lmsw-0", code!("xor eax, eax", "lmsw ax", "mov rax, cr0")),
                ("lmsw-f", code!("mov eax, 0xf", "lmsw ax", "mov rax, cr0")),
                ("lmsw-memory", code!("mov word ptr [rsp - 8], 8", "lmsw [rsp - 8]", "mov rax, cr0")),
            ] {
                let (what, mask, shadow) = name(what);
                reading(suite, format_args!("{what}-mask-{mask:#x}-shadow-{shadow:#x}"), code, prepare);
            }
        }
    }
    reading(suite, "clts-with-ts", code!("clts", "mov rax, cr0"), |vm| _ = vm.or(GUEST_CR0, CR0_TS));
    case(suite, "mov-cr0-at-cpl-3", write, |vm| {
        vm.set(CR0_GUEST_HOST_MASK, u64::MAX);
        user(vm);
    });
}

fn cr3(suite: &mut Suite) {
    let write = code!("mov cr3, rax");
    for exiting in [false, true] {
        let control = |vm: &mut Vm| {
            let both = Primary::CR3_LOAD_EXITING | Primary::CR3_STORE_EXITING;
            if exiting {
                vm.or(PRIMARY_CONTROLS, both);
            } else {
                vm.clear(PRIMARY_CONTROLS, both);
            }
            vm.registers.rax = guest_cr3();
        };
        case(suite, format_args!("mov-cr3-exiting-{exiting}"), write, control);
        case(suite, format_args!("mov-cr3-r12-exiting-{exiting}"), code!("mov r12, rax", "mov cr3, r12"), control);
        case(suite, format_args!("read-cr3-exiting-{exiting}"), code!("mov rbx, cr3"), control);
        for bit in [0, 3, 4, 11, 40, 51, 52, 62, 63] {
            case(suite, format_args!("mov-cr3-bit-{bit}-exiting-{exiting}"), write, |vm| {
                control(vm);
                vm.registers.rax ^= 1 << bit;
            });
        }
        for count in 0..=4 {
            for hit in 0..4 {
                case(suite, format_args!("cr3-targets-{count}-hit-{hit}-exiting-{exiting}"), write, |vm| {
                    control(vm);
                    vm.set(CR3_TARGET_COUNT, count);
                    let targets = [CR3_TARGET_VALUE_0, CR3_TARGET_VALUE_1, CR3_TARGET_VALUE_2, CR3_TARGET_VALUE_3];
                    vm.set(targets[hit], guest_cr3());
                });
            }
        }
    }
}

fn cr4(suite: &mut Suite) {
    let write = code!("mov cr4, rax", "mov rax, cr4");
    for mask in [0, 1 << 13, 1 << 7, u64::MAX] {
        for shadow in [0, CR4, u64::MAX] {
            for bit in (0..24).chain([32, 63]) {
                reading(suite, format_args!("mov-cr4-mask-{mask:#x}-shadow-{shadow:#x}-bit-{bit}"), write, |vm| {
                    vm.set(CR4_GUEST_HOST_MASK, mask).set(CR4_READ_SHADOW, shadow);
                    vm.registers.rax = CR4 ^ 1 << bit;
                });
            }
            reading(suite, format_args!("read-cr4-mask-{mask:#x}-shadow-{shadow:#x}"), code!("mov rax, cr4"), |vm| {
                vm.set(CR4_GUEST_HOST_MASK, mask).set(CR4_READ_SHADOW, shadow);
            });
        }
    }
}

fn cr8(suite: &mut Suite) {
    let write = code!("mov cr8, rax", "mov rax, cr8");
    for (name, controls) in [
        ("plain", Primary::empty()),
        ("load", Primary::CR8_LOAD_EXITING),
        ("store", Primary::CR8_STORE_EXITING),
        ("shadow", Primary::USE_TPR_SHADOW),
        ("load-shadow", Primary::CR8_LOAD_EXITING.union(Primary::USE_TPR_SHADOW)),
    ] {
        for value in [0, 3, 9, 15, 16, u64::MAX] {
            let mut vm = Vm::new(write);
            vm.or(PRIMARY_CONTROLS, controls).set(TPR_THRESHOLD, 0);
            VIRTUAL_APIC.set_byte(0x80, 0x50);
            vm.registers.rax = value;
            let verdict = vm.run();
            let (rax, vtpr) = (vm.registers.rax, VIRTUAL_APIC.get(0x80 / 8));
            suite.case(format_args!("cr8-{name}-{value:#x}"), format_args!("{verdict} rax={rax:#x} vtpr={vtpr:#x}"));
        }
    }
    for (threshold, value) in [(5, 4), (5, 5), (5, 6), (15, 0)] {
        case(suite, format_args!("tpr-threshold-{threshold}-tpr-{value}"), write, |vm| {
            vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW).set(TPR_THRESHOLD, threshold);
            vm.clear(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES);
            VIRTUAL_APIC.set_byte(0x80, 0xf0);
            vm.registers.rax = value;
        });
    }
    // The processor's own TPR.
    let _ = crate::attempt!("mov cr8, {zero}", "test rsp, rsp"; zero = in(reg) 0_u64);
}

fn debug(suite: &mut Suite) {
    const DR7_GD: u64 = 1 << 13;
    const CR4_DE: u64 = 1 << 3;
    for exiting in [false, true] {
        for (name, code) in [
            ("read-dr0", code!("mov rax, dr0")),
            ("read-dr4", code!(".byte 0x0f, 0x21, 0xe0")),
            ("read-dr6", code!("mov rcx, dr6")),
            ("read-dr7", code!("mov r9, dr7")),
            ("write-dr3", code!("mov dr3, rdi")),
            ("write-dr5", code!(".byte 0x0f, 0x23, 0xe8")),
            ("write-dr7", code!("mov eax, 0x400", "mov dr7, rax")),
            ("write-dr7-high", code!("mov rax, 0x100000400", "mov dr7, rax")),
        ] {
            let control = |vm: &mut Vm| {
                if exiting {
                    vm.or(PRIMARY_CONTROLS, Primary::MOV_DR_EXITING);
                }
            };
            case(suite, format_args!("{name}-exiting-{exiting}"), code, control);
            case(suite, format_args!("{name}-de-exiting-{exiting}"), code, |vm| {
                control(vm);
                vm.or(GUEST_CR4, CR4_DE);
            });
            case(suite, format_args!("{name}-gd-exiting-{exiting}"), code, |vm| {
                control(vm);
                vm.or(GUEST_DR7, DR7_GD);
            });
            case(suite, format_args!("{name}-cpl-3-exiting-{exiting}"), code, |vm| {
                control(vm);
                user(vm);
            });
        }
    }
}
