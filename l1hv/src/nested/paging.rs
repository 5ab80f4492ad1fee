//! EPT02 in action: which EPTP vmcs02 gets, what an EPT violation means, what an INVEPT drops.

use ept::map::OutOfTables;
use ept::nested::{Context, Dropped, Extent, Fill};
use ept::violation::EptViolation;
use ept::walk::Ept12;
use ept::{Eptp, ExecuteControl, NestedGpa};
use shadow::FieldSet;
use shadow::controls::Secondary;
use shadow::event::BLOCKING_BY_NMI;
use shadow::exit::ExitReason;
use shadow::fields::*;
use shadow::hw::VmcsAccess;

use super::injection;
use super::page_log::Logged;
use super::reflect::{Reflected, reflect};
use super::virtualization_exception;
use crate::arch::vmx::{Invept, invept};
use crate::exit::map_beyond;
use crate::hw::{Ept12Memory, Ept12Unflagged};
use crate::vcpu::Vcpu;

/// What of VMCS12 decides which EPT12 its nested guest has.
const SOURCE: FieldSet = FieldSet::of(&[PRIMARY_CONTROLS.id(), SECONDARY_CONTROLS.id(), EPT_POINTER.id()]);

/// The EPTP that vmcs02 needs for VMCS12.
#[inline]
pub fn eptp02(vcpu: &mut Vcpu) -> Eptp {
    // The EPT02 that vmcs02 has is never taken back.
    if vcpu.vmx.vmcs12.dirty.intersects(&SOURCE) { find_eptp02(vcpu) } else { vcpu.nested.eptp02 }
}

#[inline(never)]
fn find_eptp02(vcpu: &mut Vcpu) -> Eptp {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let by_mode = vmcs12.has_secondary(Secondary::MODE_BASED_EXECUTE);
    let execute = if by_mode { ExecuteControl::BY_MODE } else { ExecuteControl::UNIFORM };
    let ept12 =
        vmcs12.has_secondary(Secondary::ENABLE_EPT).then(|| Ept12 { eptp: Eptp(vmcs12.get(EPT_POINTER)), execute });
    vcpu.nested.converts_violations = vmcs12.has_secondary(Secondary::EPT_VIOLATION_VE);
    vcpu.nested.logs_pages = vmcs12.has_secondary(Secondary::ENABLE_PML);
    vcpu.nested.ept12 = ept12;
    let Some(ept12) = ept12 else { return vcpu.ept01.root() };
    let (eptp02, dropped) = vcpu.nested.paging.activate(&mut vcpu.tables, ept12).unwrap_or_else(|error| stop(error));
    flush(dropped);
    eptp02
}

#[cold]
fn stop(_: OutOfTables) -> ! {
    crate::stop::stop_internal!("no table is left for an EPT02: raise ept-tables=COUNT or host-memory=MIB")
}

/// VMCS12 has another EPTP than when its nested guest was entered.
pub fn switch_eptp(vcpu: &mut Vcpu) {
    let eptp02 = find_eptp02(vcpu);
    vcpu.vmcs.vmcs02().write(EPT_POINTER, eptp02.0);
    vcpu.nested.eptp02 = eptp02;
}

/// An EPT violation or misconfiguration of vmcs02.
pub fn handle(vcpu: &mut Vcpu) {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let address = NestedGpa(vmcs02.read(GUEST_PHYSICAL_ADDRESS));
    let qualification = EptViolation(vmcs02.read(EXIT_QUALIFICATION));
    let Some(ept12) = vcpu.nested.ept12 else {
        // On EPT01 itself.
        permit(vcpu, ept::Gpa(address.0));
        return repaired(vcpu, qualification);
    };
    if vcpu.nested.logs_pages {
        return handle_and_log(vcpu, ept12, address, qualification);
    }
    let filled = fill(vcpu, ept12, address, qualification);
    handle_filled(vcpu, filled, address, qualification);
}

/// What follows from what became of a violation.
#[inline(always)]
fn handle_filled(vcpu: &mut Vcpu, filled: Fill, address: NestedGpa, qualification: EptViolation) {
    match filled {
        Fill::Mapped => repaired(vcpu, qualification),
        Fill::Ept01Forbids(gpa) => {
            permit(vcpu, gpa);
            repaired(vcpu, qualification);
        }
        Fill::Violation { qualification: of_ept12, suppresses_ve: false }
            if vcpu.nested.converts_violations && virtualization_exception::convert(vcpu, address, of_ept12) => {}
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
    let (Some((address, qualification)), Some(ept12)) = (vcpu.nested.violation.take(), vcpu.nested.ept12) else {
        return;
    };
    // The nested guest may do something else first, so this sets no flag: hypervisors map a page with its flags set.
    let (tables, memory) = (&mut vcpu.tables, &mut Ept12Unflagged(Ept12Memory(&vcpu.memory)));
    let mut context = Context { tables, guest: memory, ept01: vcpu.ept01.root() };
    let filled = vcpu.nested.paging.fill(&mut context, ept12, address, qualification, Extent::Page);
    flush(filled.unwrap_or_else(|error| stop(error)).1);
}

#[inline(always)]
fn fill(vcpu: &mut Vcpu, ept12: Ept12, address: NestedGpa, qualification: EptViolation) -> Fill {
    let mut memory = Ept12Memory(&vcpu.memory);
    let mut context = Context { tables: &mut vcpu.tables, guest: &mut memory, ept01: vcpu.ept01.root() };
    let (fill, dropped) = vcpu
        .nested
        .paging
        .fill(&mut context, ept12, address, qualification, Extent::Table)
        .unwrap_or_else(|error| stop(error));
    flush(dropped);
    fill
}

/// The same with page-modification logging.
#[cold]
#[inline(never)]
fn handle_and_log(vcpu: &mut Vcpu, ept12: Ept12, address: NestedGpa, qualification: EptViolation) {
    let area = ept::Gpa(vcpu.vmx.vmcs12.get(PML_ADDRESS));
    let mut memory = Logged::new(&vcpu.memory, vcpu.vmcs.vmcs02(), area, address);
    let mut context = Context { tables: &mut vcpu.tables, guest: &mut memory, ept01: vcpu.ept01.root() };
    let (filled, dropped) = vcpu
        .nested
        .paging
        .fill(&mut context, ept12, address, qualification, Extent::Table)
        .unwrap_or_else(|error| stop(error));
    flush(dropped);
    if memory.is_full() {
        // Of the qualification only bit 12 is left: NMI unblocking due to IRET (SDM 28.2.1).
        let qualification = u64::from(qualification.nmi_unblocking()) << 12;
        return reflect(vcpu, Reflected { reason: ExitReason::PML_FULL, qualification: Some(qualification) });
    }
    handle_filled(vcpu, filled, address, qualification);
}

/// EPT01 does not permit an access: it lacks the address, or it watches the page for a write.
fn permit(vcpu: &mut Vcpu, gpa: ept::Gpa) {
    vcpu.memory.unwatch(gpa);
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
    let (paging, tables) = (&mut vcpu.nested.paging, &mut vcpu.tables);
    flush(match eptp12 {
        Some(eptp12) => paging.invalidate(tables, eptp12),
        None => paging.invalidate_all(tables),
    });
}

/// VM entry of a nested guest without a VPID, whose linear translations every entry drops. The processor may keep guest-physical ones (SDM
/// 29.4.3 "Invalidating Cached Translation Information"), but as it walks EPT12 anew for what it dropped, software gets away with an edit of
/// EPT12 and no INVEPT. So it does here.
pub fn walk_anew(vcpu: &mut Vcpu) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    if vmcs12.has_secondary(Secondary::ENABLE_EPT) {
        let eptp12 = Eptp(vmcs12.get(EPT_POINTER));
        flush(vcpu.nested.paging.invalidate(&mut vcpu.tables, eptp12));
    }
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
