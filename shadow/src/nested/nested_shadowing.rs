//! VMCS shadowing for a hypervisor that runs as a nested guest (SDM 25.10 "VMCS Types: Ordinary and Shadow").
//!
//! ```text
//!   VMCS12 -> a region in the guest hypervisor's memory, in the format of a VMCS12
//!   vmcs02 -> a shadow VMCS of the host's: the content of that region, in the processor's format
//! ```
//!
//! The host's shadow VMCS gets the content when the region is linked, and keeps it from one entry to the next. The
//! region gets it back when the guest hypervisor makes it current, clears it, links another one or leaves VMX
//! operation; what its memory holds until then is undefined (SDM 25.11.1 "Software Use of Virtual-Machine Control
//! Structures"). So VMREAD and VMWRITE of the nested guest are the processor's business, but for fields that it has and
//! the guest hypervisor is not offered: those always exit.

use crate::Vmcs12;
use crate::controls::Secondary;
use crate::encoding::Encoding;
use crate::event::privilege_level;
use crate::exit::{ExitReason, InsnInfo};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldTable;
use crate::outcome::{Fault, InsnError, rflags_fail_invalid, rflags_fail_valid};
use crate::permission::BITMAP_BYTES;
use crate::policy::intercepts_field;
use crate::registers::{EFER_LMA, RSP};
use ept::{Gpa, Hpa};

use super::fault::raise;
use super::machine::{Machine, VmcsPair, WatchedMemory};
use super::reflect::{Reflected, complete_instruction, reflect};
use super::vcpu::{MergedBitmap, NestedShadowing, Vcpu};
use super::watching::watch;
use crate::watch::{MergedAs, SLOTS};

/// Which of a pair of bitmaps.
const VMREADS: usize = 0;
const VMWRITES: usize = 1;
const KINDS: [MergedAs; 2] = [MergedAs::VmreadBitmap, MergedAs::VmwriteBitmap];

/// A VMCS that is linked to none.
const NO_LINK: Gpa = Gpa(u64::MAX);

impl NestedShadowing {
    /// Nothing is linked yet.
    pub const fn new(shadow02: Hpa, hidden: &'static [u8], bitmaps: [[MergedBitmap; SLOTS]; 2]) -> Self {
        Self { shadow02, content: None, is_linked: false, hidden, bitmaps }
    }

    /// Finds the fields that the processor has beside the offered ones.
    pub fn fill_hidden(has_encoding: impl Fn(Encoding) -> bool, offered: &FieldTable, hidden: &mut [u8]) {
        for raw in 0..8 * BITMAP_BYTES as u32 {
            let encoding = Encoding(raw);
            if offered.find(encoding).is_none() && has_encoding(encoding) {
                hidden[raw as usize / 8] |= 1 << (raw % 8);
            }
        }
    }

    /// Finds the bitmap merged from one of the guest hypervisor's, or merges and watches for the next change.
    fn merged<M: Machine>(&mut self, vcpu: &mut Vcpu<M>, kind: usize, bitmap12: Gpa) -> Hpa {
        let found = vcpu.memory.watches(KINDS[kind]).find(bitmap12);
        let slot = found.unwrap_or_else(|| watch(vcpu, KINDS[kind], bitmap12));
        let merged = &mut self.bitmaps[kind][slot];
        if found.is_none() {
            vcpu.memory.read(bitmap12, merged.bytes);
            for (byte, hidden) in merged.bytes.iter_mut().zip(self.hidden) {
                *byte |= hidden;
            }
        }
        merged.address
    }

    /// The host's shadow VMCS gets the content of a region.
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

    /// The region gets it back.
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

/// Does something with the processor and its [`NestedShadowing`], where VMCS shadowing is offered.
fn with<M: Machine>(vcpu: &mut Vcpu<M>, what: impl FnOnce(&mut Vcpu<M>, &mut NestedShadowing)) {
    if let Some(shadowing) = vcpu.nested.shadowing.take() {
        what(vcpu, shadowing);
        vcpu.nested.shadowing = Some(shadowing);
    }
}

/// Gives vmcs02 what VMCS12 means by its VMCS link pointer and its bitmaps. To be called before the EPTP of vmcs02 is
/// determined, because EPT01 may permit less afterwards.
pub fn prepare<M: Machine>(vcpu: &mut Vcpu<M>) {
    with(vcpu, |vcpu, shadowing| {
        let vmcs12 = &vcpu.vmx.vmcs12;
        let is_on = vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
        let link12 = Gpa(vmcs12.get(VMCS_LINK_POINTER));
        let is_linked = is_on && link12 != NO_LINK;
        if core::mem::replace(&mut shadowing.is_linked, is_linked) != is_linked {
            // VM entry wants a shadow VMCS there if the control is 1, and an ordinary one if it is 0 (SDM 27.3.1.5).
            let shadow02 = if is_linked { shadowing.shadow02.0 } else { NO_LINK.0 };
            vcpu.vmcs.vmcs02().write(VMCS_LINK_POINTER, shadow02);
        }
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

/// The guest hypervisor is about to look at a region: if the host's shadow VMCS has its content, the region gets that
/// back.
pub fn release_linked_region<M: Machine>(vcpu: &mut Vcpu<M>, region: Gpa) {
    if vcpu.nested.shadowing.as_ref().is_some_and(|shadowing| shadowing.content == Some(region)) {
        release_linked(vcpu);
    }
}

/// The region whose content the host's shadow VMCS has, if any, gets it back.
pub fn release_linked<M: Machine>(vcpu: &mut Vcpu<M>) {
    with(vcpu, |vcpu, shadowing| shadowing.release(vcpu));
}

/// VMREAD or VMWRITE of a nested guest under VMCS shadowing that exited: because of VMCS12's bitmap, or of the host's
/// only.
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

/// The register operand with the encoding.
fn encoding_operand<M: Machine>(vcpu: &mut Vcpu<M>) -> u64 {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let number = InsnInfo(vmcs02.read(EXIT_INSTRUCTION_INFO)).reg2();
    let value = if number == RSP { vmcs02.read(GUEST_RSP) } else { vcpu.registers[number] };
    // In compatibility mode VMX instructions are #UD.
    let is_64_bit = vmcs02.read(GUEST_EFER) & EFER_LMA != 0;
    if is_64_bit { value } else { value & 0xffff_ffff }
}

/// What the instruction does on a processor without the field (SDM 31.3 "VMX Instructions", VMREAD and VMWRITE): that
/// comes before any access to a memory operand. The error number is for the current VMCS, which is not the one that the
/// instruction meant.
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
