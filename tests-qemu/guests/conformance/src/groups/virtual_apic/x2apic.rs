//! "Virtualize x2APIC mode" (SDM 30.5): every MSR from 800H to 8FFH, read and written, with and without it.

use shadow::fields::*;

use super::{BOTH, DELIVERY, MODES, Mode};
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::output::Suite;
use crate::vm::Vm;

const MSRS: core::ops::Range<u64> = 0x800..0x900;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    let (read, write) = (code!("rdmsr"), code!("wrmsr"));
    for msr in MSRS {
        one(suite, None, "read", read, msr, 0);
        one(suite, None, "write", write, msr, 0);
        for mode in MODES {
            one(suite, Some(mode), "read", read, msr, 0);
            for value in [0, 0x41] {
                one(suite, Some(mode), "write", write, msr, value);
            }
        }
    }
    // TPR, EOI, self-IPI: their reserved bits.
    for msr in [0x808, 0x80b, 0x83f] {
        for mode in [DELIVERY, BOTH] {
            for bit in 0..64 {
                one(suite, Some(mode), "write", write, msr, 1 << bit);
            }
        }
    }
}

fn one(suite: &mut Suite, mode: Option<Mode>, access: &str, code: u64, msr: u64, value: u64) {
    let mut vm = Vm::new(code);
    if let Some(mode) = mode {
        mode.x2apic(&mut vm);
    }
    // The registers of the page: 16 bytes each.
    let register = ((msr & 0xff) * 2) as usize;
    VIRTUAL_APIC.set(register, 0x5566_7788_99aa_bb00 | msr & 0xff);
    vm.registers.rcx = msr;
    (vm.registers.rax, vm.registers.rdx) = (value & 0xffff_ffff, value >> 32);
    let verdict = vm.run();
    let (rdx, name) = (vm.registers.rdx, mode.map_or("off", |mode| mode.name));
    let (rax, status) = (vm.registers.rax, vm.get(GUEST_INTERRUPT_STATUS));
    suite.case(
        format_args!("x2apic-{name}-{access}-{msr:#x}-{value:#x}"),
        format_args!("{verdict} {rdx:#x}:{rax:#x} status={status:#x}{}", super::VirtualApic(|_| 0)),
    );
}
