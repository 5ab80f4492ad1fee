//! VMREAD and VMWRITE in the ordinary case: in 64-bit mode, between registers, of a whole field whose value VMCS12
//! holds. A guest hypervisor without VMCS shadowing executes them more often than everything else together. All other
//! cases take the long way, in [`super::instructions`]: the functions here return before they have changed anything.

use crate::check::HostMode;
use crate::encoding::{Area, Encoding};
use crate::event::{BLOCKING_BY_MOV_SS, BLOCKING_BY_STI, privilege_level};
use crate::exit::InsnInfo;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::index::FieldTable;
use crate::insn::VmxOperation;
use crate::outcome::rflags_succeed;
use crate::registers::{RFLAGS_TF, RSP};

use super::machine::{Machine, VmcsPair};
use super::vcpu::Vcpu;

/// VMREAD. Returns whether it was carried out.
#[inline(never)]
pub fn vmread<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
    let Vcpu { vmcs, vmx, mode, registers, quick_table, .. } = vcpu;
    let vmcs01 = vmcs.vmcs01();
    let Some(insn) = begin(vmcs01, vmx, *mode) else { return false };
    let Some(id) = whole_field(quick_table, registers[insn.info.reg2()]) else { return false };
    if vmx.vmcs12.stale.contains(id) {
        return false;
    }
    registers[insn.info.reg1()] = vmx.vmcs12.word(id);
    insn.succeed(vmcs01);
    true
}

/// VMWRITE. Returns whether it was carried out.
#[inline(never)]
pub fn vmwrite<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
    let Vcpu { vmcs, vmx, mode, registers, quick_table, .. } = vcpu;
    let vmcs01 = vmcs.vmcs01();
    let Some(insn) = begin(vmcs01, vmx, *mode) else { return false };
    let Some(id) = whole_field(quick_table, registers[insn.info.reg2()]) else { return false };
    let encoding = id.encoding();
    if encoding.area() == Area::ExitInfo || vmx.vmcs12.live.contains(id) {
        return false;
    }
    vmx.vmcs12.set_word(id, registers[insn.info.reg1()] & encoding.width().mask());
    insn.succeed(vmcs01);
    true
}

/// An instruction that takes the short way.
struct Insn {
    info: InsnInfo,
    rflags: u64,
}

#[inline(always)]
fn begin(vmcs01: &impl VmcsAccess, vmx: &VmxOperation, mode: HostMode) -> Option<Insn> {
    if mode != HostMode::Ia32e || !vmx.has_current() || vmx.vmcs12.exit_is_unsettled {
        return None;
    }
    if privilege_level(vmcs01.read(GUEST_SS_ACCESS_RIGHTS)) != 0 {
        return None;
    }
    if vmcs01.read(GUEST_INTERRUPTIBILITY) & (BLOCKING_BY_STI | BLOCKING_BY_MOV_SS) != 0 {
        return None;
    }
    let rflags = vmcs01.read(GUEST_RFLAGS);
    if rflags & RFLAGS_TF != 0 {
        return None;
    }
    let info = InsnInfo(vmcs01.read(EXIT_INSTRUCTION_INFO));
    // The element of RSP among the registers holds no encoding, so Reg2 needs no check.
    if !info.is_register() || info.reg1() == RSP {
        return None;
    }
    Some(Insn { info, rflags })
}

#[inline(always)]
fn whole_field(offered: &FieldTable, encoding: u64) -> Option<FieldId> {
    let encoding = u32::try_from(encoding).map(Encoding).ok()?;
    if encoding.is_high() { None } else { offered.find(encoding) }
}

impl Insn {
    #[inline(always)]
    fn succeed(&self, vmcs01: &mut impl VmcsAccess) {
        let rflags = rflags_succeed(self.rflags);
        if rflags != self.rflags {
            vmcs01.write(GUEST_RFLAGS, rflags);
        }
        let length = vmcs01.read_raw(EXIT_INSTRUCTION_LENGTH.id());
        vmcs01.write(GUEST_RIP, vmcs01.read(GUEST_RIP).wrapping_add(length));
    }
}
