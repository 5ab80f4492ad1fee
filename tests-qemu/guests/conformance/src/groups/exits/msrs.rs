//! RDMSR and WRMSR with bitmaps (SDM 26.1.3, 25.6.9).

use shadow::controls::Primary;
use shadow::fields::*;

use super::case;
use super::others::user;
use crate::groups::paging_modes::real;
use crate::memory::{MSR_BITMAPS, SPARE, guest_stack};
use crate::output::Suite;
use crate::vm::Vm;
use crate::{code, code_32};

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    let (read, write) = (code!("rdmsr"), code!("wrmsr"));
    // IA32_SYSENTER_CS, the edges of the ranges, IA32_STAR, IA32_EFER, IA32_FS_BASE, IA32_KERNEL_GS_BASE.
    let msrs = [
        0x174,
        0,
        0x1fff,
        0x2000,
        0xbfff_ffff,
        0xc000_0081,
        0xc000_0080,
        0xc000_0100,
        0xc000_0102,
        0xc000_1fff,
        0xc000_2000,
        0xffff_ffff,
    ];
    for msr in msrs {
        for (name, code, half) in [("rdmsr", read, 0), ("wrmsr", write, 2048)] {
            case(suite, format_args!("{name}-{msr:#x}-no-bitmap"), code, |vm| {
                prepare(vm, msr);
                vm.clear(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS);
            });
            case(suite, format_args!("{name}-{msr:#x}-cpl-3"), code, |vm| {
                prepare(vm, msr);
                user(vm);
            });
            case(suite, format_args!("{name}-{msr:#x}-bit"), code, |vm| {
                prepare(vm, msr);
                set_bit(msr, half);
            });
            case(suite, format_args!("{name}-{msr:#x}-other-bit"), code, |vm| {
                prepare(vm, msr);
                set_bit(msr, 2048 - half);
            });
        }
    }
    // Without an exit: the value that is read back, and the VMCS fields that hold MSRs.
    for msr in [0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0081, 0x277] {
        for value in [0, 0x1234, 1 << 47] {
            let mut vm = Vm::new(code!("wrmsr", "rdmsr"));
            vm.registers.rcx = msr;
            (vm.registers.rax, vm.registers.rdx) = (value & 0xffff_ffff, value >> 32);
            let verdict = vm.run();
            let (rax, rdx) = (vm.registers.rax, vm.registers.rdx);
            let fields =
                [vm.get(GUEST_SYSENTER_ESP), vm.get(GUEST_SYSENTER_EIP), vm.get(GUEST_FS_BASE), vm.get(GUEST_GS_BASE)];
            let cs = vm.get(GUEST_SYSENTER_CS);
            suite.case(
                format_args!("msr-{msr:#x}-value-{value:#x}"),
                format_args!("{verdict} rax={rax:#x} rdx={rdx:#x} cs={cs:#x} {fields:x?}"),
            );
        }
    }
    capabilities(suite);
    faults_in_real_mode(suite);
}

/// A fault that the host finds has no error code in real mode, neither in the exit nor on the stack.
fn faults_in_real_mode(suite: &mut Suite) {
    // VMCALL in unused memory below 1 MiB, where a real-mode vector can point.
    const HANDLER: usize = 0x8000;
    const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];
    const GP: usize = 13;
    // SAFETY: the page is mapped and unused.
    unsafe { core::ptr::with_exposed_provenance_mut::<[u8; 3]>(HANDLER).write_volatile(VMCALL) };
    for (name, bitmap) in [("exits", u32::MAX), ("delivered", 0)] {
        let mut vm = Vm::new(code_32!("wrmsr"));
        real(&mut vm);
        prepare(&mut vm, 0x480);
        SPARE.set(GP / 2, (HANDLER as u64) << 12 << 32);
        vm.set(EXCEPTION_BITMAP, bitmap).set(GUEST_IDTR_BASE, SPARE.address());
        let verdict = vm.run();
        let pushed = guest_stack() - vm.get(GUEST_RSP);
        suite.case(format_args!("real-mode-fault-{name}"), format_args!("{verdict} pushed={pushed}"));
    }
}

/// The MSRs that the host keeps to itself, let through by the bitmap.
fn capabilities(suite: &mut Suite) {
    // The last ones make a processor store to memory, past EPT.
    for msr in (0x480..0x494).chain([0x3a, 0x9b, 0x3f1, 0x570, 0x600, 0x17d0]) {
        case(suite, format_args!("write-capability-{msr:#x}"), code!("wrmsr"), |vm| prepare(vm, msr));
    }
    for msr in [0x485, 0x486, 0x487, 0x488, 0x489, 0x3a] {
        let mut vm = Vm::new(code!("rdmsr"));
        prepare(&mut vm, msr);
        let verdict = vm.run();
        suite.case(format_args!("read-capability-{msr:#x}"), format_args!("{verdict} rax={:#x}", vm.registers.rax));
    }
}

fn prepare(vm: &mut Vm, msr: u64) {
    vm.registers.rcx = msr;
    // The value that EFER holds already; harmless in other MSRs.
    vm.registers.rax = if msr == 0xc000_0080 { 0xd00 } else { 0 };
}

/// The bit of an MSR, in the half for reading or for writing; MSRs outside the ranges have none.
fn set_bit(msr: u64, half: usize) {
    let range = if msr >> 30 == 3 { 1024 } else { 0 };
    let bit = (msr & 0x1fff) as usize;
    MSR_BITMAPS.set_byte(half + range + bit / 8, 1 << (bit % 8));
}
