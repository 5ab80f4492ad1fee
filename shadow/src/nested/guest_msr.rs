//! The MSRs that the host keeps to itself, for the guest hypervisor and for nested guests alike:
//! [`crate::msr::host_owns`] lists them.

use crate::VmxCaps;
use crate::msr::*;
use crate::outcome::Fault;
use ept::Gpa;

use super::machine::{Machine, WatchedMemory};
use super::vcpu::{Action, Vcpu};
use super::write_traps::{self, TrappedWrite};

/// IA32_FEATURE_CONTROL as the guest hypervisor reads it: locked, VMX allowed outside SMX.
const FEATURE_CONTROL: u64 = 1 << 0 | 1 << 2;

/// RDMSR.
pub fn rdmsr<M: Machine>(vcpu: &mut Vcpu<M>) -> Action {
    match read_for_guest(&vcpu.machine, &vcpu.offered, vcpu.ecx()) {
        Ok(value) => {
            vcpu.set_edx_eax(value);
            Action::Advance
        }
        Err(fault) => Action::Inject(fault),
    }
}

/// WRMSR.
pub fn wrmsr<M: Machine>(vcpu: &mut Vcpu<M>) -> Action {
    if write_traps::has_caught(vcpu, vcpu.ecx()) {
        return write_traps::spring(vcpu, TrappedWrite::Registers);
    }
    match write_for_guest(vcpu, vcpu.ecx(), vcpu.edx_eax()) {
        Ok(()) => Action::Advance,
        Err(fault) => Action::Inject(fault),
    }
}

/// What a guest reads from an MSR.
///
/// # Errors
///
/// #GP(0).
pub fn read_for_guest(machine: &impl Machine, offered: &VmxCaps, msr: u32) -> Result<u64, Fault> {
    let value = match msr {
        IA32_FEATURE_CONTROL => Some(FEATURE_CONTROL),
        _ if VMX_CAPABILITIES.contains(&msr) => offered.msr(msr),
        _ if is_outside_ranges(msr) || KVM_CLOCKS.contains(&msr) => None,
        _ => machine.read_msr(msr),
    };
    value.ok_or(Fault::GeneralProtection)
}

/// A guest's write to an MSR.
///
/// # Errors
///
/// #GP(0).
pub fn write_for_guest<M: Machine>(vcpu: &Vcpu<M>, msr: u32, value: u64) -> Result<(), Fault> {
    match msr {
        // The MSR is locked, or for the dual-monitor treatment, which is not offered.
        IA32_FEATURE_CONTROL | IA32_SMM_MONITOR_CTL => Err(Fault::GeneralProtection),
        _ if VMX_CAPABILITIES.contains(&msr) => Err(Fault::GeneralProtection),
        // MSRs of a hypervisor below are not for guests of the host.
        _ if is_outside_ranges(msr) || KVM_CLOCKS.contains(&msr) => Err(Fault::GeneralProtection),
        // DEVIATION: a microcode update does nothing, as under every hypervisor; the guest reads the old revision.
        IA32_BIOS_UPDT_TRIG => Ok(()),
        // DEVIATION: software on the bare machine may move the APIC over any memory; a guest may not move it over the
        // host's.
        IA32_APIC_BASE if vcpu.memory.is_host(Gpa(value & !0xfff)) => Err(Fault::GeneralProtection),
        _ => vcpu.machine.write_msr(msr, value).ok_or(Fault::GeneralProtection),
    }
}
