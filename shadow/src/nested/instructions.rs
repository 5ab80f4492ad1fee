//! The VMX instructions of the guest hypervisor: fetches operands, calls [`crate::insn`], and sets RFLAGS.

use crate::check::{HostMode, is_fixed};
use crate::exit::ExitReason;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::insn::{self, Invalidation};
use crate::msr::Access;
use crate::operand::{AddressSpace, InsnInfo, Segment, linear_address};
use crate::outcome::{Failure, Fault, InsnError, VmFail, rflags_fail_invalid, rflags_fail_valid, rflags_succeed};
use crate::permission::Access as FieldAccess;
use crate::registers::{CR4_VMXE, FORCED_CR0, FORCED_CR4, GUEST_SEGMENTS, RFLAGS_VM, RSP, access_rights};
use crate::vmcs12::LaunchState;
use ept::Gpa;

use super::control_registers::masks;
use super::machine::{Invvpid, Machine, VmcsPair};
use super::vcpu::{Action, StaleIn, Vcpu, vpid02};
use super::{entry, nested_ept, nested_shadowing, vmcs_shadowing};

/// VMREAD.
fn vmread<M: Machine>(vcpu: &mut Vcpu<M>) -> Action {
    let outcome = do_vmread(vcpu);
    finish(vcpu, outcome)
}

fn do_vmread<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    privileged(vcpu)?;
    let info = insn_info(vcpu);
    let encoding = operand_register(vcpu, info.reg2());
    vcpu.machine.count_field_access(encoding, FieldAccess::READ);
    let value = vcpu.vmx.vmread(vcpu.field_table, &mut StaleIn(&mut vcpu.vmcs), encoding)?;
    if info.is_register() {
        let value = value & vcpu.mode.operand_mask();
        vcpu.set_gpr(info.reg1(), value);
        return Ok(());
    }
    let bytes = value.to_le_bytes();
    let size = operand_bytes(vcpu);
    write_operand(vcpu, info, &bytes[..size])
}

/// VMWRITE.
fn vmwrite<M: Machine>(vcpu: &mut Vcpu<M>) -> Action {
    let outcome = do_vmwrite(vcpu);
    finish(vcpu, outcome)
}

fn do_vmwrite<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    privileged(vcpu)?;
    if !vcpu.vmx.has_current() {
        return Err(VmFail::Invalid.into());
    }
    let info = insn_info(vcpu);
    let value = if info.is_register() {
        operand_register(vcpu, info.reg1())
    } else {
        let mut bytes = [0; 8];
        let size = operand_bytes(vcpu);
        read_operand(vcpu, info, &mut bytes[..size])?;
        u64::from_le_bytes(bytes)
    };
    let encoding = operand_register(vcpu, info.reg2());
    vcpu.machine.count_field_access(encoding, FieldAccess::WRITE);
    vcpu.vmx.vmwrite(&vcpu.offered, vcpu.field_table, &mut StaleIn(&mut vcpu.vmcs), encoding, value)
}

/// VMLAUNCH and VMRESUME. After success the nested guest runs next.
#[inline(never)]
pub fn launch<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) -> Action {
    let wanted = if reason == ExitReason::VMLAUNCH { LaunchState::Clear } else { LaunchState::Launched };
    let outcome = privileged(vcpu).and_then(|()| entry::enter(vcpu, wanted));
    match outcome {
        Ok(()) => Action::Resume,
        Err(failure) => finish(vcpu, Err(failure)),
    }
}

/// Carries out the VMX instruction, any but VMLAUNCH and VMRESUME, that made the guest hypervisor exit. After VMXOFF
/// the caller must deliver an INIT that was blocked.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) -> Action {
    let outcome = match reason {
        ExitReason::VMREAD => return vmread(vcpu),
        ExitReason::VMWRITE => return vmwrite(vcpu),
        ExitReason::VMXON => vmxon(vcpu),
        ExitReason::VMXOFF => vmxoff(vcpu),
        ExitReason::VMCLEAR => with_address(vcpu, |vcpu, region| {
            nested_shadowing::release_linked_region(vcpu, Gpa(region));
            vcpu.vmx.vmclear(&vcpu.memory, &vcpu.offered, &mut StaleIn(&mut vcpu.vmcs), region)?;
            vmcs_shadowing::bind_current(vcpu);
            Ok(())
        }),
        ExitReason::VMPTRLD => with_address(vcpu, |vcpu, region| {
            nested_shadowing::release_linked_region(vcpu, Gpa(region));
            let mut sync = StaleIn(&mut vcpu.vmcs);
            let changed = vcpu.vmx.vmptrld(&vcpu.memory, &vcpu.offered, &mut sync, region)?;
            if changed {
                vmcs_shadowing::bind_current(vcpu);
            }
            Ok(())
        }),
        ExitReason::VMPTRST => privileged(vcpu).and_then(|()| {
            let info = insn_info(vcpu);
            let pointer = vcpu.vmx.vmptrst();
            write_operand(vcpu, info, &pointer.to_le_bytes())
        }),
        ExitReason::VMCALL => vmcall(vcpu),
        ExitReason::INVEPT => emulate_invept(vcpu),
        _ => emulate_invvpid(vcpu),
    };
    finish(vcpu, outcome)
}

/// VMCALL in VMX root operation. Unlike the other instructions it exits before the processor has checked the mode.
fn vmcall<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    let ia32e = vcpu.in_ia32e_mode();
    let vmcs01 = vcpu.vmcs.vmcs01();
    let compatibility = ia32e && vmcs01.read(GUEST_CS_ACCESS_RIGHTS) & access_rights::LONG == 0;
    if compatibility || vmcs01.read(GUEST_RFLAGS) & RFLAGS_VM != 0 {
        return Err(Fault::InvalidOpcode.into());
    }
    privileged(vcpu)?;
    Err(InsnError::VMCALL_IN_ROOT.into())
}

fn privileged<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    let cpl = vcpu.cpl();
    Ok(vcpu.vmx.privileged(cpl)?)
}

/// Completes an instruction as SDM 31.2 "Conventions" describes.
fn finish<M: Machine>(vcpu: &mut Vcpu<M>, outcome: Result<(), Failure>) -> Action {
    match outcome {
        Ok(()) => {
            vcpu.advance_with_flags(rflags_succeed);
            Action::Resume
        }
        Err(failure) => fail(vcpu, failure),
    }
}

/// Completes an instruction that did not succeed.
#[cold]
fn fail<M: Machine>(vcpu: &mut Vcpu<M>, failure: Failure) -> Action {
    let flags = match failure {
        Failure::Fault(fault) => return Action::Inject(fault),
        Failure::VmFail(VmFail::Valid(error)) if vcpu.vmx.has_current() => {
            vcpu.vmx.vmcs12.set(VM_INSTRUCTION_ERROR, error.0);
            rflags_fail_valid
        }
        Failure::VmFail(_) => rflags_fail_invalid,
    };
    vcpu.advance_with_flags(flags);
    Action::Resume
}

fn vmxon<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    let (cr0, cr4, cpl) = (vcpu.visible_cr0(), vcpu.visible_cr4(), vcpu.cpl());
    let caps = &vcpu.offered;
    if cr4 & CR4_VMXE == 0 {
        return Err(Fault::InvalidOpcode.into());
    }
    let fixed = is_fixed(cr0, caps.cr0_fixed0, caps.cr0_fixed1) && is_fixed(cr4, caps.cr4_fixed0, caps.cr4_fixed1);
    let in_root_operation = vcpu.vmx.vmxon_region.is_some();
    if cpl > 0 || !in_root_operation && !fixed {
        return Err(Fault::GeneralProtection.into());
    }
    if in_root_operation {
        return Err(InsnError::VMXON_IN_ROOT.into());
    }
    let info = insn_info(vcpu);
    let region = read_quadword(vcpu, info)?;
    vcpu.vmx.vmxon(&vcpu.memory, &vcpu.offered, region)?;
    // In compatibility mode VMX instructions are #UD.
    vcpu.mode = if vcpu.in_ia32e_mode() { HostMode::Ia32e } else { HostMode::Legacy };
    update_masks(vcpu, cr0, cr4);
    Ok(())
}

fn vmxoff<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    privileged(vcpu)?;
    let (cr0, cr4) = (vcpu.visible_cr0(), vcpu.visible_cr4());
    nested_shadowing::release_linked(vcpu);
    vcpu.vmx.vmxoff(&vcpu.memory, &mut StaleIn(&mut vcpu.vmcs));
    vmcs_shadowing::bind_current(vcpu);
    update_masks(vcpu, cr0, cr4);
    Ok(())
}

/// Inside VMX operation more bits of CR0 are fixed than outside. `cr0` and `cr4` are the values that the guest
/// hypervisor read before the change: the read shadow of a bit that was not masked until now is out of date.
fn update_masks<M: Machine>(vcpu: &mut Vcpu<M>, cr0: u64, cr4: u64) {
    let masks = masks(vcpu);
    let vmcs01 = vcpu.vmcs.vmcs01();
    FORCED_CR0.set_mask(vmcs01, cr0, masks.cr0);
    FORCED_CR4.set_mask(vmcs01, cr4, masks.cr4);
}

fn with_address<M: Machine>(
    vcpu: &mut Vcpu<M>,
    instruction: impl FnOnce(&mut Vcpu<M>, u64) -> Result<(), Failure>,
) -> Result<(), Failure> {
    privileged(vcpu)?;
    let info = insn_info(vcpu);
    let address = read_quadword(vcpu, info)?;
    instruction(vcpu, address)
}

fn emulate_invept<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    privileged(vcpu)?;
    let info = insn_info(vcpu);
    let kind = operand_register(vcpu, info.reg2());
    if !insn::invept_type_is_valid(&vcpu.offered, kind) {
        return Err(InsnError::INVALID_OPERAND.into());
    }
    let descriptor = read_descriptor(vcpu, info)?;
    match insn::invept(&vcpu.offered, kind, descriptor)? {
        Invalidation::Eptp(eptp12) => nested_ept::drop_translations(vcpu, Some(ept::Eptp12::from_bits(eptp12))),
        _ => nested_ept::drop_translations(vcpu, None),
    }
    Ok(())
}

/// INVVPID, executed on the VPID02. A type that the guest hypervisor is offered is one that the processor has.
fn emulate_invvpid<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), Failure> {
    privileged(vcpu)?;
    let info = insn_info(vcpu);
    let kind = operand_register(vcpu, info.reg2());
    if !insn::invvpid_type_is_valid(&vcpu.offered, kind) {
        return Err(InsnError::INVALID_OPERAND.into());
    }
    let descriptor = read_descriptor(vcpu, info)?;
    match insn::invvpid(&vcpu.offered, kind, descriptor)? {
        Invalidation::Address { vpid, linear } => vcpu.machine.invvpid(Invvpid::Address { vpid: vpid02(vpid), linear }),
        Invalidation::Vpid(vpid) => vcpu.machine.invvpid(Invvpid::Single(vpid02(vpid))),
        Invalidation::VpidRetainingGlobals(vpid) => vcpu.machine.invvpid(Invvpid::RetainingGlobals(vpid02(vpid))),
        Invalidation::AllVpids => vcpu.machine.invvpid(Invvpid::AllContexts),
        _ => (),
    }
    Ok(())
}

fn insn_info<M: Machine>(vcpu: &mut Vcpu<M>) -> InsnInfo {
    InsnInfo(vcpu.vmcs.vmcs01().read(EXIT_INSTRUCTION_INFO))
}

/// The value of a register operand.
fn operand_register<M: Machine>(vcpu: &mut Vcpu<M>, number: usize) -> u64 {
    vcpu.gpr(number) & vcpu.mode.operand_mask()
}

/// Size of the operands of VMREAD and VMWRITE.
fn operand_bytes<M: Machine>(vcpu: &Vcpu<M>) -> usize {
    match vcpu.mode {
        HostMode::Ia32e => 8,
        HostMode::Legacy => 4,
    }
}

fn operand_address<M: Machine>(vcpu: &mut Vcpu<M>, info: InsnInfo, bytes: u64, access: Access) -> Result<u64, Fault> {
    let long_mode = vcpu.in_ia32e_mode();
    let vmcs01 = vcpu.vmcs.vmcs01();
    let space = long_mode.then(|| AddressSpace::of(vmcs01.read(GUEST_CR4), vmcs01.read(GUEST_RFLAGS)));
    let displacement = vmcs01.read(EXIT_QUALIFICATION);
    let rsp = vmcs01.read(GUEST_RSP);
    let segment = Segment::read(vmcs01, &GUEST_SEGMENTS[info.segment().min(GUEST_SEGMENTS.len() - 1)]);
    let registers = &vcpu.registers;
    let offset = info.effective_address(displacement, |number| if number == RSP { rsp } else { registers[number] });
    linear_address(info, offset, bytes, access, &segment, space)
}

fn read_operand<M: Machine>(vcpu: &mut Vcpu<M>, info: InsnInfo, to: &mut [u8]) -> Result<(), Failure> {
    let linear = operand_address(vcpu, info, to.len() as u64, Access::Read)?;
    let paging = vcpu.paging();
    Ok(paging.read(&vcpu.memory, linear, to)?)
}

fn write_operand<M: Machine>(vcpu: &mut Vcpu<M>, info: InsnInfo, from: &[u8]) -> Result<(), Failure> {
    let linear = operand_address(vcpu, info, from.len() as u64, Access::Write)?;
    let paging = vcpu.paging();
    Ok(paging.write(&vcpu.memory, linear, from)?)
}

fn read_quadword<M: Machine>(vcpu: &mut Vcpu<M>, info: InsnInfo) -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    read_operand(vcpu, info, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn read_descriptor<M: Machine>(vcpu: &mut Vcpu<M>, info: InsnInfo) -> Result<[u64; 2], Failure> {
    let mut bytes = [0; 16];
    read_operand(vcpu, info, &mut bytes)?;
    let whole = u128::from_le_bytes(bytes);
    Ok([whole as u64, (whole >> 64) as u64])
}
