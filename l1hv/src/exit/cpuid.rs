//! CPUID: the machine's answers, except where they would be the host's (SDM Volume 2A, CPUID).

use core::arch::x86_64::__cpuid_count;

use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::registers::{CR4_OSXSAVE, CR4_PKE};

use super::Action;
use crate::stats;
use crate::vcpu::Vcpu;

/// Leaf 1, ECX.
const SMX: u32 = 1 << 6;
const OSXSAVE: u32 = 1 << 27;
/// Leaf 7, EBX.
const SGX: u32 = 1 << 2;
/// Leaf 7, ECX.
const OSPKE: u32 = 1 << 4;
const SGX_LC: u32 = 1 << 30;

/// A leaf that no processor has ("l1hv" in ASCII): with the option `stats` it makes the host print its counters. Subleaf 1.
const STATISTICS_LEAF: u32 = 0x6c31_6876;

/// Answers.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    let (leaf, subleaf) = (vcpu.registers.gpr[0] as u32, vcpu.ecx());
    if leaf == STATISTICS_LEAF && subleaf == 1 && vcpu.prints_stats {
        stats::print(&vcpu.tables, &vcpu.nested.paging);
        vcpu.shadow_fields.print();
    }
    let mut answer = __cpuid_count(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            answer.ecx &= !(SMX | OSXSAVE);
            answer.ecx |= if vcpu.guest_cr4() & CR4_OSXSAVE != 0 { OSXSAVE } else { 0 };
        }
        (7, 0) => {
            answer.ebx &= !SGX;
            answer.ecx &= !(SGX_LC | OSPKE);
            answer.ecx |= if vcpu.guest_cr4() & CR4_PKE != 0 { OSPKE } else { 0 };
        }
        _ => (),
    }
    let gpr = &mut vcpu.registers.gpr;
    (gpr[0], gpr[1], gpr[2], gpr[3]) = (answer.eax.into(), answer.ecx.into(), answer.edx.into(), answer.ebx.into());
    Action::Advance
}

impl Vcpu {
    /// CR4 of the guest hypervisor; VMXE in it is the processor's, not its own.
    fn guest_cr4(&mut self) -> u64 {
        self.vmcs.vmcs01().read(GUEST_CR4)
    }
}
