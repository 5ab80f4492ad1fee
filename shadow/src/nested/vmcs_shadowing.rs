//! Hardware VMCS shadowing for the guest hypervisor, by turning vmcs02 itself into the shadow VMCS while that runs.
//!
//! Guest state, exit information and the controls that vmcs02 takes over unchanged then have one place, and no exit and
//! no entry copies them. The other fields, whose vmcs02 value is not the guest hypervisor's, are never shadowed.
//!
//! The other design, which KVM has, copies: a shadow VMCS of its own is linked to vmcs01, an exit copies to it what the
//! guest hypervisor may look at, and an entry copies back what it may have written. Per CPUID of a nested guest of
//! Linux 6.1 KVM, counted by the emulator. "copy" was measured as the same short round trip with copies added (the 20
//! fields that KVM's exit handlers look at, at the exit; the 12 of them that it writes, compared at the entry: 653 host
//! instructions), less the two changes of form:
//!
//! | | host instructions | VMREAD | VMWRITE | VMPTRLD | VMCLEAR | model cycles |
//! |---|---|---|---|---|---|---|
//! | flip | 394 | 4 | 51 | 2 | 2 | 5,800 |
//! | copy | 600 | 36 | 71 | 4 | 0 | 8,550 |
//!
//! Copying costs half as much again, and the more the more fields are granted; flipping grants them all for nothing. So
//! there is no seam for a second design. On silicon the flip's VMCLEARs write vmcs02 back to memory, which the model
//! counts with 100 cycles: they would have to cost fifteen times that for copying to win.

use crate::controls::Secondary;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::merge;

use super::machine::{Machine, VmcsPair};
use super::vcpu::Vcpu;

/// The current VMCS12 has changed, perhaps to none: vmcs02 gets what the guest hypervisor accesses there, and vmcs01 is
/// linked to it.
pub fn bind_current<M: Machine>(vcpu: &mut Vcpu<M>) {
    // Whatever the guest hypervisor did about it was for another nested guest.
    vcpu.nested.ept.violation = None;
    let live = vcpu.live_fields;
    if live.is_empty() {
        return;
    }
    let bound = vcpu.vmx.has_current();
    if bound && vcpu.vmx.vmcs12.live.is_empty() {
        merge::make_live(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12, &live);
    }
    // Without a current VMCS the instructions exit: they are VMfailInvalid, or #UD outside VMX operation.
    vcpu.vmcs.set_vmcs02_shadows(bound);
    let link = if bound { vcpu.vmcs.vmcs02_address().0 } else { u64::MAX };
    let vmcs01 = vcpu.vmcs.vmcs01();
    let others = vmcs01.read(SECONDARY_CONTROLS) - Secondary::VMCS_SHADOWING;
    vmcs01.write(SECONDARY_CONTROLS, others | if bound { Secondary::VMCS_SHADOWING } else { Secondary::empty() });
    vmcs01.write(VMCS_LINK_POINTER, link);
}
