//! VMCS shadowing for a hypervisor that runs as a nested guest (SDM 25.10 "VMCS Types: Ordinary and Shadow").
//!
//! ```text
//!   VMCS12 -> a region in the guest hypervisor's memory, in the format of a VMCS12
//!   vmcs02 -> a shadow VMCS of the host's: the content of that region, in the processor's format
//! ```
//!
//! The host's shadow VMCS gets the content when the region is linked, and keeps it from one entry to the next. The region gets it back when
//! the guest hypervisor makes it current, clears it, links another one or leaves VMX operation; what its memory holds until then is
//! undefined (SDM 25.11.1 "Software Use of Virtual-Machine Control Structures"). So VMREAD and VMWRITE of the nested guest are the
//! processor's business, but for fields that it has and the guest hypervisor is not offered: those always exit.

use ept::{Gpa, Hpa};
use shadow::Vmcs12;
use shadow::controls::Secondary;
use shadow::encoding::Encoding;
use shadow::event::privilege_level;
use shadow::exit::{ExitReason, InsnInfo};
use shadow::fields::*;
use shadow::hw::{GuestMemory, VmcsAccess};
use shadow::index::FieldTable;
use shadow::outcome::{Fault, InsnError, rflags_fail_invalid, rflags_fail_valid};
use shadow::permission::BITMAP_BYTES;
use shadow::policy::intercepts_field;
use shadow::registers::EFER_LMA;

use super::exit::raise;
use super::reflect::{Reflected, reflect};
use super::watching::watch;
use crate::arch::vmx::{CurrentVmcs, Vmcs01};
use crate::vcpu::{MergedBitmap, RSP, Vcpu};
use crate::watch::SLOTS;

/// What the host keeps for it.
#[derive(Debug)]
pub struct Onward {
    /// The host's shadow VMCS.
    link02: Hpa,
    /// The region whose content it has.
    content: Option<Gpa>,
    /// vmcs02 is linked to it.
    is_linked: bool,
    /// Fields that the processor has and the guest hypervisor is not offered, in the format of a VMREAD bitmap.
    hidden: &'static [u8],
    /// Merged VMREAD bitmaps and merged VMWRITE bitmaps, by the slots of the watched pages that they were merged from.
    bitmaps: [[MergedBitmap; SLOTS]; 2],
}

/// Which of a pair of bitmaps.
const VMREADS: usize = 0;
const VMWRITES: usize = 1;

/// A VMCS that is linked to none.
const NO_LINK: Gpa = Gpa(u64::MAX);

impl Onward {
    /// Nothing is linked yet.
    pub const fn new(link02: Hpa, hidden: &'static [u8], bitmaps: [[MergedBitmap; SLOTS]; 2]) -> Self {
        Self { link02, content: None, is_linked: false, hidden, bitmaps }
    }

    /// Finds the fields that the processor has beside the offered ones.
    pub fn fill_hidden(vmcs: &CurrentVmcs<'_, Vmcs01>, offered: &FieldTable, hidden: &mut [u8]) {
        for raw in 0..8 * BITMAP_BYTES as u32 {
            let encoding = Encoding(raw);
            if offered.find(encoding).is_none() && vmcs.has_encoding(encoding) {
                hidden[raw as usize / 8] |= 1 << (raw % 8);
            }
        }
    }

    /// Finds the bitmap merged from one of the guest hypervisor's, or merges and watches for the next change.
    fn merged(&mut self, vcpu: &mut Vcpu, kind: usize, bitmap12: Gpa) -> Hpa {
        let found = vcpu.memory.field_watches[kind].find(bitmap12);
        let slot = found.unwrap_or_else(|| watch(vcpu, |memory| &memory.field_watches[kind], bitmap12));
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
    fn fill(&mut self, vcpu: &mut Vcpu, region: Gpa) {
        let image = Vmcs12::load(&vcpu.memory, region, &vcpu.offered);
        let fields = &vcpu.offered_fields;
        vcpu.vmcs.access_linked(|vmcs| {
            for id in fields.iter() {
                vmcs.write_raw(id, image.word(id));
            }
        });
        self.content = Some(region);
    }

    /// The region gets it back.
    fn release(&mut self, vcpu: &mut Vcpu) {
        let Some(region) = self.content.take() else { return };
        let mut image = Vmcs12::load(&vcpu.memory, region, &vcpu.offered);
        let fields = &vcpu.offered_fields;
        vcpu.vmcs.access_linked(|vmcs| {
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

/// Does something with the processor and its [`Onward`], where VMCS shadowing is offered.
fn with(vcpu: &mut Vcpu, what: impl FnOnce(&mut Vcpu, &mut Onward)) {
    if let Some(onward) = vcpu.nested.onward.take() {
        what(vcpu, onward);
        vcpu.nested.onward = Some(onward);
    }
}

/// Gives vmcs02 what VMCS12 means by its VMCS link pointer and its bitmaps. To be called before the EPTP of vmcs02 is determined, because
/// EPT01 may permit less afterwards.
pub fn prepare(vcpu: &mut Vcpu) {
    with(vcpu, |vcpu, onward| {
        let vmcs12 = &vcpu.vmx.vmcs12;
        let shadowing = vmcs12.has_secondary(Secondary::VMCS_SHADOWING);
        let link12 = Gpa(vmcs12.get(VMCS_LINK_POINTER));
        let is_linked = shadowing && link12 != NO_LINK;
        if core::mem::replace(&mut onward.is_linked, is_linked) != is_linked {
            // VM entry wants a shadow VMCS there if the control is 1, and an ordinary one if it is 0 (SDM 27.3.1.5).
            let link02 = if is_linked { onward.link02.0 } else { NO_LINK.0 };
            vcpu.vmcs.vmcs02().write(VMCS_LINK_POINTER, link02);
        }
        if is_linked && onward.content != Some(link12) {
            onward.release(vcpu);
            onward.fill(vcpu, link12);
        }
        if shadowing {
            bitmaps_and_error(vcpu, onward);
        }
    });
}

fn bitmaps_and_error(vcpu: &mut Vcpu, onward: &mut Onward) {
    let vmread = onward.merged(vcpu, VMREADS, Gpa(vcpu.vmx.vmcs12.get(VMREAD_BITMAP)));
    let vmwrite = onward.merged(vcpu, VMWRITES, Gpa(vcpu.vmx.vmcs12.get(VMWRITE_BITMAP)));
    let (mut vmcs02, vmcs12) = (vcpu.vmcs.vmcs02(), &vcpu.vmx.vmcs12);
    vmcs02.write(VMREAD_BITMAP, vmread.0);
    vmcs02.write(VMWRITE_BITMAP, vmwrite.0);
    if !vmcs12.stale.contains(VM_INSTRUCTION_ERROR.id()) {
        vmcs02.write(VM_INSTRUCTION_ERROR, vmcs12.get(VM_INSTRUCTION_ERROR));
    }
}

/// The guest hypervisor is about to look at a region: if the host's shadow VMCS has its content, the region gets that back.
pub fn release_linked_region(vcpu: &mut Vcpu, region: Gpa) {
    if vcpu.nested.onward.as_ref().is_some_and(|onward| onward.content == Some(region)) {
        release_linked(vcpu);
    }
}

/// The region whose content the host's shadow VMCS has, if any, gets it back.
pub fn release_linked(vcpu: &mut Vcpu) {
    with(vcpu, |vcpu, onward| onward.release(vcpu));
}

/// VMREAD or VMWRITE of a nested guest under VMCS shadowing that exited: because of VMCS12's bitmap, or of the host's only.
pub fn handle(vcpu: &mut Vcpu, reason: ExitReason) {
    let encoding = encoding_operand(vcpu);
    let bitmap = if reason == ExitReason::VMREAD { VMREAD_BITMAP } else { VMWRITE_BITMAP };
    let bitmap12 = Gpa(vcpu.vmx.vmcs12.get(bitmap));
    let is_hidden = vcpu.nested.onward.as_ref().is_some_and(|onward| onward.hides(encoding));
    if is_hidden && !intercepts_field(bitmap12, &vcpu.memory, encoding) {
        fail_on_hidden_field(vcpu);
    } else {
        reflect(vcpu, Reflected { reason, qualification: None });
    }
}

/// The register operand with the encoding.
fn encoding_operand(vcpu: &mut Vcpu) -> u64 {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let number = InsnInfo(vmcs02.read(EXIT_INSTRUCTION_INFO)).reg2();
    let value = if number == RSP { vmcs02.read(GUEST_RSP) } else { vcpu.registers.gpr[number] };
    // In compatibility mode VMX instructions are #UD.
    let is_64_bit = vmcs02.read(GUEST_EFER) & EFER_LMA != 0;
    if is_64_bit { value } else { value & 0xffff_ffff }
}

/// What the instruction does on a processor without the field (SDM 31.3 "VMX Instructions", VMREAD and VMWRITE): that comes before any
/// access to a memory operand. The error number is for the current VMCS, which is not the one that the instruction meant.
fn fail_on_hidden_field(vcpu: &mut Vcpu) {
    let mut vmcs02 = vcpu.vmcs.vmcs02();
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
    vcpu.advance();
}
