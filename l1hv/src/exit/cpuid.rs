//! CPUID: the machine's answers, filtered by [`shadow::cpuid`].

use protocol::statistics;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::{Action, VmcsPair};
use shadow::registers::{RAX, RBX, RCX, RDX};

use crate::arch::cpu;
use crate::hw::Vcpu;
use crate::stats;
use crate::{iommu, processor};

/// Handles CPUID.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    iommu::report_now_and_then();
    let (leaf, subleaf) = (vcpu.registers[RAX] as u32, vcpu.ecx());
    let asks_for_stats = leaf == statistics::LEAF && subleaf == statistics::SUBLEAF && vcpu.machine.prints_stats;
    if asks_for_stats {
        iommu::report();
    }
    if asks_for_stats && stats::may_print() {
        let all = processor::all().iter().map(|processor| &processor.stats);
        stats::print(all, &vcpu.tables, &vcpu.nested.ept.cache, vcpu.machine.ept01);
        vcpu.machine.shadow_fields.print();
    }
    let cr4 = vcpu.vmcs.vmcs01().read(GUEST_CR4);
    let [eax, ebx, ecx, edx] = vcpu.machine.cpuid.answer(leaf, subleaf, cr4, cpu::cpuid);
    for (register, value) in [(RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)] {
        vcpu.registers[register] = value.into();
    }
    Action::Advance
}
