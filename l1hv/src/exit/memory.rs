//! EPT violations of the guest hypervisor: addresses beyond what EPT01 maps from the start.

use ept::Gpa;
use ept::violation::EptViolation;
use shadow::event::{block_nmis_again, redeliver};
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::{Action, VmcsPair, WatchedMemory, map_beyond};

use crate::hw::Vcpu;

/// Maps the missing address. EPT01 permits every access to addresses that it maps, except writes to a page that the
/// host watches.
pub fn ept_violation(vcpu: &mut Vcpu) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let address = Gpa(vmcs01.read(GUEST_PHYSICAL_ADDRESS));
    block_nmis_again(vmcs01, EptViolation(vmcs01.read(EXIT_QUALIFICATION)));
    if let Err(reported) = redeliver(vmcs01, &vcpu.caps) {
        crate::log::warn_of_repeatable(format_args!(
            "an exit of the guest hypervisor interrupted {reported:x?}, which is no event"
        ));
    }
    vcpu.memory.unwatch(address);
    map_beyond(vcpu, address);
    Action::Resume
}
