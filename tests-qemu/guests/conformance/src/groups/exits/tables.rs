//! Descriptor-table instructions (SDM 26.1.3) and task switches (26.4.2).

use shadow::controls::Secondary;
use shadow::fields::*;
use shadow::registers::RFLAGS_NT;

use super::super::entry_guest::protected;
use super::case;
use super::others::user;
use crate::code;
use crate::memory::GUEST_IDT;
use crate::output::Suite;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    let instructions: &[(&str, u64)] = &[
        ("sgdt", code!("sgdt [rsp - 16]")),
        ("sidt", code!("sidt [rbx + rcx * 8 + 0x40]")),
        ("lgdt", code!("sgdt [rsp - 16]", "lgdt [rsp - 16]")),
        ("lidt", code!("sidt [rsp - 16]", "lidt [rsp - 16]")),
        ("sldt-register", code!("sldt rax")),
        ("sldt-memory", code!("sldt [rsp - 16]")),
        ("str-register", code!("str r9")),
        ("str-16", code!("str dx")),
        ("lldt", code!("xor ecx, ecx", "lldt cx")),
        ("lldt-memory", code!("mov word ptr [rsp - 8], 0", "lldt [rsp - 8]")),
        ("ltr", code!("mov ecx, 0x40", "ltr cx")),
        ("lgdt-non-canonical", code!("mov rax, 0x800000000000", "lgdt [rax]")),
    ];
    for &(name, code) in instructions {
        for exiting in [false, true] {
            for at_cpl_3 in [false, true] {
                case(suite, format_args!("{name}-exiting-{exiting}-cpl-3-{at_cpl_3}"), code, |vm| {
                    // SIDT's operand is on the same stack.
                    vm.registers.rbx = vm.get(GUEST_RSP) - 0x200;
                    if exiting {
                        vm.or(SECONDARY_CONTROLS, Secondary::DESCRIPTOR_TABLE_EXITING);
                    }
                    if at_cpl_3 {
                        user(vm);
                    }
                });
            }
        }
    }
    task_switches(suite);
}

fn task_switches(suite: &mut Suite) {
    // Far jump and far call in 32-bit code, to the second TSS and to the task gate.
    case(suite, "task-jump", code!(".byte 0xea, 0, 0, 0, 0, 0x50, 0"), protected);
    case(suite, "task-call", code!(".byte 0x9a, 0, 0, 0, 0, 0x50, 0"), protected);
    case(suite, "task-gate-jump", code!(".byte 0xea, 0, 0, 0, 0, 0x58, 0"), protected);
    case(suite, "task-gate-call", code!(".byte 0x9a, 0, 0, 0, 0, 0x58, 0"), protected);
    case(suite, "task-jump-to-busy", code!(".byte 0xea, 0, 0, 0, 0, 0x40, 0"), protected);
    case(suite, "task-jump-in-64-bit-mode", code!(".byte 0x48, 0xff, 0x2c, 0x24"), |_| ());
    case(suite, "task-return", code!(".byte 0xcf"), |vm| {
        protected(vm);
        vm.or(GUEST_RFLAGS, RFLAGS_NT);
    });
    case(suite, "task-return-in-64-bit-mode", code!(".byte 0xcf"), |vm| _ = vm.or(GUEST_RFLAGS, RFLAGS_NT));
    // Vectors through a task gate: INT n, INT3, an exception, an injected interrupt.
    for (name, code, injection) in [
        ("int", code!("int 0x21"), 0),
        ("int3", code!("int3"), 0),
        ("exception", code!("ud2"), 0),
        ("injected-interrupt", code!("nop"), 0x8000_0021_u32),
        ("injected-nmi", code!("nop"), 0x8000_0202),
        ("injected-exception", code!("nop"), 0x8000_0306),
    ] {
        let saved = [2, 3, 6, 0x21].map(|vector| (vector, gate(vector)));
        case(suite, format_args!("task-{name}"), code, |vm| {
            protected(vm);
            vm.set(EXCEPTION_BITMAP, 0).set(ENTRY_INTERRUPTION_INFO, injection).or(GUEST_RFLAGS, 1 << 9);
        });
        for (vector, old) in saved {
            GUEST_IDT.set(vector, old);
        }
    }
}

/// Makes the 32-bit gate of a vector a task gate. Returns the gate before.
fn gate(vector: usize) -> u64 {
    const TASK_GATE: u64 = 0x0000_8500_0050_0000;
    let old = GUEST_IDT.get(vector);
    GUEST_IDT.set(vector, TASK_GATE);
    old
}
