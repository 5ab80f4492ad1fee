//! EPT violations of the guest hypervisor: addresses beyond what EPT01 maps from the start.

use ept::map::{lookup, map_page};
use ept::{Entry, Gpa, Hpa, MemoryType, PageSize, Rights};
use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::Action;
use crate::nested;
use crate::vcpu::Vcpu;

/// Maps what was missing. EPT01 permits everything that it maps, except writes to a page that the host watches.
pub fn ept_violation(vcpu: &mut Vcpu) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let address = Gpa(vmcs01.read(GUEST_PHYSICAL_ADDRESS));
    shadow::event::redeliver(&mut vcpu.vmcs.vmcs01());
    nested::unwatch(vcpu, address);
    map_beyond(vcpu, address);
    Action::Resume
}

/// Maps the large page around an address that EPT01 does not map yet: devices with 64-bit windows, or nothing at all. When tables run
/// out, translations of nested guests make room.
pub fn map_beyond(vcpu: &mut Vcpu, address: Gpa) {
    if lookup(&vcpu.tables, vcpu.ept01, address.0).is_some() {
        return;
    }
    let size = PageSize::Size2M;
    let leaf = Entry::leaf(address.0, size, Rights::ALL, MemoryType::UNCACHEABLE, false);
    while map_page(&mut vcpu.tables, vcpu.ept01, address.0, size, leaf).is_err() {
        if nested::make_room(vcpu).is_err() {
            crate::stop::stop_internal!("no table is left to map {address}: raise ept-tables=COUNT or host-memory=MIB");
        }
    }
    log::debug!("mapped {size:?} at {}", Hpa(address.0).align_down(size));
}
