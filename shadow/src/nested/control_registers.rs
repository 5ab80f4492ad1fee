//! CR0 and CR4 of the guest hypervisor. The registers hold the bits that VMX operation fixes; the guest hypervisor
//! reads its own values of these bits from the read shadows (SDM 24.8 "Restrictions on VMX Operation", 26.3 "Changes to
//! Instruction Behavior in VMX Non-Root Operation").

use crate::FieldId;
use crate::exit::{CrAccess, CrAccessKind};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::outcome::Fault;
use crate::registers::*;

use super::machine::{Invvpid, Machine, VmcsPair};
use super::vcpu::{Action, UNDO_FIELDS, Undo, VPID01, Vcpu};

/// Bits of CR4 whose change drops translations, and reloads the PDPTEs of a PAE guest.
const CR4_PAGING: u64 = CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP;

/// All fields of vmcs01 that an emulated access changes.
const CHANGED: [FieldId; UNDO_FIELDS] = [
    GUEST_RIP.id(),
    GUEST_INTERRUPTIBILITY.id(),
    GUEST_PENDING_DEBUG.id(),
    GUEST_CR0.id(),
    CR0_READ_SHADOW.id(),
    GUEST_CR3.id(),
    GUEST_CR4.id(),
    CR4_READ_SHADOW.id(),
    GUEST_EFER.id(),
    ENTRY_CONTROLS.id(),
    GUEST_PDPTE0.id(),
    GUEST_PDPTE1.id(),
    GUEST_PDPTE2.id(),
    GUEST_PDPTE3.id(),
];

/// Undoes the last emulated access, if the guest hypervisor has not run since. Returns whether the access was undone.
pub fn undo<M: Machine>(vcpu: &mut Vcpu<M>) -> bool {
    let Some(Undo { before, after }) = vcpu.undo.take() else { return false };
    let vmcs01 = vcpu.vmcs.vmcs01();
    let has_not_run = CHANGED.map(|id| vmcs01.read_raw(id)) == after;
    if has_not_run {
        CHANGED.into_iter().zip(before).for_each(|(id, value)| vmcs01.write_raw(id, value));
    }
    has_not_run
}

/// Handles an access to CR0 or CR4, or to CR3 on a processor that cannot let it pass. Returns `None` for an access that
/// no control makes exit.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>) -> Option<Action> {
    let access = CrAccess(vcpu.vmcs.vmcs01().read(EXIT_QUALIFICATION));
    let operand = vcpu.register_operand_mask();
    let (cr0, source) = (vcpu.visible_cr0(), vcpu.gpr(access.gpr()) & operand);
    let snapshot = |vcpu: &mut Vcpu<M>| CHANGED.map(|id| vcpu.vmcs.vmcs01().read_raw(id));
    let before = snapshot(vcpu);
    let outcome = match (access.kind(), access.register()) {
        (CrAccessKind::MovTo, 0) => set_cr0(vcpu, source),
        (CrAccessKind::MovTo, 3) => set_cr3(vcpu, source),
        (CrAccessKind::MovFrom, 3) => {
            let cr3 = vcpu.vmcs.vmcs01().read(GUEST_CR3);
            vcpu.set_gpr(access.gpr(), cr3 & operand);
            Ok(())
        }
        (CrAccessKind::MovTo, 4) => set_cr4(vcpu, source),
        (CrAccessKind::Clts, _) => set_cr0(vcpu, cr0 & !CR0_TS),
        (CrAccessKind::Lmsw, _) => {
            let loaded = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
            // LMSW cannot clear PE.
            set_cr0(vcpu, cr0 & !(loaded & !CR0_PE) | access.lmsw_source() & loaded)
        }
        _ => return None,
    };
    Some(match outcome {
        Ok(()) => {
            vcpu.advance();
            vcpu.undo = Some(Undo { before, after: snapshot(vcpu) });
            Action::Resume
        }
        Err(fault) => Action::Inject(fault),
    })
}

/// Control-register bits that the guest hypervisor cannot change without an exit.
#[derive(Clone, Copy, Debug)]
pub struct Masks {
    /// Bits of CR0.
    pub cr0: u64,
    /// Bits of CR4.
    pub cr4: u64,
}

/// The masks of vmcs01.
pub fn masks<M: Machine>(vcpu: &Vcpu<M>) -> Masks {
    // Outside VMX operation the guest hypervisor may clear PE and PG, which the processor allows to an unrestricted
    // guest. NE and VMXE it can clear in the read shadow only.
    let in_vmx = vcpu.vmx.vmxon_region.is_some();
    let cr0 = if in_vmx { vcpu.caps.cr0_fixed0 } else { vcpu.caps.cr0_fixed0 & !(CR0_PE | CR0_PG) };
    Masks { cr0, cr4: vcpu.caps.cr4_fixed0 }
}

impl<M: Machine> Vcpu<M> {
    /// CR0 as the guest hypervisor reads it.
    pub fn visible_cr0(&mut self) -> u64 {
        let mask = masks(self).cr0;
        FORCED_CR0.visible(self.vmcs.vmcs01(), mask)
    }

    /// CR4 as the guest hypervisor reads it.
    pub fn visible_cr4(&mut self) -> u64 {
        let mask = masks(self).cr4;
        FORCED_CR4.visible(self.vmcs.vmcs01(), mask)
    }

    /// The bits of a register that a MOV to or from a control register moves: outside 64-bit mode, the lower half.
    fn register_operand_mask(&mut self) -> u64 {
        let vmcs01 = self.vmcs.vmcs01();
        let long_mode = vmcs01.read(GUEST_EFER) & EFER_LMA != 0;
        let long_code = vmcs01.read(GUEST_CS_ACCESS_RIGHTS) & access_rights::LONG != 0;
        if long_mode && long_code { u64::MAX } else { 0xffff_ffff }
    }
}

fn require(condition: bool) -> Result<(), Fault> {
    if condition { Ok(()) } else { Err(Fault::GeneralProtection) }
}

/// MOV to CR0 with all its conditions (SDM Volume 2B, MOV: Move to/from Control Registers).
fn set_cr0<M: Machine>(vcpu: &mut Vcpu<M>, value: u64) -> Result<(), Fault> {
    let fixed = vcpu.caps.cr0_fixed0;
    let in_vmx = vcpu.vmx.vmxon_region.is_some();
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (old, cr3) = (vmcs01.read(GUEST_CR0), vmcs01.read(GUEST_CR3));
    let (cr4, efer) = (vmcs01.read(GUEST_CR4), vmcs01.read(GUEST_EFER));
    let code_is_long = vmcs01.read(GUEST_CS_ACCESS_RIGHTS) & access_rights::LONG != 0;
    let task_is_16_bit = vmcs01.read(GUEST_TR_ACCESS_RIGHTS) & access_rights::TYPE != access_rights::TYPE_OF_BUSY_TSS;
    require(value >> 32 == 0)?;
    let value = value & CR0_DEFINED | CR0_ET;
    require(value & CR0_PG == 0 || value & CR0_PE != 0)?;
    require(value & CR0_NW == 0 || value & CR0_CD != 0)?;
    require(!in_vmx || value & fixed == fixed)?;
    let (was_paged, is_paged) = (old & CR0_PG != 0, value & CR0_PG != 0);
    if !was_paged && is_paged && efer & EFER_LME != 0 {
        require(cr4 & CR4_PAE != 0 && !code_is_long && !task_is_16_bit)?;
    }
    require(value & CR0_WP != 0 || cr4 & CR4_CET == 0)?;
    if was_paged && !is_paged {
        require(cr4 & CR4_PCIDE == 0 && !code_is_long)?;
    }
    let efer = efer_of_paging(efer, value);
    if is_paged && efer & EFER_LMA == 0 && cr4 & CR4_PAE != 0 {
        vcpu.load_pdptes(value, cr3, cr4)?;
    }
    commit_cr0(vcpu, value, efer);
    if was_paged != is_paged {
        vcpu.machine.invvpid(Invvpid::Single(VPID01));
    }
    Ok(())
}

fn commit_cr0<M: Machine>(vcpu: &mut Vcpu<M>, value: u64, efer: u64) {
    let mask = masks(vcpu).cr0;
    let vmcs01 = vcpu.vmcs.vmcs01();
    FORCED_CR0.show(vmcs01, value, mask);
    vmcs01.write(GUEST_EFER, efer);
    vcpu.nested.kept.forget();
    let vmcs01 = vcpu.vmcs.vmcs01();
    let entry = vmcs01.read(ENTRY_CONTROLS);
    vmcs01.write(ENTRY_CONTROLS, entry_controls_of_efer(entry, efer));
}

/// MOV to CR3 with all its conditions, for a processor without the TRUE capability MSRs, which cannot let accesses to
/// CR3 pass.
pub(super) fn set_cr3<M: Machine>(vcpu: &mut Vcpu<M>, written: u64) -> Result<(), Fault> {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let (cr0, cr4, efer) = (vmcs01.read(GUEST_CR0), vmcs01.read(GUEST_CR4), vmcs01.read(GUEST_EFER));
    let after = cr3_after_write(written, cr4, efer, vcpu.caps.physical_bits);
    let (cr3, drops_translations) = after.ok_or(Fault::GeneralProtection)?;
    if cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0 {
        vcpu.load_pdptes(cr0, cr3, cr4)?;
    }
    vcpu.vmcs.vmcs01().write(GUEST_CR3, cr3);
    if drops_translations {
        vcpu.machine.invvpid(Invvpid::Single(VPID01));
    }
    Ok(())
}

/// MOV to CR4 with all its conditions.
fn set_cr4<M: Machine>(vcpu: &mut Vcpu<M>, value: u64) -> Result<(), Fault> {
    let fixed0 = vcpu.caps.cr4_fixed0;
    let in_vmx = vcpu.vmx.vmxon_region.is_some();
    require(value & !vcpu.caps.cr4_fixed1 == 0)?;
    require(!in_vmx || value & fixed0 == fixed0)?;
    let vmcs01 = vcpu.vmcs.vmcs01();
    require(value & CR4_CET == 0 || vmcs01.read(GUEST_CR0) & CR0_WP != 0)?;
    let (cr0, cr3, old, efer) =
        (vmcs01.read(GUEST_CR0), vmcs01.read(GUEST_CR3), vmcs01.read(GUEST_CR4), vmcs01.read(GUEST_EFER));
    let long_mode = efer & EFER_LMA != 0;
    require(!long_mode || value & CR4_PAE != 0 && (value ^ old) & CR4_LA57 == 0)?;
    if value & CR4_PCIDE != 0 && old & CR4_PCIDE == 0 {
        require(long_mode && cr3 & 0xfff == 0)?;
    }
    let paging_changes = (value ^ old) & CR4_PAGING != 0;
    if paging_changes && cr0 & CR0_PG != 0 && value & CR4_PAE != 0 && !long_mode {
        vcpu.load_pdptes(cr0, cr3, value)?;
    }
    let mask = masks(vcpu).cr4;
    FORCED_CR4.show(vcpu.vmcs.vmcs01(), value, mask);
    if paging_changes {
        vcpu.machine.invvpid(Invvpid::Single(VPID01));
    }
    Ok(())
}

impl<M: Machine> Vcpu<M> {
    /// Loads the PDPTEs of the guest hypervisor. With EPT, they come from the VMCS.
    fn load_pdptes(&mut self, cr0: u64, cr3: u64, cr4: u64) -> Result<(), Fault> {
        let loaded = crate::check::load_pdptes(&self.memory, &self.caps, cr0, cr3, cr4, false);
        if let Some(pdptes) = loaded.map_err(|_| Fault::GeneralProtection)? {
            let vmcs01 = self.vmcs.vmcs01();
            for (field, entry) in GUEST_PDPTES.into_iter().zip(pdptes) {
                vmcs01.write(field, entry);
            }
        }
        Ok(())
    }
}
