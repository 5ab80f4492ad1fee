//! Hardware VMCS shadowing for the guest hypervisor, by turning vmcs02 itself into the shadow VMCS while that runs.
//!
//! Guest state, exit information and the controls that vmcs02 takes over unchanged then have one place, and no exit and no entry copies
//! them. The other fields, whose vmcs02 value is not the guest hypervisor's, are never shadowed.

use shadow::controls::Secondary;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::merge;

use crate::vcpu::Vcpu;

/// The current VMCS12 has changed, perhaps to none: vmcs02 gets what the guest hypervisor accesses there, and vmcs01 is linked to it.
pub fn bind_current(vcpu: &mut Vcpu) {
    // Whatever the guest hypervisor did about it was for another nested guest.
    vcpu.nested.violation = None;
    let live = *vcpu.shadow_fields.permissions().live();
    if live.is_empty() {
        return;
    }
    let bound = vcpu.vmx.has_current();
    if bound && vcpu.vmx.vmcs12.live.is_empty() {
        merge::make_live(&mut vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12, &live);
    }
    // Without a current VMCS the instructions exit: they are VMfailInvalid, or #UD outside VMX operation.
    vcpu.vmcs.set_linked(bound);
    let link = if bound { vcpu.vmcs.link().0 } else { u64::MAX };
    let mut vmcs01 = vcpu.vmcs.vmcs01();
    let others = vmcs01.read(SECONDARY_CONTROLS) & !Secondary::VMCS_SHADOWING.bits();
    vmcs01.write(SECONDARY_CONTROLS, others | if bound { Secondary::VMCS_SHADOWING.bits() } else { 0 });
    vmcs01.write(VMCS_LINK_POINTER, link);
}
