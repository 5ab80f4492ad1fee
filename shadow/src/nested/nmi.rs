//! NMIs that arrive while the host runs. The guest that runs next gets them.

use super::injection;
use super::machine::{Machine, VmcsPair};
use super::reflect;
use super::vcpu::{Running, Vcpu};
use crate::controls::{Control, Pin, Primary};
use crate::event::{BLOCKING_BY_MOV_SS, BLOCKING_BY_NMI, BLOCKING_BY_STI, NMI_INTERRUPTION, WAIT_FOR_SIPI};
use crate::exit::InterruptionInfo;
use crate::fields::*;
use crate::hw::VmcsAccess;

/// Passes an NMI that arrived while the host ran to the guest that runs next.
pub fn pass_on<M: Machine>(vcpu: &mut Vcpu<M>) {
    if vcpu.running.is_nested() {
        let pin12 = vcpu.vmx.vmcs12.get(PIN_CONTROLS);
        let exits = pin12.contains(Pin::NMI_EXITING);
        // Without virtual NMIs, "blocking by NMI" applies to the processor's NMIs.
        let interruptibility = vcpu.vmcs.vmcs02().read(GUEST_INTERRUPTIBILITY);
        let exits_later = !pin12.contains(Pin::VIRTUAL_NMIS) && interruptibility & BLOCKING_BY_NMI != 0;
        // An entry that the guest hypervisor has asked for comes before the NMI, as the entry may fail. So does an
        // event that is being injected.
        let is_entry_due = vcpu.running == Running::Entering || is_injecting(vcpu.vmcs.vmcs02());
        if exits && !is_entry_due && !exits_later {
            return reflect::nmi(vcpu);
        }
        injection::borrow(vcpu);
        let is_injected = !exits && !is_entry_due && inject(vcpu.vmcs.vmcs02());
        vcpu.nested.nmi_waits = !is_injected;
        if !is_injected {
            trap(vcpu);
        }
    } else if !vcpu.machine.waits_for_sipi() {
        // The wait-for-SIPI state blocks NMIs, and VM entry refuses them there.
        if !inject(vcpu.vmcs.vmcs01()) {
            trap(vcpu);
        }
    }
}

fn is_injecting(vmcs: &impl VmcsAccess) -> bool {
    InterruptionInfo(vmcs.read(ENTRY_INTERRUPTION_INFO)).is_valid()
}

/// Injects an NMI, unless another injection or blocking prevents it. Returns whether the NMI is injected.
fn inject(vmcs: &mut impl VmcsAccess) -> bool {
    const BLOCKING: u32 = BLOCKING_BY_NMI | BLOCKING_BY_MOV_SS | BLOCKING_BY_STI;
    let blocked = vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING != 0 || vmcs.read(GUEST_ACTIVITY_STATE) == WAIT_FOR_SIPI;
    let is_possible = !blocked && !is_injecting(vmcs);
    if is_possible {
        vmcs.write(ENTRY_INTERRUPTION_INFO, NMI_INTERRUPTION.0);
    }
    is_possible
}

/// Makes the guest exit after the event or instruction that prevents the injection of an NMI.
fn trap<M: Machine>(vcpu: &mut Vcpu<M>) {
    if !vcpu.caps.may_be_1(Control::Primary(Primary::MONITOR_TRAP_FLAG)) {
        return vcpu.machine.warn(format_args!("an NMI is lost: the processor has no monitor trap flag"));
    }
    let vmcs = if vcpu.running.is_nested() { vcpu.vmcs.vmcs02() } else { vcpu.vmcs.vmcs01() };
    vmcs.write(PRIMARY_CONTROLS, vmcs.read(PRIMARY_CONTROLS) | Primary::MONITOR_TRAP_FLAG);
}

/// Tries a waiting NMI again, after the guest hypervisor has exited by the monitor trap flag.
pub fn retry<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs01 = vcpu.vmcs.vmcs01();
    vmcs01.write(PRIMARY_CONTROLS, vmcs01.read(PRIMARY_CONTROLS) - Primary::MONITOR_TRAP_FLAG);
    vcpu.machine.request_nmi();
}

/// Called after an exit of the nested guest for which an NMI waits. The guest that runs next gets the NMI.
#[cold]
pub fn retry_after_nested_exit<M: Machine>(vcpu: &mut Vcpu<M>) {
    vcpu.nested.nmi_waits = false;
    let trap12 = vcpu.vmx.vmcs12.get(PRIMARY_CONTROLS) & Primary::MONITOR_TRAP_FLAG;
    let vmcs02 = vcpu.vmcs.vmcs02();
    let others = vmcs02.read(PRIMARY_CONTROLS) - Primary::MONITOR_TRAP_FLAG;
    vmcs02.write(PRIMARY_CONTROLS, others | trap12);
    vcpu.machine.request_nmi();
}

/// Called when VMLAUNCH or VMRESUME fails while an NMI waits for the nested guest: the guest hypervisor gets the NMI,
/// and VMCS12's injection stays as it is.
pub fn entry_failed<M: Machine>(vcpu: &mut Vcpu<M>) {
    if vcpu.nested.nmi_waits {
        // The host has not written to the injection fields.
        vcpu.nested.displaced = None;
        retry_after_nested_exit(vcpu);
    }
}
