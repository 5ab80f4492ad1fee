//! Decides who handles an exit of a nested guest: its hypervisor, or the host.
//!
//! The host intercepts next to nothing for itself, so nearly every exit is one that the guest hypervisor asked for.
//! [`route`] lists the exits that the host examines first. All others, known or not, go to the guest hypervisor.

use crate::controls::{Primary, Secondary};
use crate::exit::ExitReason;
use crate::fields::{MSR_BITMAP, PRIMARY_CONTROLS};
use crate::hw::GuestMemory;
use crate::msr::{Access, bitmap_bit, host_owns};
use crate::permission::BITMAP_BYTES;
use crate::vmcs12::Vmcs12;
use ept::Gpa;

/// Who has asked for the exits of I/O instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoExits {
    /// The guest hypervisor, for all of them.
    #[default]
    GuestHypervisors,
    /// The host, for some.
    HostsToo,
}

/// Where an exit goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// To the guest hypervisor.
    Reflect,
    /// An EPT violation or misconfiguration of EPT02: only a walk of EPT12 tells whether the guest hypervisor gets it.
    NestedPaging,
    /// An MSR that the guest hypervisor lets its nested guest access, and that the host emulates.
    HostMsr,
    /// An I/O instruction, of which the guest hypervisor lets some through: the host may look at the port.
    Port,
    /// VMFUNC: the host emulates the function, if VMCS12 enables it.
    VmFunction,
    /// VMREAD or VMWRITE under VMCS shadowing: for a field that is not offered, perhaps only the host's bitmap made it
    /// exit.
    ShadowedField,
    /// An instruction that the processor has and that the guest hypervisor is told it lacks: undefined.
    Undefined,
    /// INIT: the host may have sent it itself, to get this processor's attention.
    Init,
}

/// Fast test before [`route`]: true if this exit is reflected whatever VMCS12 contains. False for exceptions, NMIs and
/// entry failures. Not valid for a VMCS12 with VMCS shadowing. `rcx` is the nested guest's.
#[inline(always)]
pub const fn is_always_reflected(reason: ExitReason, rcx: u64, io: IoExits) -> bool {
    const LOOKED_AT: u64 = 1 << ExitReason::EXCEPTION_OR_NMI.0
        | 1 << ExitReason::INIT.0
        | 1 << ExitReason::EPT_VIOLATION.0
        | 1 << ExitReason::EPT_MISCONFIGURATION.0
        | 1 << ExitReason::VMFUNC.0;
    match reason {
        ExitReason::IO_INSTRUCTION => matches!(io, IoExits::GuestHypervisors),
        ExitReason::RDMSR => !host_owns(rcx as u32, Access::Read),
        ExitReason::WRMSR => !host_owns(rcx as u32, Access::Write),
        _ => reason.0 < u64::BITS && LOOKED_AT >> reason.0 & 1 == 0,
    }
}

/// Decides where an exit of a nested guest with this basic reason goes. `rcx` is the nested guest's.
#[inline]
pub fn route(reason: ExitReason, rcx: u64, vmcs12: &Vmcs12, memory: &impl GuestMemory) -> Route {
    match reason {
        ExitReason::EPT_VIOLATION | ExitReason::EPT_MISCONFIGURATION => Route::NestedPaging,
        ExitReason::VMFUNC => Route::VmFunction,
        ExitReason::INIT => Route::Init,
        ExitReason::SEAMCALL
        | ExitReason::TDCALL
        | ExitReason::URDMSR
        | ExitReason::UWRMSR
        | ExitReason::RDMSR_IMMEDIATE
        | ExitReason::WRMSRNS_IMMEDIATE => Route::Undefined,
        ExitReason::IO_INSTRUCTION if lets_io_through(vmcs12) => Route::Port,
        ExitReason::RDMSR if is_hosts_msr(vmcs12, memory, rcx as u32, Access::Read) => Route::HostMsr,
        ExitReason::WRMSR if is_hosts_msr(vmcs12, memory, rcx as u32, Access::Write) => Route::HostMsr,
        ExitReason::VMREAD | ExitReason::VMWRITE if vmcs12.has_secondary(Secondary::VMCS_SHADOWING) => {
            Route::ShadowedField
        }
        _ => Route::Reflect,
    }
}

fn lets_io_through(vmcs12: &Vmcs12) -> bool {
    let controls = vmcs12.get(PRIMARY_CONTROLS);
    controls.contains(Primary::USE_IO_BITMAPS) || !controls.contains(Primary::UNCONDITIONAL_IO_EXITING)
}

/// Whether only the host makes this access exit. An access to an MSR that the host does not own exits because of the
/// guest hypervisor's bitmap.
#[inline]
fn is_hosts_msr(vmcs12: &Vmcs12, memory: &impl GuestMemory, msr: u32, access: Access) -> bool {
    host_owns(msr, access) && !intercepts_msr(vmcs12, memory, msr, access)
}

/// Whether VMCS12 makes this access exit (SDM 26.1.3, RDMSR and WRMSR).
fn intercepts_msr(vmcs12: &Vmcs12, memory: &impl GuestMemory, msr: u32, access: Access) -> bool {
    if !vmcs12.get(PRIMARY_CONTROLS).contains(Primary::USE_MSR_BITMAPS) {
        return true;
    }
    let Some((byte, bit)) = bitmap_bit(msr, access) else { return true };
    let mut bits = [0];
    memory.read(Gpa(vmcs12.get(MSR_BITMAP)) + byte as u64, &mut bits);
    bits[0] >> bit & 1 != 0
}

/// Whether VMCS12, which has VMCS shadowing, makes a VMREAD or VMWRITE of this register operand exit (SDM 26.1.3,
/// VMREAD and VMWRITE).
pub fn intercepts_field(bitmap12: Gpa, memory: &impl GuestMemory, encoding: u64) -> bool {
    const ENCODINGS: u64 = 8 * BITMAP_BYTES as u64;
    if encoding >= ENCODINGS {
        return true;
    }
    let mut bits = [0];
    memory.read(bitmap12 + encoding / 8, &mut bits);
    bits[0] >> (encoding % 8) & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeMemory, skylake_caps};
    use crate::fields::SECONDARY_CONTROLS;
    use crate::msr::IA32_FEATURE_CONTROL;

    #[test]
    fn every_reason_goes_where_its_row_says_and_an_unknown_one_is_reflected() {
        let memory = FakeMemory::new(0x2000);
        let mut vmcs12 = Vmcs12::new(Gpa(0), &skylake_caps());
        vmcs12.set(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS | Primary::ACTIVATE_SECONDARY);
        vmcs12.set(MSR_BITMAP, 0x1000);
        let mut shadowing = vmcs12.clone();
        shadowing.set(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING);
        let go = |reason, vmcs12| route(reason, IA32_FEATURE_CONTROL.into(), vmcs12, &memory);
        for number in 0..0x1_0000 {
            let reason = ExitReason(number);
            let declared = reason.info().map_or(Route::Reflect, |info| info.route);
            assert_eq!(go(reason, &shadowing), declared, "{reason:?}");
            let always = is_always_reflected(reason, IA32_FEATURE_CONTROL.into(), IoExits::HostsToo);
            assert!(!always || go(reason, &vmcs12) == Route::Reflect, "{reason:?}");
        }
    }

    #[test]
    fn a_bit_of_the_bitmap_or_an_encoding_beyond_it_makes_an_access_exit() {
        let memory = FakeMemory::new(0x2000);
        let intercepts = |encoding| intercepts_field(Gpa(0x1000), &memory, encoding);
        memory.write(Gpa(0x1000 + 0x681e / 8), &[1 << 6]);
        memory.write(Gpa(0x1fff), &[1 << 7]);
        let exiting = (0..0x8000).filter(|&encoding| intercepts(encoding));
        assert!(exiting.eq([0x681e, 0x7fff]));
        assert!(intercepts(0x8000) && intercepts(1 << 32 | 0x6820));
    }

    #[test]
    fn an_msr_the_bitmap_lets_through_is_the_hosts_and_one_outside_the_ranges_is_reflected() {
        let memory = FakeMemory::new(0x2000);
        let mut vmcs12 = Vmcs12::new(Gpa(0), &skylake_caps());
        vmcs12.set(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS);
        vmcs12.set(MSR_BITMAP, 0x1000);
        let go = |reason, msr: u32| route(reason, msr.into(), &vmcs12, &memory);
        let without_bitmaps = Vmcs12::new(Gpa(0), &skylake_caps());
        assert_eq!(route(ExitReason::RDMSR, 0, &without_bitmaps, &memory), Route::Reflect);
        assert_eq!(go(ExitReason::RDMSR, IA32_FEATURE_CONTROL), Route::HostMsr);
        assert_eq!(go(ExitReason::RDMSR, 0x4000_0000), Route::Reflect);
        const IA32_TSC: u32 = 0x10;
        assert_eq!(
            go(ExitReason::RDMSR, IA32_TSC),
            Route::Reflect,
            "nothing to the host: the bitmap must have said so"
        );
        assert!(is_always_reflected(ExitReason::WRMSR, IA32_TSC.into(), IoExits::HostsToo));
        let (byte, bit) = bitmap_bit(IA32_FEATURE_CONTROL, Access::Write).unwrap();
        memory.write(Gpa(0x1000 + byte as u64), &[1 << bit]);
        assert_eq!(go(ExitReason::WRMSR, IA32_FEATURE_CONTROL), Route::Reflect);
        assert_eq!(go(ExitReason::RDMSR, IA32_FEATURE_CONTROL), Route::HostMsr);
    }

    #[test]
    fn an_msr_that_is_held_is_the_hosts_however_much_the_bitmap_lets_through() {
        let memory = FakeMemory::new(0x2000);
        let mut vmcs12 = Vmcs12::new(Gpa(0), &skylake_caps());
        vmcs12.set(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS);
        vmcs12.set(MSR_BITMAP, 0x1000);
        for msr in 0..0x2000 {
            for (reason, access) in [(ExitReason::RDMSR, Access::Read), (ExitReason::WRMSR, Access::Write)] {
                let expected = if host_owns(msr, access) { Route::HostMsr } else { Route::Reflect };
                assert_eq!(route(reason, msr.into(), &vmcs12, &memory), expected, "{msr:x} {access:?}");
                let always = is_always_reflected(reason, msr.into(), IoExits::HostsToo);
                assert_eq!(always, expected == Route::Reflect, "{msr:x} {access:?}");
            }
        }
    }

    #[test]
    fn an_io_instruction_is_looked_at_where_the_guest_hypervisor_lets_some_through() {
        let memory = FakeMemory::new(0x2000);
        let both = Primary::UNCONDITIONAL_IO_EXITING | Primary::USE_IO_BITMAPS;
        for (controls, expected) in [
            (Primary::empty(), Route::Port),
            (Primary::USE_IO_BITMAPS, Route::Port),
            (both, Route::Port),
            (Primary::UNCONDITIONAL_IO_EXITING, Route::Reflect),
        ] {
            let mut vmcs12 = Vmcs12::new(Gpa(0), &skylake_caps());
            vmcs12.set(PRIMARY_CONTROLS, controls);
            assert_eq!(route(ExitReason::IO_INSTRUCTION, 0, &vmcs12, &memory), expected, "{controls:?}");
        }
        assert!(is_always_reflected(ExitReason::IO_INSTRUCTION, 0, IoExits::GuestHypervisors));
    }
}
