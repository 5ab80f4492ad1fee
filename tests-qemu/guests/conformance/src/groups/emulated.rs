//! Instructions of a nested guest that its hypervisor lets through and the host executes, among the events that surround
//! an instruction: the monitor trap flag, a single step, blocking, windows, and faults on their way through the
//! exception bitmap or the guest's IDT (SDM 26.5.2, 27.7, 28.3).

use core::fmt;

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use super::entry_events::Delivered;
use super::ept_features::switching;
use super::events::{IF, TF, virtual_nmis};
use super::{Change, as_it_is};
use crate::code;
use crate::cpu::{invept, rdmsr};
use crate::memory::{MSR_BITMAPS, SPARE, VIRTUAL_APIC};
use crate::nested_paging::{WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::Vm;

const IA32_APIC_BASE: u32 = 0x1b;

/// An instruction, and what prepares its registers.
struct Instruction {
    name: &'static str,
    code: fn() -> u64,
    prepare: Change,
}

fn read() -> u64 {
    code!("rdmsr", "nop", "nop")
}

fn write() -> u64 {
    code!("wrmsr", "nop", "nop")
}

fn function() -> u64 {
    code!("vmfunc", "nop", "nop")
}

const INSTRUCTIONS: &[Instruction] = &[
    Instruction { name: "rdmsr-feature-control", code: read, prepare: |vm| vm.registers.rcx = 0x3a },
    Instruction { name: "rdmsr-vmx-misc", code: read, prepare: |vm| vm.registers.rcx = 0x485 },
    Instruction { name: "rdmsr-that-faults", code: read, prepare: |vm| vm.registers.rcx = 0x49f },
    Instruction { name: "wrmsr-apic-base", code: write, prepare: same_apic_base },
    Instruction { name: "wrmsr-vmx-basic", code: write, prepare: |vm| vm.registers.rcx = 0x480 },
    Instruction { name: "wrmsr-feature-control", code: write, prepare: |vm| vm.registers.rcx = 0x3a },
    Instruction { name: "vmfunc", code: function, prepare: switching },
];

fn same_apic_base(vm: &mut Vm) {
    let value = rdmsr(IA32_APIC_BASE).unwrap_or(0);
    vm.registers.rcx = IA32_APIC_BASE.into();
    (vm.registers.rax, vm.registers.rdx) = (value & 0xffff_ffff, value >> 32);
}

/// What surrounds the instruction.
const SURROUNDINGS: &[(&str, Change)] = &[
    ("nothing", as_it_is),
    ("trap-exit", |vm| _ = vm.or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG)),
    ("trap-flag", |vm| _ = vm.or(GUEST_RFLAGS, TF)),
    ("trap-flag-and-exit", |vm| {
        vm.or(GUEST_RFLAGS, TF).or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG);
    }),
    ("sti", |vm| _ = vm.or(GUEST_RFLAGS, IF).set(GUEST_INTERRUPTIBILITY, 1)),
    ("mov-ss", |vm| _ = vm.set(GUEST_INTERRUPTIBILITY, 2)),
    ("mov-ss-trap-exit", |vm| {
        vm.set(GUEST_INTERRUPTIBILITY, 2).or(PRIMARY_CONTROLS, Primary::MONITOR_TRAP_FLAG);
    }),
    ("interrupt-window-after-sti", |vm| {
        vm.or(GUEST_RFLAGS, IF).set(GUEST_INTERRUPTIBILITY, 1);
        vm.or(PRIMARY_CONTROLS, Primary::INTERRUPT_WINDOW_EXITING);
    }),
    ("nmi-window-after-mov-ss", |vm| {
        virtual_nmis(vm);
        vm.set(GUEST_INTERRUPTIBILITY, 2).or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
    }),
    ("resume-flag", |vm| _ = vm.or(GUEST_RFLAGS, 1 << 16)),
];

/// All of them.
pub fn run(suite: &mut Suite) {
    for instruction in INSTRUCTIONS {
        for &(name, surround) in SURROUNDINGS {
            for (way, bitmap) in [("exiting", u32::MAX), ("delivered", 0)] {
                let mut vm = Vm::new((instruction.code)());
                (instruction.prepare)(&mut vm);
                surround(&mut vm);
                vm.set(EXCEPTION_BITMAP, bitmap);
                let verdict = vm.run();
                suite.case(format_args!("{}-{name}-{way}", instruction.name), Delivered(verdict));
            }
        }
    }
    bitmap_in_the_virtual_apic(suite);
    bitmap_in_ept12(suite);
}

/// Whether the nested guest's RDMSR exits: at the last of many entries, after which a hypervisor may rely on what it has
/// made of the bitmap, and after `change`, which makes the nested guest set the MSR's bit in its own MSR bitmap.
fn bits_appear(suite: &mut Suite, name: impl fmt::Display, vm: &mut Vm, change: Change) {
    let reads = |vm: &mut Vm| {
        vm.set_entry_point(code!("rdmsr"));
        vm.rerun()
    };
    for _ in 0..20 {
        let _ = reads(vm);
    }
    suite.case(format_args!("{name}-before"), reads(vm));
    change(vm);
    for round in 0..3 {
        suite.case(format_args!("{name}-after-{round}"), reads(vm));
    }
}

/// The processor writes VTPR to the virtual-APIC page, which no EPT is in the way of.
fn bitmap_in_the_virtual_apic(suite: &mut Suite) {
    /// VTPR, in bits 7:4, is the byte of MSRs 400H to 407H.
    const MSR: u64 = 0x404;
    for (name, secondary) in [("cr8", Secondary::empty()), ("x2apic", Secondary::VIRTUALIZE_X2APIC_MODE)] {
        let mut vm = Vm::new(code!("nop"));
        VIRTUAL_APIC.fill(0);
        vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW).or(SECONDARY_CONTROLS, secondary);
        vm.set(MSR_BITMAP, VIRTUAL_APIC.address());
        vm.registers.rcx = MSR;
        bits_appear(suite, format_args!("bitmap-is-virtual-apic-{name}"), &mut vm, |vm| {
            vm.registers.rax = 0xf;
            vm.set_entry_point(code!("mov cr8, rax"));
            let _ = vm.rerun();
        });
    }
}

/// The host sets the accessed and dirty flags of an entry of EPT12.
fn bitmap_in_ept12(suite: &mut Suite) {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const PAGE: usize = 3;
    /// The accessed flag of the entry.
    const MSR: u64 = PAGE as u64 * 64 + 8;
    let mut vm = Vm::new(code!("nop"));
    WINDOW_PT.set(PAGE, SPARE.address() | 0x37);
    vm.or(EPT_POINTER, ACCESSED_DIRTY).set(MSR_BITMAP, WINDOW_PT.address());
    let _ = invept(2, [0; 2]);
    vm.registers.rcx = MSR;
    bits_appear(suite, "bitmap-is-ept12", &mut vm, |vm| {
        vm.registers.rdx = WINDOW + PAGE as u64 * 4096;
        vm.set_entry_point(code!("mov rax, [rdx]"));
        let _ = vm.rerun();
    });
    MSR_BITMAPS.fill(0);
}
