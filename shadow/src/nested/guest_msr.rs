//! The MSRs that the host keeps to itself, for the guest hypervisor and for nested guests alike: [`crate::msr::held`]
//! lists them.

use crate::VmxCaps;
use crate::msr::*;
use crate::outcome::Fault;
use ept::Gpa;

use super::machine::{Machine, WatchedMemory};
use super::vcpu::{Action, Vcpu};
use super::write_traps::{self, TrappedWrite};

/// IA32_FEATURE_CONTROL as the guest hypervisor reads it: locked, VMX allowed outside SMX.
const FEATURE_CONTROL: u64 = 1 << 0 | 1 << 2;
/// IA32_FEATURE_CONTROL: machine checks may be delivered to one processor alone. As the firmware has it.
const LMCE_ON: u64 = 1 << 20;

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
        IA32_FEATURE_CONTROL => Some(FEATURE_CONTROL | machine.read_msr(msr).unwrap_or(0) & LMCE_ON),
        IA32_MISC_ENABLE => machine.read_msr(msr).map(misc_enable_shown),
        IA32_PERF_CAPABILITIES => machine.read_msr(msr).map(perf_capabilities_shown),
        _ if VMX_CAPABILITIES.contains(&msr) => offered.msr(msr),
        _ if is_outside_ranges(msr) || held(msr) == Some(Held::Absent) => None,
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
    let machine = &vcpu.machine;
    let value = match msr {
        // Locked, or read-only, or only for the dual-monitor treatment, which is not offered.
        IA32_FEATURE_CONTROL | IA32_SMM_MONITOR_CTL => None,
        _ if VMX_CAPABILITIES.contains(&msr) => None,
        // What a hypervisor below has there is not for guests of l1hv.
        _ if is_outside_ranges(msr) || matches!(held(msr), Some(Held::Absent | Held::Locked)) => None,
        // DEVIATION: an update does nothing, as under every hypervisor; a guest that looks finds the old revision.
        IA32_BIOS_UPDT_TRIG => return Ok(()),
        // DEVIATION: the bare machine lets its owner switch execute-disable off; the host's page tables need it.
        IA32_MISC_ENABLE => machine.read_msr(msr).and_then(|current| misc_enable_written(value, current)),
        IA32_XSS if !xss_may_be(value) => None,
        // DEVIATION: the bare machine lets its owner move the APIC over any memory; over the host's it may not.
        IA32_APIC_BASE if vcpu.memory.is_host(Gpa(value & !0xfff)) || !vcpu.caps.is_physical(value) => None,
        _ => Some(value),
    };
    value.and_then(|value| machine.write_msr(msr, value)).ok_or(Fault::GeneralProtection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeMachine, Ram, Variant, hypervisor_registers};

    #[test]
    fn an_msr_that_is_held_reaches_the_processor_only_as_its_row_says() {
        let ram = Ram::with_paging();
        let machine = FakeMachine::new(&hypervisor_registers(), ram, Variant::default());
        let vcpu = &machine.vcpu;
        let read = |msr| read_for_guest(&vcpu.machine, &vcpu.offered, msr);
        let written = |msr, value| {
            let outcome = write_for_guest(vcpu, msr, value);
            (outcome.is_ok(), vcpu.machine.msrs.borrow().get(&msr).copied())
        };
        for msr in 0..0x2000 {
            let is_capability = VMX_CAPABILITIES.contains(&msr);
            match held(msr) {
                Some(Held::Absent) => {
                    assert_eq!((read(msr).is_err(), written(msr, 1)), (true, (false, None)), "{msr:x}");
                }
                Some(Held::Locked) => assert_eq!((read(msr), written(msr, 1)), (Ok(0), (false, None)), "{msr:x}"),
                Some(_) if is_capability => assert_eq!(written(msr, 1), (false, None), "{msr:x}"),
                None => assert_eq!(written(msr, 1), (true, Some(1)), "{msr:x}"),
                Some(_) => (),
            }
        }
        assert_eq!(written(IA32_MISC_ENABLE, 1 << 34 | 1), (false, None));
        assert_eq!(written(IA32_MISC_ENABLE, 1), (true, Some(1)));
        assert_eq!(read(IA32_MISC_ENABLE), Ok(1 | 3 << 11));
        assert_eq!(written(IA32_XSS, 1 << 8), (false, None));
        assert_eq!(written(IA32_XSS, 1 << 11), (true, Some(1 << 11)));
        assert_eq!(written(IA32_BIOS_UPDT_TRIG, 1), (true, None));
        assert_eq!(written(IA32_APIC_BASE, 1 << vcpu.caps.physical_bits), (false, None));
        assert_eq!(read(IA32_FEATURE_CONTROL), Ok(FEATURE_CONTROL));
        vcpu.machine.msrs.borrow_mut().insert(IA32_FEATURE_CONTROL, !0);
        assert_eq!(read(IA32_FEATURE_CONTROL), Ok(FEATURE_CONTROL | LMCE_ON));
        assert!(!written(IA32_FEATURE_CONTROL, 1).0 && !written(IA32_SMM_MONITOR_CTL, 1).0);
    }
}
