//! INIT, sent by the processor to itself: blocked in VMX root operation, an exit in VMX non-root operation (SDM 24.8,
//! 26.2).

use shadow::controls::{Pin, Primary};
use shadow::fields::*;

use super::super::Change;
use super::{Delivered, IF, TF};
use crate::apic;
use crate::code;
use crate::memory::LONG_MSR_AREA;
use crate::output::Suite;
use crate::vm::Vm;

/// IA32_FS_BASE: VM entry loads it from its field, and never from an MSR area (SDM 27.4).
const NEVER_LOADED: u64 = 0xc000_0100;

/// Other events that follow the entry, and states of the nested guest.
const AMONG: &[(&str, Change)] = &[
    ("nothing", |_| ()),
    ("sti", |vm| _ = vm.or(GUEST_RFLAGS, IF).set(GUEST_INTERRUPTIBILITY, 1)),
    ("mov-ss", |vm| _ = vm.set(GUEST_INTERRUPTIBILITY, 2)),
    ("nmi-blocked", |vm| _ = vm.set(GUEST_INTERRUPTIBILITY, 8)),
    ("hlt", |vm| _ = vm.set(GUEST_ACTIVITY_STATE, 1)),
    ("shutdown", |vm| _ = vm.set(GUEST_ACTIVITY_STATE, 2)),
    ("trap-flag", |vm| _ = vm.or(GUEST_RFLAGS, TF)),
    ("pending-debug", |vm| _ = vm.set(GUEST_PENDING_DEBUG, 0x1001)),
    ("injected-interrupt", |vm| _ = vm.or(GUEST_RFLAGS, IF).set(ENTRY_INTERRUPTION_INFO, 0x8000_0041)),
    ("injected-nmi", |vm| _ = vm.set(ENTRY_INTERRUPTION_INFO, 0x8000_0202)),
    ("injected-exception", |vm| _ = vm.set(ENTRY_INTERRUPTION_INFO, 0x8000_0306)),
    ("interrupt-window", |vm| {
        vm.or(GUEST_RFLAGS, IF).or(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
    }),
    ("nmi-window", |vm| {
        super::virtual_nmis(vm);
        vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
    }),
    ("trap-exit", |vm| _ = vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG)),
    ("timer-0", |vm| {
        vm.or(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER).set(PREEMPTION_TIMER_VALUE, 0);
    }),
];

/// Entries that fail, and leave the INIT blocked.
const FAILING: &[(&str, Change)] = &[
    ("control", |vm| _ = vm.set(CR3_TARGET_COUNT, 5)),
    ("host-state", |vm| _ = vm.set(HOST_CR0, 0)),
    ("guest-state", |vm| _ = vm.set(GUEST_RFLAGS, 0)),
    ("link-pointer", |vm| _ = vm.set(VMCS_LINK_POINTER, 1)),
    ("msr-load", |vm| {
        LONG_MSR_AREA.set(0, NEVER_LOADED);
        vm.set(ENTRY_MSR_LOAD_ADDRESS, LONG_MSR_AREA.address()).set(ENTRY_MSR_LOAD_COUNT, 1);
    }),
];

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    for &(name, change) in AMONG {
        let mut vm = Vm::with_physical_nmis(code!("nop", "nop"));
        change(&mut vm);
        apic::init_self();
        blocked(suite, name, &mut vm);
    }
    let mut vm = Vm::with_physical_nmis(code!("nop", "nop"));
    apic::init_self();
    apic::init_self();
    blocked(suite, "twice", &mut vm);
    for &(name, change) in FAILING {
        let mut vm = Vm::with_physical_nmis(code!("nop", "nop"));
        change(&mut vm);
        apic::init_self();
        suite.case(format_args!("init-blocked-failing-{name}"), vm.run());
        blocked(suite, format_args!("after-failing-{name}"), &mut Vm::with_physical_nmis(code!("nop")));
    }
    resumed(suite);
    sent_by_the_guest(suite);
}

/// Enters with an INIT blocked, then without.
fn blocked(suite: &mut Suite, name: impl core::fmt::Display, vm: &mut Vm) {
    suite.case(format_args!("init-blocked-{name}"), Delivered(vm.run()));
    vm.set(ENTRY_INTERRUPTION_INFO, 0).set(GUEST_ACTIVITY_STATE, 0).set(GUEST_PENDING_DEBUG, 0);
    suite.case(format_args!("init-blocked-{name}-then"), Delivered(vm.rerun()));
}

/// An INIT between an exit and VMRESUME, without any other change.
fn resumed(suite: &mut Suite) {
    let mut vm = Vm::with_physical_nmis(code!("cpuid", "nop", "2: cpuid", "jmp 2b"));
    for round in 0..3 {
        suite.case(format_args!("init-blocked-resumed-before-{round}"), vm.run());
        vm.set(GUEST_RIP, vm.get(GUEST_RIP) + 2);
    }
    apic::init_self();
    suite.case("init-blocked-resumed", vm.run());
    suite.case("init-blocked-resumed-then", vm.run());
}

fn sent_by_the_guest(suite: &mut Suite) {
    let codes: &[(&str, u64)] = &[
        ("nop", code!("mov eax, 0xfee00300", "mov [rax + 0x10], edi", "mov dword ptr [rax], 0x4500", "nop", "nop")),
        (
            "mov-ss",
            code!(
                "mov eax, 0xfee00300",
                "mov [rax + 0x10], edi",
                "mov ecx, ss",
                "mov ss, ecx",
                "mov dword ptr [rax], 0x4500",
                "nop"
            ),
        ),
        ("hlt", code!("mov eax, 0xfee00300", "mov [rax + 0x10], edi", "mov dword ptr [rax], 0x4500", "hlt")),
    ];
    for &(name, code) in codes {
        let mut vm = Vm::with_physical_nmis(code);
        vm.registers.rdi = apic::own_destination();
        suite.case(format_args!("guest-init-{name}"), Delivered(vm.run()));
        vm.set(GUEST_ACTIVITY_STATE, 0).set(GUEST_INTERRUPTIBILITY, 0);
        suite.case(format_args!("guest-init-{name}-then"), Delivered(vm.run()));
    }
}
