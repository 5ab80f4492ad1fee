//! The TPR threshold (SDM 30.1.2, 27.7.7), and CR8 (30.3).

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use super::super::{Change, flip};
use super::{DELIVERY, NOTHING, TPR, case};
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    writes(suite);
    entries(suite);
    cr8(suite);
}

const WAYS: [(&str, Change); 4] = [
    ("plain", |vm| _ = vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW)),
    ("accesses", |vm| NOTHING.accesses(vm)),
    ("x2apic", |vm| NOTHING.x2apic(vm)),
    ("delivery", |vm| DELIVERY.accesses(vm)),
];

/// Writes each value, with each threshold.
fn writes(suite: &mut Suite) {
    let register = code!("mov cr8, rax", "nop");
    let page = code!("shl eax, 4", "mov [rcx + 0x80], eax", "nop");
    let msr = code!("shl eax, 4", "mov ecx, 0x808", "xor edx, edx", "wrmsr", "nop");
    for threshold in 0..16 {
        for tpr in 0..16 {
            for (way, change) in WAYS {
                for (by, code) in [("cr8", register), ("page", page), ("msr", msr)] {
                    let possible = match by {
                        "page" => matches!(way, "accesses" | "delivery"),
                        "msr" => way == "x2apic",
                        _ => true,
                    };
                    if !possible {
                        continue;
                    }
                    let mut vm = Vm::new(code);
                    change(&mut vm);
                    VIRTUAL_APIC.set_byte(TPR, 0xf0);
                    vm.set(TPR_THRESHOLD, threshold);
                    vm.registers.rax = tpr;
                    case(suite, format_args!("threshold-{threshold}-{way}-{by}-{tpr}"), &mut vm);
                }
            }
        }
    }
}

/// Entry with each VTPR below, at and above each threshold; then with an event, a window, or halted.
fn entries(suite: &mut Suite) {
    for (way, change) in WAYS {
        for threshold in 0..16 {
            for tpr in 0..16 {
                let mut vm = Vm::new(code!("nop"));
                change(&mut vm);
                VIRTUAL_APIC.set_byte(TPR, tpr << 4 | 5);
                vm.set(TPR_THRESHOLD, threshold);
                case(suite, format_args!("entry-threshold-{threshold}-{way}-vtpr-{tpr}"), &mut vm);
            }
        }
        let events = [
            ("none", 0),
            ("interrupt", 0x8000_0051),
            ("nmi", 0x8000_0202),
            ("mtf", 0x8000_0700),
            ("interrupt-beyond-idt", 0x8000_0051),
        ];
        for (name, info) in events {
            let (none, interrupt) = (Primary::empty(), Primary::INTERRUPT_WINDOW_EXITING);
            for (window, activity) in [(none, 0), (interrupt, 0), (none, 1), (none, 2)] {
                let mut vm = Vm::new(code!("nop"));
                change(&mut vm);
                vm.set(TPR_THRESHOLD, 8).set(ENTRY_INTERRUPTION_INFO, info).or(GUEST_RFLAGS, super::IF);
                vm.or(PRIMARY_CONTROLS, window).set(GUEST_ACTIVITY_STATE, activity);
                if name == "interrupt-beyond-idt" {
                    vm.set(GUEST_IDTR_LIMIT, super::delivery::FAULTS_IN_IDT);
                }
                let window = window.bits() >> 2;
                let name = format_args!("below-{way}-inject-{name}-window-{window}-activity-{activity}");
                case(suite, name, &mut vm);
            }
        }
        flip(suite, format_args!("threshold-{way}"), TPR_THRESHOLD, 0..32, change);
    }
}

/// MOV to and from CR8, with the controls that make it exit.
fn cr8(suite: &mut Suite) {
    let exits =
        [("none", Primary::empty()), ("load", Primary::CR8_LOAD_EXITING), ("store", Primary::CR8_STORE_EXITING)];
    for (exiting, controls) in exits {
        for (access, code) in [("read", code!("mov rax, cr8")), ("write", code!("mov cr8, rax"))] {
            for value in [0, 7, 15, 16, 1 << 32] {
                let mut vm = Vm::new(code);
                vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW | controls);
                vm.clear(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES);
                VIRTUAL_APIC.set_byte(TPR, 0x9a);
                vm.registers.rax = value;
                case(suite, format_args!("cr8-{access}-{value:#x}-exits-{exiting}"), &mut vm);
            }
        }
    }
}
