//! CPUID: the machine's answers, as far as [`shadow::cpuid`] lets them through.

use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::{Action, VmcsPair};
use shadow::registers::{RAX, RBX, RCX, RDX};

use crate::arch::cpu;
use crate::hw::Vcpu;
use crate::stats;

/// A leaf that no processor has ("l1hv" in ASCII): with the option `stats` it makes the host print its counters. Subleaf 1.
const STATISTICS_LEAF: u32 = 0x6c31_6876;

/// Answers.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    let (leaf, subleaf) = (vcpu.registers[RAX] as u32, vcpu.ecx());
    if leaf == STATISTICS_LEAF && subleaf == 1 && vcpu.machine.prints_stats {
        stats::print(&vcpu.tables, &vcpu.nested.ept.cache);
        vcpu.machine.shadow_fields.print();
    }
    let cr4 = vcpu.vmcs.vmcs01().read(GUEST_CR4);
    let [eax, ebx, ecx, edx] = vcpu.machine.cpuid.answer(leaf, subleaf, cr4, cpu::cpuid);
    for (register, value) in [(RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)] {
        vcpu.registers[register] = value.into();
    }
    Action::Advance
}
