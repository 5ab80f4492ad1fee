//! EPT02 in action: which EPTP vmcs02 gets, what an EPT violation means, what an INVEPT drops.

use ept::map::OutOfTables;
use ept::nested::{Dropped, Fill};
use ept::violation::EptViolation;
use ept::walk::Ept12;
use ept::{Eptp, ExecuteControl, NestedGpa};
use shadow::controls::Secondary;
use shadow::event::BLOCKING_BY_NMI;
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::injection;
use super::msr_bitmap::unwatch;
use super::reflect::{Reflected, reflect};
use crate::arch::vmx::{Invept, invept};
use crate::exit::map_beyond;
use crate::hw::Ept12Memory;
use crate::vcpu::Vcpu;

/// The EPTP that vmcs02 needs for VMCS12.
pub fn eptp02(vcpu: &mut Vcpu) -> Eptp {
    let Some(ept12) = ept12(vcpu) else { return vcpu.ept01 };
    let (eptp02, dropped) = vcpu.nested.paging.activate(&mut vcpu.tables, ept12).unwrap_or_else(|error| stop(error));
    flush(dropped);
    eptp02
}

#[cold]
fn stop(_: OutOfTables) -> ! {
    crate::stop::stop_internal!("no table is left for an EPT02: raise ept-tables=COUNT or host-memory=MIB")
}

fn ept12(vcpu: &Vcpu) -> Option<Ept12> {
    let vmcs12 = &vcpu.vmx.vmcs12;
    vmcs12
        .has_secondary(Secondary::ENABLE_EPT)
        .then(|| Ept12 { eptp: Eptp(vmcs12.get(EPT_POINTER)), execute: ExecuteControl::Uniform })
}

/// An EPT violation or misconfiguration of vmcs02.
pub fn handle(vcpu: &mut Vcpu) {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let address = NestedGpa(vmcs02.read(GUEST_PHYSICAL_ADDRESS));
    let qualification = EptViolation(vmcs02.read(EXIT_QUALIFICATION));
    let Some(ept12) = ept12(vcpu) else {
        // On EPT01 itself.
        permit(vcpu, ept::Gpa(address.0));
        return repaired(vcpu, qualification);
    };
    match fill(vcpu, ept12, address, qualification) {
        Fill::Mapped => repaired(vcpu, qualification),
        Fill::Ept01Forbids(gpa) => {
            permit(vcpu, gpa);
            repaired(vcpu, qualification);
        }
        Fill::Violation { qualification: of_ept12, .. } => {
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
    let (Some((address, qualification)), Some(ept12)) = (vcpu.nested.violation.take(), ept12(vcpu)) else { return };
    // The nested guest may do something else first, so this must not set a dirty flag; a leaf that is dirty already is writable even so.
    let qualification = if ept12.eptp.has_flags() { qualification.as_read() } else { qualification };
    let _ = fill(vcpu, ept12, address, qualification);
}

fn fill(vcpu: &mut Vcpu, ept12: Ept12, address: NestedGpa, qualification: EptViolation) -> Fill {
    let mut memory = Ept12Memory(&vcpu.memory);
    let (fill, dropped) = vcpu
        .nested
        .paging
        .fill(&mut vcpu.tables, &mut memory, vcpu.ept01, ept12, address, qualification)
        .unwrap_or_else(|error| stop(error));
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
fn repaired(vcpu: &mut Vcpu, qualification: EptViolation) {
    let mut vmcs02 = vcpu.vmcs.vmcs02();
    let delivering = vmcs02.read(IDT_VECTORING_INFO) >> 31 != 0;
    if !delivering && qualification.nmi_unblocking() {
        let state = vmcs02.read(GUEST_INTERRUPTIBILITY);
        vmcs02.write(GUEST_INTERRUPTIBILITY, state | BLOCKING_BY_NMI);
    }
    injection::redeliver(vcpu);
}

/// INVEPT of the guest hypervisor, for one EPTP12 or for all; or EPT01 permits less than before.
pub fn drop_translations(vcpu: &mut Vcpu, eptp12: Option<Eptp>) {
    vcpu.nested.violation = None;
    let memory = Ept12Memory(&vcpu.memory);
    let (paging, tables, ept01) = (&mut vcpu.nested.paging, &mut vcpu.tables, vcpu.ept01);
    flush(match eptp12 {
        Some(eptp12) => paging.invalidate(tables, &memory, ept01, eptp12),
        None => paging.invalidate_all(tables, &memory, ept01),
    });
}

/// Makes room for a table of EPT01, without touching the EPT02 that vmcs02 has.
pub fn make_room(vcpu: &mut Vcpu) -> Result<(), OutOfTables> {
    flush(vcpu.nested.paging.reclaim(&mut vcpu.tables, Some(vcpu.nested.eptp02))?);
    Ok(())
}

fn flush(dropped: Dropped) {
    match dropped {
        Dropped::Nothing => (),
        Dropped::One(eptp02) => invept(Invept::Single(eptp02)),
        Dropped::All => invept(Invept::Global),
    }
}
