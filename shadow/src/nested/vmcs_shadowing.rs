//! Hardware VMCS shadowing for the guest hypervisor: while it runs, vmcs02 itself is the shadow VMCS.
//!
//! Guest state, exit information and the controls that vmcs02 takes over unchanged then have one place, and neither
//! exits nor entries copy them. The other fields, whose vmcs02 value is not the guest hypervisor's, are never shadowed.
//!
//! The other design, which KVM has, copies: a third VMCS is the shadow VMCS linked to vmcs01, an exit copies the fields
//! to it that the guest hypervisor may read, and an entry copies the fields back that it may have written. The table
//! compares both per CPUID of a nested guest of Linux 6.1 KVM, counted by the emulator. "copy" was measured as the same
//! short round trip with copies added (the 20 fields that KVM's exit handlers look at, at the exit; the 12 of them that
//! it writes, compared at the entry: 653 host instructions), less the two changes of form:
//!
//! | | host instructions | VMREAD | VMWRITE | VMPTRLD | VMCLEAR | model cycles |
//! |---|---|---|---|---|---|---|
//! | flip | 394 | 4 | 51 | 2 | 2 | 5,800 |
//! | copy | 600 | 36 | 71 | 4 | 0 | 8,550 |
//!
//! Copying costs half as much again, and more with each field that is granted; with flipping, every field is free. So
//! there is no interface for a second design. On silicon the flip's VMCLEARs write vmcs02 back to memory, which the
//! model counts with 100 cycles: they would have to cost fifteen times that for copying to win.

use crate::controls::Secondary;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::merge;

use super::machine::{Machine, VmcsPair};
use super::vcpu::Vcpu;

/// Called when another VMCS12, or none, has become current: vmcs02 gets the fields that the guest hypervisor accesses
/// there, and vmcs01 is linked to vmcs02.
pub fn bind_current<M: Machine>(vcpu: &mut Vcpu<M>) {
    // The last reflected violation was one of another nested guest.
    vcpu.nested.ept.violation = None;
    let live = vcpu.live_fields;
    if live.is_empty() {
        return;
    }
    let bound = vcpu.vmx.has_current();
    if bound && vcpu.vmx.vmcs12.live.is_empty() {
        merge::make_live(vcpu.vmcs.vmcs02(), &mut vcpu.vmx.vmcs12, &live);
    }
    // Without a current VMCS, VMREAD and VMWRITE exit: they end in VMfailInvalid, or in #UD outside VMX operation.
    vcpu.vmcs.set_vmcs02_shadows(bound);
    let link = if bound { vcpu.vmcs.vmcs02_address().0 } else { u64::MAX };
    let vmcs01 = vcpu.vmcs.vmcs01();
    let others = vmcs01.read(SECONDARY_CONTROLS) - Secondary::VMCS_SHADOWING;
    vmcs01.write(SECONDARY_CONTROLS, others | if bound { Secondary::VMCS_SHADOWING } else { Secondary::empty() });
    vmcs01.write(VMCS_LINK_POINTER, link);
}
