//! EPT violations of the guest hypervisor: addresses that EPT01 does not map from the start, and those that it cannot
//! map.

use ept::Gpa;
use ept::violation::EptViolation;
use shadow::event::{block_nmis_again, redeliver};
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::{Action, VmcsPair, WatchedMemory, fault_beyond_width, map_beyond};

use crate::hw::Vcpu;

/// Maps the missing address. EPT01 permits every access to addresses that it maps, except writes to a page that the
/// host watches.
pub fn ept_violation(vcpu: &mut Vcpu) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let address = Gpa(vmcs01.read(GUEST_PHYSICAL_ADDRESS));
    if !vcpu.caps.is_physical(address.0) {
        return match fault_beyond_width(vmcs01) {
            Some(fault) => Action::Inject(fault),
            None => super::triple_fault(vcpu),
        };
    }
    block_nmis_again(vmcs01, EptViolation(vmcs01.read(EXIT_QUALIFICATION)));
    if let Err(reported) = redeliver(vmcs01, &vcpu.caps) {
        crate::log::warn_of_repeatable(format_args!(
            "an exit of the guest hypervisor interrupted {reported:x?}, which is not a valid event"
        ));
    }
    vcpu.memory.unwatch(address);
    map_beyond(vcpu, address);
    Action::Resume
}
