//! Registers that VM entries and VM exits load and that VMX root operation does not need: CET state, IA32_PKRS, UINV
//! (SDM 27.3.2, 28.3.1, 28.5), and IA32_SPEC_CTRL as the tertiary controls virtualize it. On a processor without them
//! every entry fails.

use core::fmt;

use shadow::controls::{EntryControls, ExitControls, Primary, Tertiary};
use shadow::fields::*;

use super::{as_it_is, flip};
use crate::code;
use crate::cpu::{rdmsr, wrmsr};
use crate::memory::MSR_AREAS;
use crate::output::Suite;
use crate::vm::{Verdict, Vm};

const IA32_SPEC_CTRL: u32 = 0x48;
const IA32_S_CET: u32 = 0x6a2;
const IA32_PKRS: u32 = 0x6e1;
const IA32_UINTR_MISC: u32 = 0x988;

/// A register with an MSR, and the controls that load it.
struct Register {
    name: &'static str,
    msr: u32,
    entry: EntryControls,
    exit: ExitControls,
    set_guest: fn(&mut Vm, u64),
    set_host: fn(&mut Vm, u64),
    guest: fn(&Vm) -> u64,
    /// Four values as the MSR has them: the guest hypervisor's, those of VMCS12's fields, and what the nested guest
    /// writes.
    values: [u64; 4],
}

const REGISTERS: [Register; 3] = [
    Register {
        name: "s-cet",
        msr: IA32_S_CET,
        entry: EntryControls::LOAD_CET,
        exit: ExitControls::LOAD_CET,
        set_guest: |vm, value| _ = vm.set(GUEST_S_CET, value),
        set_host: |vm, value| _ = vm.set(HOST_S_CET, value),
        guest: |vm| vm.get(GUEST_S_CET),
        values: [0x1000, 0x2000, 0x3000, 0x4000],
    },
    Register {
        name: "pkrs",
        msr: IA32_PKRS,
        entry: EntryControls::LOAD_PKRS,
        exit: ExitControls::LOAD_PKRS,
        set_guest: |vm, value| _ = vm.set(GUEST_PKRS, value),
        set_host: |vm, value| _ = vm.set(HOST_PKRS, value),
        guest: |vm| vm.get(GUEST_PKRS),
        values: [0x100, 0x200, 0x300, 0x400],
    },
    Register {
        name: "uinv",
        msr: IA32_UINTR_MISC,
        entry: EntryControls::LOAD_UINV,
        exit: ExitControls::CLEAR_UINV,
        set_guest: |vm, value| _ = vm.set(GUEST_UINV, (value >> 32) as u16),
        set_host: |_, _| (),
        guest: |vm| vm.get(GUEST_UINV).into(),
        values: [0x11 << 32, 0x22 << 32, 0, 0x44 << 32],
    },
];

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    for register in &REGISTERS {
        for loads in 0..4 {
            loaded(suite, register, loads & 1 != 0, loads & 2 != 0);
        }
    }
    shadow_stack_pointer(suite);
    checks(suite);
    spec_ctrl(suite);
}

/// The value of an MSR, or the fault of reading it.
struct Msr(u32);

impl fmt::Display for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match rdmsr(self.0) {
            Ok(value) => write!(f, "{value:#x}"),
            Err(outcome) => write!(f, "{outcome}"),
        }
    }
}

fn prepare(vm: &mut Vm, register: &Register, on_entry: bool, on_exit: bool) {
    let [_, guest, host, written] = register.values;
    if on_entry {
        vm.or(ENTRY_CONTROLS, register.entry);
    }
    if on_exit {
        vm.or(EXIT_CONTROLS, register.exit);
    }
    (register.set_guest)(vm, guest);
    (register.set_host)(vm, host);
    vm.registers.rcx = register.msr.into();
    vm.registers.rbx = written;
}

/// The values that the nested guest reads and that its hypervisor reads afterwards, on the first entry and on two more.
/// An entry that fails for its guest state, once by a field that the host checks and once by one that it leaves to the
/// processor. The MSR areas.
fn loaded(suite: &mut Suite, register: &Register, on_entry: bool, on_exit: bool) {
    let name = format_args!("{}-entry-{}-exit-{}", register.name, u8::from(on_entry), u8::from(on_exit));
    let read = code!("rdmsr", "mov rsi, rax", "mov rdi, rdx");
    let write = code!("mov rax, rbx", "mov rdx, rbx", "shr rdx, 32", "wrmsr", "mov rax, 0x40001000", "mov rsi, [rax]");
    let mut step = |vm: &mut Vm, what: &str, again: bool| {
        let verdict = if again { vm.rerun() } else { vm.run() };
        let found = vm.registers.rdi << 32 | vm.registers.rsi & 0xffff_ffff;
        let left = (register.guest)(vm);
        suite.case(
            format_args!("{name}-{what}"),
            format_args!("{verdict} found={found:#x} saved={left:#x} host={}", Msr(register.msr)),
        );
        let _ = wrmsr(register.msr, register.values[0]);
    };
    let _ = wrmsr(register.msr, register.values[0]);
    let mut vm = Vm::new(read);
    prepare(&mut vm, register, on_entry, on_exit);
    step(&mut vm, "read", false);
    step(&mut vm, "read-again", true);
    vm.set_entry_point(write);
    step(&mut vm, "written", true);
    step(&mut vm, "written-again", true);
    for (what, then, link, flags) in
        [("refused-link", "after-refused-link", 8, 2), ("refused-flags", "after-refused-flags", u64::MAX, 0)]
    {
        let mut vm = Vm::new(read);
        prepare(&mut vm, register, on_entry, on_exit);
        vm.set(VMCS_LINK_POINTER, link).set(GUEST_RFLAGS, flags);
        step(&mut vm, what, false);
        vm.set(VMCS_LINK_POINTER, u64::MAX);
        step(&mut vm, then, true);
    }
    // To store an MSR that is not there is a VMX abort.
    if rdmsr(register.msr).is_ok() {
        areas(suite, register, on_entry, on_exit);
    }
    let _ = wrmsr(register.msr, 0);
}

/// The MSR in each MSR area.
fn areas(suite: &mut Suite, register: &Register, on_entry: bool, on_exit: bool) {
    let name = format_args!("{}-entry-{}-exit-{}", register.name, u8::from(on_entry), u8::from(on_exit));
    let [own, guest, _, _] = register.values;
    let mut vm = Vm::new(code!("rdmsr", "mov rsi, rax", "mov rdi, rdx"));
    prepare(&mut vm, register, on_entry, on_exit);
    for (index, value) in [(0, 0), (0x400 / 8, own), (0x800 / 8, guest)] {
        MSR_AREAS.set(index, register.msr.into());
        MSR_AREAS.set(index + 1, value);
    }
    for (area, count) in
        [("store", EXIT_MSR_STORE_COUNT), ("exit-load", EXIT_MSR_LOAD_COUNT), ("entry-load", ENTRY_MSR_LOAD_COUNT)]
    {
        vm.set(count, 1);
        let verdict = vm.rerun();
        let found = vm.registers.rdi << 32 | vm.registers.rsi & 0xffff_ffff;
        let stored = MSR_AREAS.get(1);
        let result = format_args!("{verdict} found={found:#x} stored={stored:#x} host={}", Msr(register.msr));
        suite.case(format_args!("{name}-area-{area}"), result);
        vm.set(count, 0);
        let _ = wrmsr(register.msr, own);
    }
}

/// SSP has no MSR: a nested guest whose entry loads nothing shows its hypervisor's value.
fn shadow_stack_pointer(suite: &mut Suite) {
    let state = |vm: &Vm| (vm.get(GUEST_SSP), vm.get(GUEST_SSP_TABLE));
    for loads in 0..4 {
        let mut vm = Vm::new(code!("cpuid"));
        vm.set(GUEST_SSP, 0x1230).set(GUEST_SSP_TABLE, 0x4560).set(HOST_SSP, 0x7890).set(HOST_SSP_TABLE, 0xabc0);
        for (bit, entry, exit) in
            [(1, EntryControls::LOAD_CET, ExitControls::empty()), (2, EntryControls::empty(), ExitControls::LOAD_CET)]
        {
            if loads & bit != 0 {
                vm.or(ENTRY_CONTROLS, entry).or(EXIT_CONTROLS, exit);
            }
        }
        for (what, link) in [("entered", u64::MAX), ("refused", 8), ("again", u64::MAX)] {
            vm.set(VMCS_LINK_POINTER, link);
            let verdict = vm.rerun();
            let (ssp, table) = state(&vm);
            let mut probe = Vm::at(&crate::memory::OTHER_VMCS, code!("cpuid"));
            let probed = probe.run();
            let (host_ssp, host_table) = state(&probe);
            let _ = crate::cpu::vmclear(crate::memory::OTHER_VMCS.address());
            let _ = crate::cpu::vmptrld(crate::memory::VMCS.address());
            suite.case(
                format_args!("ssp-loads-{loads}-{what}"),
                format_args!("{verdict} saved={ssp:#x},{table:#x} {probed} host={host_ssp:#x},{host_table:#x}"),
            );
        }
    }
}

/// The checks of VM entry, on the values that it loads and on those that exits load.
fn checks(suite: &mut Suite) {
    let exit_cet = |vm: &mut Vm| _ = vm.or(EXIT_CONTROLS, ExitControls::LOAD_CET);
    let entry_cet = |vm: &mut Vm| _ = vm.or(ENTRY_CONTROLS, EntryControls::LOAD_CET);
    let bits = || (0..16).chain(44..64);
    // Host-state values that pass the checks have no effect: CR4.CET is 0.
    flip(suite, "host-s-cet", HOST_S_CET, bits(), exit_cet);
    flip(suite, "host-ssp", HOST_SSP, bits(), exit_cet);
    flip(suite, "host-ssp-table", HOST_SSP_TABLE, bits(), exit_cet);
    flip(suite, "guest-s-cet", GUEST_S_CET, bits(), entry_cet);
    flip(suite, "guest-ssp", GUEST_SSP, bits(), entry_cet);
    flip(suite, "guest-ssp-table", GUEST_SSP_TABLE, bits(), entry_cet);
    flip(suite, "host-s-cet-suppress", HOST_S_CET, [10, 11], |vm| {
        exit_cet(vm);
        vm.set(HOST_S_CET, 0xc00);
    });
    flip(suite, "unused-host-s-cet", HOST_S_CET, [6, 63], as_it_is);
    flip(suite, "host-pkrs", HOST_PKRS, [0, 31, 32, 63], |vm| {
        vm.or(EXIT_CONTROLS, ExitControls::LOAD_PKRS);
    });
    flip(suite, "guest-pkrs", GUEST_PKRS, [0, 31, 32, 63], |vm| {
        vm.or(ENTRY_CONTROLS, EntryControls::LOAD_PKRS);
    });
    flip(suite, "guest-uinv", GUEST_UINV, 0..16, |vm| {
        vm.or(ENTRY_CONTROLS, EntryControls::LOAD_UINV);
    });
    for msr in [IA32_S_CET, IA32_PKRS, IA32_UINTR_MISC] {
        let _ = wrmsr(msr, 0);
    }
}

/// The tertiary controls, and the one that is offered: the nested guest's reads and writes, and the MSR afterwards.
fn spec_ctrl(suite: &mut Suite) {
    flip(suite, "tertiary", TERTIARY_CONTROLS, 0..64, |vm| {
        vm.or(PRIMARY_CONTROLS, Primary::ACTIVATE_TERTIARY);
    });
    flip(suite, "inactive-tertiary", TERTIARY_CONTROLS, 0..64, as_it_is);
    for (mask, shadow, own) in [(0, 0, 0), (1, 1, 0), (1, 0, 1), (5, 4, 1), (u64::MAX, 0, 0), (0, 1, 4)] {
        for written in [0, 1, 4, 8, 1 << 40] {
            let _ = wrmsr(IA32_SPEC_CTRL, own);
            let mut vm =
                Vm::new(code!("rdmsr", "mov rsi, rax", "mov rax, rbx", "mov rdx, rbx", "shr rdx, 32", "wrmsr"));
            vm.or(PRIMARY_CONTROLS, Primary::ACTIVATE_TERTIARY);
            vm.set(TERTIARY_CONTROLS, Tertiary::VIRTUALIZE_SPEC_CTRL);
            vm.set(SPEC_CTRL_MASK, mask).set(SPEC_CTRL_SHADOW, shadow);
            vm.registers.rcx = IA32_SPEC_CTRL.into();
            vm.registers.rbx = written;
            for run in ["first", "second"] {
                let verdict: Verdict = vm.rerun();
                let (found, left) = (vm.registers.rsi, vm.get(SPEC_CTRL_SHADOW));
                suite.case(
                    format_args!("spec-ctrl-mask-{mask:#x}-shadow-{shadow}-own-{own}-written-{written:#x}-{run}"),
                    format_args!("{verdict} found={found:#x} shadow={left:#x} msr={}", Msr(IA32_SPEC_CTRL)),
                );
            }
        }
    }
    let _ = wrmsr(IA32_SPEC_CTRL, 0);
}
