//! EPT violations of the guest hypervisor: addresses beyond what EPT01 maps from the start.

use ept::Gpa;
use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::Action;
use crate::nested;
use crate::vcpu::Vcpu;

/// Maps what was missing. EPT01 permits everything that it maps, except writes to a page that the host watches.
pub fn ept_violation(vcpu: &mut Vcpu) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let address = Gpa(vmcs01.read(GUEST_PHYSICAL_ADDRESS));
    if let Err(reported) = shadow::event::redeliver(&mut vcpu.vmcs.vmcs01(), &vcpu.caps) {
        crate::log::warn_of_repeatable(format_args!(
            "an exit of the guest hypervisor interrupted {reported:x?}, which is no event"
        ));
    }
    vcpu.memory.unwatch(address);
    map_beyond(vcpu, address);
    Action::Resume
}

/// Maps what EPT01 does not map yet. When tables run out, translations of nested guests make room. Apart from the run loop, as it happens once
/// for each address.
#[inline(never)]
pub fn map_beyond(vcpu: &mut Vcpu, address: Gpa) {
    loop {
        let outcome = vcpu.ept01.writer().map_beyond(&mut vcpu.tables, address);
        match outcome {
            Ok(false) => return,
            Ok(true) => return log::debug!("mapped what is around {address}"),
            Err(_) if nested::make_room(vcpu).is_err() => {
                crate::stop::stop_internal!(
                    "no table is left to map {address}: raise ept-tables=COUNT or host-memory=MIB"
                )
            }
            Err(_) => (),
        }
    }
}
