//! CPUID: the machine's answers, as far as [`shadow::cpuid`] lets them through.

use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::Action;
use crate::arch::cpu;
use crate::stats;
use crate::vcpu::Vcpu;

/// A leaf that no processor has ("l1hv" in ASCII): with the option `stats` it makes the host print its counters. Subleaf 1.
const STATISTICS_LEAF: u32 = 0x6c31_6876;

/// Answers.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    let (leaf, subleaf) = (vcpu.registers.gpr[0] as u32, vcpu.ecx());
    if leaf == STATISTICS_LEAF && subleaf == 1 && vcpu.prints_stats {
        stats::print(&vcpu.tables, &vcpu.nested.paging);
        vcpu.shadow_fields.print();
    }
    let cr4 = vcpu.vmcs.vmcs01().read(GUEST_CR4);
    let [eax, ebx, ecx, edx] = vcpu.cpuid.answer(leaf, subleaf, cr4, cpu::cpuid);
    let gpr = &mut vcpu.registers.gpr;
    (gpr[0], gpr[1], gpr[2], gpr[3]) = (eax.into(), ecx.into(), edx.into(), ebx.into());
    Action::Advance
}
