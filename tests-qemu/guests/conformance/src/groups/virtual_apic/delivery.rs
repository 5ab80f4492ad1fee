//! Virtual-interrupt delivery (SDM 30.2): RVI, SVI and PPR, delivery, EOI and self-IPI virtualization.

use shadow::controls::{Pin, Primary};
use shadow::fields::*;

use super::super::Change;
use super::{BOTH, DELIVERY, IF, IRR, ISR, TPR, case, print, set_vector, status};
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::output::Suite;
use crate::vm::Vm;

/// The limit of an IDT for exceptions alone.
pub(super) const FAULTS_IN_IDT: u32 = 0x1ff;

const WINDOW_EXITING: Primary = Primary::INTERRUPT_WINDOW_EXITING;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    at_entry(suite);
    every_vector(suite);
    when_unblocked(suite);
    on_tpr_writes(suite);
    with_events(suite);
    ends_of_interrupts(suite);
    self_ipis(suite);
    handlers(suite);
}

fn at_entry(suite: &mut Suite) {
    for requesting in [0, 0x0f, 0x10, 0x1f, 0x20, 0x31, 0x40, 0xff] {
        for servicing in [0, 0x20, 0x31, 0x40, 0xff] {
            for tpr in [0, 0x1f, 0x20, 0x30, 0x3f, 0x40, 0xf0] {
                for flags in [0, IF] {
                    for window in [Primary::empty(), WINDOW_EXITING] {
                        let mut vm = Vm::new(code!("nop", "nop"));
                        DELIVERY.accesses(&mut vm);
                        vm.or(GUEST_RFLAGS, flags).or(PRIMARY_CONTROLS, window);
                        VIRTUAL_APIC.set_byte(TPR, tpr);
                        status(&mut vm, requesting, servicing);
                        let (flags, window) = (flags >> 9, window.bits() >> 2);
                        let name = format_args!(
                            "entry-rvi-{requesting:#x}-svi-{servicing:#x}-tpr-{tpr:#x}-if-{flags}-window-{window}"
                        );
                        case(suite, name, &mut vm);
                    }
                }
            }
        }
    }
}

/// Each vector delivered, alone and with each neighbour requested too.
fn every_vector(suite: &mut Suite) {
    for vector in 0..=255_u8 {
        let others =
            [("alone", vector), ("lower", vector.wrapping_sub(1)), ("same-bit", vector ^ 0x20), ("fixed", 0x33)];
        for (name, other) in others {
            let mut vm = Vm::new(code!("nop", "nop"));
            DELIVERY.accesses(&mut vm);
            vm.or(GUEST_RFLAGS, IF);
            status(&mut vm, vector, 0);
            set_vector(IRR, other);
            case(suite, format_args!("vector-{vector:#x}-{name}"), &mut vm);
        }
    }
}

/// An interrupt that RFLAGS.IF, blocking or the activity state blocks, and the events that end this.
fn when_unblocked(suite: &mut Suite) {
    for (name, code) in [
        ("nop", code!("nop", "nop", "nop")),
        ("sti", code!("sti", "nop", "nop")),
        ("sti-cli", code!("sti", "cli", "nop")),
        ("mov-ss", code!("mov eax, ss", "mov ss, eax", "nop", "nop")),
        ("popf", code!("pushfq", "or dword ptr [rsp], 0x200", "popfq", "nop")),
        ("sti-hlt", code!("sti", "hlt", "nop")),
        ("hlt", code!("hlt", "nop")),
        ("cpuid", code!("cpuid")),
    ] {
        for flags in [0, IF] {
            for (block, activity) in [(0, 0), (1, 0), (2, 0), (8, 0), (0, 1)] {
                for (way, change) in CHANGES {
                    let mut vm = Vm::new(code);
                    DELIVERY.accesses(&mut vm);
                    vm.or(GUEST_RFLAGS, flags).set(GUEST_INTERRUPTIBILITY, block);
                    vm.set(GUEST_ACTIVITY_STATE, activity);
                    status(&mut vm, 0x41, 0);
                    change(&mut vm);
                    let flags = flags >> 9;
                    let name = format_args!("unblocked-{name}-if-{flags}-block-{block}-activity-{activity}-{way}");
                    case(suite, name, &mut vm);
                }
            }
        }
    }
}

const CHANGES: [(&str, Change); 4] = [
    ("plain", |_| ()),
    ("window", |vm| _ = vm.or(PRIMARY_CONTROLS, WINDOW_EXITING)),
    ("mtf", |vm| _ = vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG)),
    ("nmi-window", |vm| {
        vm.or(PIN_CONTROLS, Pin::NMI_EXITING | Pin::VIRTUAL_NMIS);
        vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
    }),
];

/// An interrupt that the TPR blocks, until the TPR is written: in each of the three ways, with each value.
fn on_tpr_writes(suite: &mut Suite) {
    let page = code!("mov [rcx + 0x80], eax", "nop", "nop");
    let register = code!("shr eax, 4", "mov cr8, rax", "nop", "nop");
    let msr = code!("mov ecx, 0x808", "xor edx, edx", "wrmsr", "nop", "nop");
    for tpr in (0..256).step_by(0x10).chain([0x3f, 0x4f]) {
        for (way, code) in [("page", page), ("cr8", register), ("msr", msr)] {
            for (servicing, window) in [(0, Primary::empty()), (0x35, Primary::empty()), (0, WINDOW_EXITING)] {
                let mut vm = Vm::new(code);
                if way == "msr" {
                    DELIVERY.x2apic(&mut vm);
                } else {
                    DELIVERY.accesses(&mut vm);
                }
                vm.or(GUEST_RFLAGS, IF).or(PRIMARY_CONTROLS, window);
                VIRTUAL_APIC.set_byte(TPR, 0xf0);
                status(&mut vm, 0x41, servicing);
                vm.registers.rax = tpr;
                let window = window.bits() >> 2;
                let name = format_args!("tpr-write-{way}-{tpr:#x}-svi-{servicing:#x}-window-{window}");
                case(suite, name, &mut vm);
            }
        }
    }
}

/// Together with an injected event, whose delivery may fault.
fn with_events(suite: &mut Suite) {
    const WHOLE_IDT: u32 = 0xfff;
    for (name, info, idt_limit) in [
        ("interrupt", 0x8000_0051_u32, WHOLE_IDT),
        ("nmi", 0x8000_0202, WHOLE_IDT),
        ("exception", 0x8000_0306, WHOLE_IDT),
        ("software", 0x8000_0480, WHOLE_IDT),
        ("mtf", 0x8000_0700, WHOLE_IDT),
        ("interrupt-beyond-idt", 0x8000_0051, FAULTS_IN_IDT),
        ("software-beyond-idt", 0x8000_0480, FAULTS_IN_IDT),
    ] {
        for (way, change) in CHANGES {
            let mut vm = Vm::new(code!("nop", "nop"));
            DELIVERY.accesses(&mut vm);
            vm.set(GUEST_IDTR_LIMIT, idt_limit);
            vm.or(GUEST_RFLAGS, IF).set(ENTRY_INTERRUPTION_INFO, info).set(ENTRY_INSTRUCTION_LENGTH, 2);
            status(&mut vm, 0x41, 0);
            change(&mut vm);
            case(suite, format_args!("injected-{name}-{way}"), &mut vm);
        }
    }
}

/// EOI virtualization for each vector in service, with its bit of the EOI-exit bitmap clear and set.
fn ends_of_interrupts(suite: &mut Suite) {
    let page = code!("mov dword ptr [rcx + 0xb0], 0x77", "nop");
    let msr = code!("mov ecx, 0x80b", "xor eax, eax", "xor edx, edx", "wrmsr", "nop");
    for (way, code) in [("page", page), ("msr", msr)] {
        for vector in 0..=255_u8 {
            for invert in [0, u64::MAX] {
                let mut vm = Vm::new(code);
                if way == "msr" {
                    DELIVERY.x2apic(&mut vm);
                } else {
                    DELIVERY.accesses(&mut vm);
                }
                let bitmaps = [EOI_EXIT_BITMAP_0, EOI_EXIT_BITMAP_1, EOI_EXIT_BITMAP_2, EOI_EXIT_BITMAP_3];
                for (index, bitmap) in (0..).zip(bitmaps) {
                    let bit = if vector / 64 == index { 1 << (vector % 64) } else { 0 };
                    vm.set(bitmap, bit ^ invert);
                }
                vm.or(GUEST_RFLAGS, IF);
                status(&mut vm, 0x28, vector);
                // The next interrupt in service keeps the request waiting.
                set_vector(ISR, 0x24);
                let name = if invert == 0 { "exits" } else { "others-exit" };
                case(suite, format_args!("eoi-{way}-{vector:#x}-{name}"), &mut vm);
            }
        }
    }
}

/// Self-IPI virtualization: by ICR, by MSR 83FH, for each vector; each other bit of ICR.
fn self_ipis(suite: &mut Suite) {
    let page = code!("mov [rcx + 0x300], eax", "nop", "nop");
    let msr = code!("mov ecx, 0x83f", "xor edx, edx", "wrmsr", "nop", "nop");
    for vector in 0..256 {
        for (flags, requesting, tpr) in [(IF, 0, 0), (0, 0, 0), (IF, 0x45, 0x50)] {
            for (way, code, icr) in [("page", page, 1 << 18), ("msr", msr, 0)] {
                let mut vm = Vm::new(code);
                if way == "msr" {
                    DELIVERY.x2apic(&mut vm);
                } else {
                    DELIVERY.accesses(&mut vm);
                }
                vm.or(GUEST_RFLAGS, flags);
                VIRTUAL_APIC.set_byte(TPR, tpr);
                status(&mut vm, requesting, 0);
                vm.registers.rax = icr | vector;
                let flags = flags >> 9;
                case(suite, format_args!("self-ipi-{way}-{vector:#x}-if-{flags}-tpr-{tpr:#x}"), &mut vm);
            }
        }
    }
    for bit in 0..32 {
        for mode in [DELIVERY, BOTH] {
            let mut vm = Vm::new(page);
            mode.accesses(&mut vm);
            vm.or(GUEST_RFLAGS, IF);
            vm.registers.rax = 0x4_0041 ^ 1 << bit;
            case(suite, format_args!("icr-{}-bit-{bit}", mode.name), &mut vm);
        }
    }
}

/// Two requests, one above the other: the second is delivered when the handler of the first allows it.
fn handlers(suite: &mut Suite) {
    for (name, code) in [
        ("eoi", code!("mov dword ptr [rcx + 0xb0], 0", "iretq")),
        ("sti", code!("sti", "nop", "nop")),
        ("eoi-sti", code!("mov dword ptr [rcx + 0xb0], 0", "sti", "nop", "nop")),
        ("self-ipi-above", code!("mov dword ptr [rcx + 0x300], 0x400e1", "sti", "nop", "nop")),
        ("self-ipi-below", code!("mov dword ptr [rcx + 0x300], 0x40031", "sti", "nop", "nop")),
    ] {
        let mut vm = Vm::new(code!("nop", "nop"));
        DELIVERY.accesses(&mut vm);
        vm.or(GUEST_RFLAGS, IF);
        status(&mut vm, 0x61, 0);
        set_vector(IRR, 0x51);
        case(suite, format_args!("handler-{name}-first"), &mut vm);
        // The handler's first instruction is VMCALL: continue at other code.
        vm.set(GUEST_RIP, code);
        let verdict = vm.run();
        print(suite, format_args!("handler-{name}-second"), &vm, verdict);
    }
}
