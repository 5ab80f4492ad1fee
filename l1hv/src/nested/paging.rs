//! EPT02 in action: which EPTP vmcs02 gets, what an EPT violation means, what an INVEPT drops.

use ept::nested::{Dropped, Fill};
use ept::violation::Qualification;
use ept::{Eptp, NestedGpa};
use shadow::controls::Secondary;
use shadow::event::BLOCKING_BY_NMI;
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::enter::eptp01;
use super::injection;
use super::msr_bitmap::unwatch;
use super::reflect::{Reflected, reflect};
use crate::arch::vmx::{Invept, invept};
use crate::exit::map_beyond;
use crate::hw::Ept12;
use crate::vcpu::Vcpu;

/// The EPTP that vmcs02 needs for VMCS12.
pub fn eptp02(vcpu: &mut Vcpu) -> Eptp {
    let Some(eptp12) = eptp12(vcpu) else { return eptp01(vcpu) };
    match vcpu.nested.paging.activate(&mut vcpu.tables, eptp12) {
        Ok((eptp02, dropped)) => {
            flush(dropped);
            eptp02
        }
        Err(ept::map::OutOfTables) => {
            crate::stop::stop_internal!("no table is left for an EPT02: raise host-memory=MIB")
        }
    }
}

fn eptp12(vcpu: &Vcpu) -> Option<Eptp> {
    let vmcs12 = &vcpu.vmx.vmcs12;
    vmcs12.has_secondary(Secondary::ENABLE_EPT).then(|| Eptp(vmcs12.get(EPT_POINTER)))
}

/// An EPT violation or misconfiguration of vmcs02.
pub fn handle(vcpu: &mut Vcpu) {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let address = NestedGpa(vmcs02.read(GUEST_PHYSICAL_ADDRESS));
    let qualification = Qualification(vmcs02.read(EXIT_QUALIFICATION));
    let Some(eptp12) = eptp12(vcpu) else {
        // On EPT01 itself.
        permit(vcpu, ept::Gpa(address.0));
        return repaired(vcpu, qualification);
    };
    match fill(vcpu, eptp12, address, qualification) {
        Fill::Mapped => repaired(vcpu, qualification),
        Fill::Ept01Forbids(gpa) => {
            permit(vcpu, gpa);
            repaired(vcpu, qualification);
        }
        Fill::Violation(of_ept12) => {
            vcpu.nested.violation = Some((address, of_ept12));
            // What EPT02 lacked may be just what EPT12 lacks: then vmcs02 has the right information already.
            let changed = (of_ept12 != qualification).then_some(of_ept12.0);
            reflect(vcpu, Reflected { reason: ExitReason::EPT_VIOLATION, qualification: changed });
        }
        Fill::Misconfiguration => {
            reflect(vcpu, Reflected { reason: ExitReason::EPT_MISCONFIGURATION, qualification: Some(0) });
        }
    }
}

/// The guest hypervisor has seen a violation and resumes the nested guest: if it has repaired EPT12, the translation is in EPT02 before the
/// nested guest tries again, which saves it a second exit.
pub fn anticipate(vcpu: &mut Vcpu) {
    let (Some((address, qualification)), Some(eptp12)) = (vcpu.nested.violation.take(), eptp12(vcpu)) else { return };
    // The nested guest may do something else first, so this must not set a dirty flag; a leaf that is dirty already is writable even so.
    let qualification = if eptp12.accessed_dirty() { qualification.as_read() } else { qualification };
    let _ = fill(vcpu, eptp12, address, qualification);
}

fn fill(vcpu: &mut Vcpu, eptp12: Eptp, address: NestedGpa, qualification: Qualification) -> Fill {
    let mut ept12 = Ept12(&vcpu.memory);
    let (fill, dropped) =
        vcpu.nested.paging.fill(&mut vcpu.tables, &mut ept12, vcpu.ept01, eptp12, address, qualification);
    flush(dropped);
    fill
}

/// EPT01 does not permit an access: it lacks the address, or it watches the page for a write.
fn permit(vcpu: &mut Vcpu, gpa: ept::Gpa) {
    unwatch(vcpu, gpa);
    map_beyond(vcpu, gpa);
}

/// The nested guest tries again: an event whose delivery was interrupted is delivered again, and an IRET that had unblocked NMIs before
/// it faulted blocks them again (SDM 28.2.3, bit 12 of the qualification).
fn repaired(vcpu: &mut Vcpu, qualification: Qualification) {
    let mut vmcs02 = vcpu.vmcs.vmcs02();
    let delivering = vmcs02.read(IDT_VECTORING_INFO) >> 31 != 0;
    if !delivering && qualification.nmi_unblocking() {
        let state = vmcs02.read(GUEST_INTERRUPTIBILITY);
        vmcs02.write(GUEST_INTERRUPTIBILITY, state | BLOCKING_BY_NMI);
    }
    injection::redeliver(vcpu);
}

/// INVEPT of the guest hypervisor, for one EPTP12 or for all.
pub fn drop_translations(vcpu: &mut Vcpu, eptp12: Option<Eptp>) {
    vcpu.nested.violation = None;
    let dropped = match eptp12 {
        Some(eptp12) => vcpu.nested.paging.invalidate(&mut vcpu.tables, eptp12),
        None => vcpu.nested.paging.invalidate_all(&mut vcpu.tables),
    };
    flush(dropped);
}

fn flush(dropped: Dropped) {
    match dropped {
        Dropped::Nothing => (),
        Dropped::One(eptp02) => invept(Invept::Single(eptp02)),
        Dropped::All => invept(Invept::Global),
    }
}
