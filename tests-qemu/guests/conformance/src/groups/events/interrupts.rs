//! External interrupts and NMIs, sent by the processor to itself (SDM 26.2, 28.2, 28.3.4).

use shadow::controls::{ExitControls, Pin, Primary};
use shadow::fields::*;

use super::super::Change;
use super::{Delivered, IF, virtual_nmis};
use crate::apic;
use crate::code;
use crate::fault::{last_interrupt, take_interrupt, unblock_nmis};
use crate::output::Suite;
use crate::vm::Vm;

const VECTOR: u8 = 0x41;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    pending(suite);
    sent_by_the_guest(suite);
    nmis(suite);
    injected_nmis(suite);
}

fn exiting(vm: &mut Vm, acknowledge: bool) {
    vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING);
    if acknowledge {
        vm.or(EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT);
    }
}

/// Ends an interrupt that is in service or pending, and returns its vector.
fn settle() -> Option<u32> {
    apic::end_of_interrupt();
    take_interrupt()
}

/// An interrupt that is pending when the nested guest is entered.
fn pending(suite: &mut Suite) {
    for (name, is_exiting, acknowledge) in
        [("delivered", false, false), ("exiting", true, false), ("acknowledged", true, true)]
    {
        for flags in [0, IF] {
            for block in [0, 1, 2] {
                for activity in [0, 1] {
                    if block != 0 && (flags == 0 || activity != 0) {
                        continue;
                    }
                    let mut vm = Vm::with_physical_nmis(code!("nop", "nop", "nop"));
                    vm.or(GUEST_RFLAGS, flags).set(GUEST_INTERRUPTIBILITY, block).set(GUEST_ACTIVITY_STATE, activity);
                    if is_exiting {
                        exiting(&mut vm, acknowledge);
                    }
                    apic::interrupt_self(VECTOR);
                    let verdict = vm.run();
                    let name = format_args!("interrupt-{name}-if-{}-block-{block}-activity-{activity}", flags >> 9);
                    suite.case(name, format_args!("{} after={:x?}", Delivered(verdict), settle()));
                }
            }
        }
    }
}

fn sent_by_the_guest(suite: &mut Suite) {
    let codes: &[(&str, u64)] = &[
        ("if", code!("mov eax, 0xfee00300", "mov dword ptr [rax], 0x44041", "nop", "nop", "nop")),
        ("sti", code!("cli", "mov eax, 0xfee00300", "mov dword ptr [rax], 0x44041", "nop", "sti", "nop", "nop")),
        ("hlt", code!("mov eax, 0xfee00300", "cli", "mov dword ptr [rax], 0x44041", "sti", "hlt", "nop")),
        ("masked", code!("cli", "mov eax, 0xfee00300", "mov dword ptr [rax], 0x44041", "nop", "nop")),
    ];
    for &(name, code) in codes {
        for (way, is_exiting, acknowledge) in
            [("delivered", false, false), ("exiting", true, false), ("acknowledged", true, true)]
        {
            let mut vm = Vm::with_physical_nmis(code);
            vm.or(GUEST_RFLAGS, IF);
            if is_exiting {
                exiting(&mut vm, acknowledge);
            }
            let verdict = vm.run();
            suite.case(
                format_args!("guest-interrupt-{name}-{way}"),
                format_args!("{} after={:x?}", Delivered(verdict), settle()),
            );
        }
    }
}

fn nmis(suite: &mut Suite) {
    let codes: &[(&str, u64)] = &[
        (
            "nop",
            code!("mov eax, 0xfee00300", "mov [rax + 0x10], edi", "mov dword ptr [rax], 0x4400", "nop", "nop", "nop"),
        ),
        ("hlt", code!("mov eax, 0xfee00300", "mov [rax + 0x10], edi", "mov dword ptr [rax], 0x4400", "hlt")),
    ];
    let ways: [(&str, Change); 3] =
        [("delivered", |_| ()), ("exiting", |vm| _ = vm.or(PIN_CONTROLS, Pin::NMI_EXITING)), ("virtual", virtual_nmis)];
    for &(name, code) in codes {
        for (way, change) in ways {
            for block in [0, 8] {
                let mut vm = Vm::with_physical_nmis(code);
                vm.registers.rdi = apic::own_destination();
                vm.set(GUEST_INTERRUPTIBILITY, block);
                change(&mut vm);
                let verdict = vm.run();
                unblock_nmis();
                let name = format_args!("guest-nmi-{name}-{way}-block-{block}");
                suite.case(name, format_args!("{} after={:x?}", Delivered(verdict), last_interrupt()));
            }
        }
    }
}

/// Blocking by NMI after an injection, and how IRET ends it.
fn injected_nmis(suite: &mut Suite) {
    let codes: &[(&str, u64)] = &[("handler", code!("nop")), ("window", code!("nop"))];
    for &(name, code) in codes {
        for virtual_nmi in [false, true] {
            let mut vm = Vm::with_physical_nmis(code);
            vm.set(ENTRY_INTERRUPTION_INFO, 0x8000_0202);
            if virtual_nmi {
                virtual_nmis(&mut vm);
            }
            if name == "window" && virtual_nmi {
                vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
            }
            let verdict = vm.run();
            suite.case(format_args!("inject-nmi-{name}-virtual-{virtual_nmi}"), Delivered(verdict));
            // Executes the handler's IRET, with the frame that the delivery pushed.
            vm.set(GUEST_RIP, code!("iretq"));
            let verdict = vm.run();
            suite.case(format_args!("inject-nmi-{name}-virtual-{virtual_nmi}-iret"), Delivered(verdict));
            unblock_nmis();
        }
    }
    for virtual_nmi in [false, true] {
        // An IRET that faults: bit 12 of the interruption information says that it unblocked NMIs.
        let mut vm = Vm::with_physical_nmis(code!("push 0", "push 0", "push 2", "push 0x1238", "push 0", "iretq"));
        vm.set(GUEST_INTERRUPTIBILITY, 8);
        if virtual_nmi {
            virtual_nmis(&mut vm);
        }
        let verdict = vm.run();
        suite.case(format_args!("faulting-iret-virtual-{virtual_nmi}"), verdict);
        unblock_nmis();
    }
}
