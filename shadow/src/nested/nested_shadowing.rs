//! VMCS shadowing for a hypervisor that runs as a nested guest (SDM 25.10 "VMCS Types: Ordinary and Shadow").
//!
//! ```text
//!   VMCS12 -> a region in the guest hypervisor's memory, in the format of a VMCS12
//!   vmcs02 -> a shadow VMCS of the host's: the content of that region, in the processor's format
//! ```
//!
//! The host's shadow VMCS gets the content when the region is linked, and keeps it from one entry to the next. The
//! content goes back to the region when the guest hypervisor makes the region current, clears it, links another one or
//! leaves VMX operation; until then the region's memory is undefined (SDM 25.11.1 "Software Use of Virtual-Machine
//! Control Structures"). So the processor executes VMREAD and VMWRITE of the nested guest. Only accesses to fields that
//! the processor has and the guest hypervisor is not offered always exit.

use crate::Vmcs12;
use crate::check;
use crate::controls::Secondary;
use crate::encoding::Encoding;
use crate::event::privilege_level;
use crate::exit::{ExitReason, InsnInfo};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::index::FieldTable;
use crate::outcome::{Fault, InsnError, rflags_fail_invalid, rflags_fail_valid};
use crate::permission::BITMAP_BYTES;
use crate::policy::intercepts_field;
use crate::registers::{EFER_LMA, RSP};
use ept::{Gpa, Hpa};

use super::fault::raise;
use super::machine::{Machine, VmcsPair};
use super::reflect::{Reflected, complete_instruction, reflect};
use super::vcpu::{NestedShadowing, Vcpu};
use super::watching::merged;
use crate::watch::{MergedAs, MergedBitmap, SLOTS};

/// Indexes of a pair of bitmaps.
const VMREADS: usize = 0;
const VMWRITES: usize = 1;
const KINDS: [MergedAs; 2] = [MergedAs::VmreadBitmap, MergedAs::VmwriteBitmap];

/// The link pointer of a VMCS that is linked to no other.
const NO_LINK: Gpa = Gpa(u64::MAX);

/// A link pointer with which VM entry fails: misaligned.
const REFUSED_LINK: u64 = 1;

impl NestedShadowing {
    /// The state before any region is linked.
    pub const fn new(shadow02: Hpa, hidden: &'static [u8], bitmaps: [[MergedBitmap; SLOTS]; 2]) -> Self {
        Self { shadow02, content: None, hidden, bitmaps }
    }

    /// Fills `hidden` with the fields that the processor has and the guest hypervisor is not offered.
    pub fn fill_hidden(has_encoding: impl Fn(Encoding) -> bool, offered: &FieldTable, hidden: &mut [u8]) {
        for raw in 0..8 * BITMAP_BYTES as u32 {
            let encoding = Encoding(raw);
            if offered.find(encoding).is_none() && has_encoding(encoding) {
                hidden[raw as usize / 8] |= 1 << (raw % 8);
            }
        }
    }

    /// The bitmap that is merged from one of the guest hypervisor and the bits of hidden fields.
    fn merged<M: Machine>(&mut self, vcpu: &mut Vcpu<M>, kind: usize, bitmap12: Gpa) -> Hpa {
        let hidden = self.hidden;
        merged(vcpu, KINDS[kind], bitmap12, &mut self.bitmaps[kind], |bytes| {
            bytes.iter_mut().zip(hidden).for_each(|(byte, hidden)| *byte |= hidden);
        })
    }

    /// Copies the content of a region to the host's shadow VMCS.
    fn fill<M: Machine>(&mut self, vcpu: &mut Vcpu<M>, region: Gpa) {
        let image = Vmcs12::load(&vcpu.memory, region, &vcpu.offered);
        let fields = &vcpu.offered_fields;
        vcpu.vmcs.access_shadow02(|vmcs| {
            for id in fields.iter() {
                vmcs.write_raw(id, image.word(id));
            }
        });
        self.content = Some(region);
    }

    /// Copies the content back to the region.
    fn release<M: Machine>(&mut self, vcpu: &mut Vcpu<M>) {
        let Some(region) = self.content.take() else { return };
        let mut image = Vmcs12::load(&vcpu.memory, region, &vcpu.offered);
        let fields = &vcpu.offered_fields;
        vcpu.vmcs.access_shadow02(|vmcs| {
            for id in fields.iter() {
                image.set_synced(id, vmcs.read_raw(id));
            }
        });
        image.store(&vcpu.memory);
    }

    fn hides(&self, encoding: u64) -> bool {
        let byte = self.hidden.get((encoding / 8) as usize);
        byte.is_some_and(|byte| byte >> (encoding % 8) & 1 != 0)
    }
}

/// Calls `what` with the processor and its [`NestedShadowing`], if VMCS shadowing is offered.
fn with<M: Machine>(vcpu: &mut Vcpu<M>, what: impl FnOnce(&mut Vcpu<M>, &mut NestedShadowing)) {
    if let Some(shadowing) = vcpu.nested.shadowing.take() {
        what(vcpu, shadowing);
        vcpu.nested.shadowing = Some(shadowing);
    }
}

/// Gives vmcs02 the link pointer and bitmaps that do what VMCS12's are meant to do. To be called before the EPTP of
/// vmcs02 is determined, because EPT01 may permit less afterwards.
///
/// If VMCS12's link pointer is wrong, so is vmcs02's: what else is wrong decides whether the processor ever checks it.
pub fn prepare<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let is_valid = check::guest_state(vmcs12, &vcpu.offered, &vcpu.memory).is_ok();
    let is_on = vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
    let link12 = Gpa(vmcs12.get(VMCS_LINK_POINTER));
    let is_linked = is_on && is_valid && link12 != NO_LINK;
    // VM entry requires a shadow VMCS at the link pointer if the control is 1, and an ordinary one if it is 0 (SDM
    // 27.3.1.5).
    let link02 = match &vcpu.nested.shadowing {
        _ if !is_valid => REFUSED_LINK,
        Some(shadowing) if is_linked => shadowing.shadow02.0,
        _ => NO_LINK.0,
    };
    if core::mem::replace(&mut vcpu.nested.link02, link02) != link02 {
        vcpu.vmcs.vmcs02().write(VMCS_LINK_POINTER, link02);
    }
    with(vcpu, |vcpu, shadowing| {
        if is_linked && shadowing.content != Some(link12) {
            shadowing.release(vcpu);
            shadowing.fill(vcpu, link12);
        }
        if is_on {
            bitmaps_and_error(vcpu, shadowing);
        }
    });
}

fn bitmaps_and_error<M: Machine>(vcpu: &mut Vcpu<M>, shadowing: &mut NestedShadowing) {
    let vmread = shadowing.merged(vcpu, VMREADS, Gpa(vcpu.vmx.vmcs12.get(VMREAD_BITMAP)));
    let vmwrite = shadowing.merged(vcpu, VMWRITES, Gpa(vcpu.vmx.vmcs12.get(VMWRITE_BITMAP)));
    let (vmcs02, vmcs12) = (vcpu.vmcs.vmcs02(), &vcpu.vmx.vmcs12);
    vmcs02.write(VMREAD_BITMAP, vmread.0);
    vmcs02.write(VMWRITE_BITMAP, vmwrite.0);
    if !vmcs12.stale.contains(VM_INSTRUCTION_ERROR.id()) {
        vmcs02.write(VM_INSTRUCTION_ERROR, vmcs12.get(VM_INSTRUCTION_ERROR));
    }
}

/// To be called before the guest hypervisor accesses a region: if the host's shadow VMCS has the region's content, the
/// content goes back.
pub fn release_linked_region<M: Machine>(vcpu: &mut Vcpu<M>, region: Gpa) {
    if vcpu.nested.shadowing.as_ref().is_some_and(|shadowing| shadowing.content == Some(region)) {
        release_linked(vcpu);
    }
}

/// Copies the content of the host's shadow VMCS, if it has any, back to its region.
pub fn release_linked<M: Machine>(vcpu: &mut Vcpu<M>) {
    with(vcpu, |vcpu, shadowing| shadowing.release(vcpu));
}

/// Handles a VMREAD or VMWRITE of a nested guest under VMCS shadowing that exited, by VMCS12's bitmap or by the host's
/// alone.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>, reason: ExitReason) {
    let encoding = encoding_operand(vcpu);
    let bitmap = if reason == ExitReason::VMREAD { VMREAD_BITMAP } else { VMWRITE_BITMAP };
    let bitmap12 = Gpa(vcpu.vmx.vmcs12.get(bitmap));
    let is_hidden = vcpu.nested.shadowing.as_ref().is_some_and(|shadowing| shadowing.hides(encoding));
    if is_hidden && !intercepts_field(bitmap12, &vcpu.memory, encoding) {
        fail_on_hidden_field(vcpu);
    } else {
        reflect(vcpu, Reflected::AsTaken(reason));
    }
}

/// The value of the register operand that holds the encoding.
fn encoding_operand<M: Machine>(vcpu: &mut Vcpu<M>) -> u64 {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let number = InsnInfo(vmcs02.read(EXIT_INSTRUCTION_INFO)).reg2();
    let value = if number == RSP { vmcs02.read(GUEST_RSP) } else { vcpu.registers[number] };
    // In compatibility mode VMX instructions are #UD.
    let is_64_bit = vmcs02.read(GUEST_EFER) & EFER_LMA != 0;
    if is_64_bit { value } else { value & 0xffff_ffff }
}

/// Fails the instruction as a processor without the field does (SDM 31.3 "VMX Instructions", VMREAD and VMWRITE),
/// before any access to a memory operand. The error number goes to the current VMCS, not to the shadow VMCS that the
/// instruction accesses.
fn fail_on_hidden_field<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs02 = vcpu.vmcs.vmcs02();
    if privilege_level(vmcs02.read(GUEST_SS_ACCESS_RIGHTS)) != 0 {
        return raise(vcpu, Fault::GeneralProtection);
    }
    let rflags = vmcs02.read(GUEST_RFLAGS);
    let failed = if vcpu.vmx.vmcs12.get(VMCS_LINK_POINTER) == NO_LINK.0 {
        rflags_fail_invalid(rflags)
    } else {
        vmcs02.write(VM_INSTRUCTION_ERROR, InsnError::UNSUPPORTED_COMPONENT.0);
        rflags_fail_valid(rflags)
    };
    vmcs02.write(GUEST_RFLAGS, failed);
    complete_instruction(vcpu);
}
