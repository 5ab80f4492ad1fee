//! EPT02 in use: the EPTP that vmcs02 gets, the handling of EPT violations, and the translations that an INVEPT drops.

use crate::FieldSet;
use crate::controls::Secondary;
use crate::event::block_nmis_again;
use crate::exit::ExitReason;
use crate::fields::*;
use crate::hw::VmcsAccess;
use ept::map::OutOfTables;
use ept::nested::{Context, Dropped, Extent, Fill};
use ept::violation::EptViolation;
use ept::walk::Ept12;
use ept::{Eptp02, Eptp12, ExecuteControl, Gpa, NestedGpa};

use super::ept12_memory::{Ept12Memory, Ept12Unflagged};
use super::fault::raise;
use super::machine::{Invept, Machine, Stop, VmcsPair, WatchedMemory};
use super::page_log::Logged;
use super::reflect::{Reflected, reflect, triple_fault};
use super::vcpu::Vcpu;
use super::virtualization_exception;
use super::{beyond, injection};

/// The fields of VMCS12 that decide which EPT12 its nested guest has.
const SOURCE: FieldSet = FieldSet::of(&[PRIMARY_CONTROLS.id(), SECONDARY_CONTROLS.id(), EPT_POINTER.id()]);

/// The EPTP that vmcs02 needs for VMCS12.
#[inline]
pub fn eptp02<M: Machine>(vcpu: &mut Vcpu<M>) -> Eptp02 {
    // The cache never drops the EPT02 that vmcs02 has.
    if vcpu.vmx.vmcs12.dirty.intersects(&SOURCE) { find_eptp02(vcpu) } else { vcpu.nested.ept.eptp02 }
}

#[inline(never)]
fn find_eptp02<M: Machine>(vcpu: &mut Vcpu<M>) -> Eptp02 {
    let vmcs12 = &vcpu.vmx.vmcs12;
    let by_mode = vmcs12.has_secondary(Secondary::MODE_BASED_EXECUTE);
    let execute = if by_mode { ExecuteControl::BY_MODE } else { ExecuteControl::UNIFORM };
    let ept12 = vmcs12
        .has_secondary(Secondary::ENABLE_EPT)
        .then(|| Ept12 { eptp: Eptp12::from_bits(vmcs12.get(EPT_POINTER)), execute });
    vcpu.nested.ept.converts_violations = vmcs12.has_secondary(Secondary::EPT_VIOLATION_VE);
    vcpu.nested.ept.logs_pages = vmcs12.has_secondary(Secondary::ENABLE_PML);
    vcpu.nested.ept.ept12 = ept12;
    let Some(ept12) = ept12 else { return vcpu.machine.ept01().without_ept12() };
    let (eptp02, dropped) =
        vcpu.nested.ept.cache.activate(&mut vcpu.tables, ept12).unwrap_or_else(|_| stop(&vcpu.machine));
    flush(&vcpu.machine, dropped);
    eptp02
}

#[cold]
fn stop(machine: &impl Machine) -> ! {
    machine.stop(Stop::NoTables)
}

/// Gives vmcs02 the EPTP for VMCS12's new EPTP, after EPTP switching by the running nested guest.
pub fn switch_eptp<M: Machine>(vcpu: &mut Vcpu<M>) {
    let eptp02 = find_eptp02(vcpu);
    vcpu.vmcs.vmcs02().write(EPT_POINTER, eptp02.bits());
    vcpu.nested.ept.eptp02 = eptp02;
}

/// An EPT violation or misconfiguration of vmcs02.
pub fn handle<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs02 = vcpu.vmcs.vmcs02();
    let address = NestedGpa(vmcs02.read(GUEST_PHYSICAL_ADDRESS));
    let qualification = EptViolation(vmcs02.read(EXIT_QUALIFICATION));
    let Some(ept12) = vcpu.nested.ept.ept12 else {
        // On EPT01 itself.
        if !vcpu.caps.is_physical(address.0) {
            return match beyond::fault(vcpu.vmcs.vmcs02()) {
                Some(fault) => raise(vcpu, fault),
                None => triple_fault(vcpu),
            };
        }
        permit(vcpu, Gpa(address.0));
        return repaired(vcpu, qualification);
    };
    if vcpu.nested.ept.logs_pages {
        return handle_and_log(vcpu, ept12, address, qualification);
    }
    let filled = fill(vcpu, ept12, address, qualification);
    handle_filled(vcpu, filled, address, qualification);
}

/// Acts on the outcome of filling EPT02 after a violation.
#[inline(always)]
fn handle_filled<M: Machine>(vcpu: &mut Vcpu<M>, filled: Fill, address: NestedGpa, qualification: EptViolation) {
    match filled {
        Fill::Mapped => repaired(vcpu, qualification),
        Fill::Ept01Forbids(gpa) => {
            permit(vcpu, gpa);
            repaired(vcpu, qualification);
        }
        Fill::Violation { qualification: of_ept12, suppresses_ve: false }
            if vcpu.nested.ept.converts_violations && virtualization_exception::convert(vcpu, address, of_ept12) => {}
        Fill::Violation { qualification: of_ept12, .. } => {
            vcpu.nested.ept.violation = Some((address, of_ept12));
            // EPT02 may lack just what EPT12 lacks: then vmcs02's exit information is right already.
            let reason = ExitReason::EPT_VIOLATION;
            let seen = match of_ept12 == qualification {
                true => Reflected::AsTaken(reason),
                false => Reflected::Changed { reason, qualification: of_ept12.0 },
            };
            reflect(vcpu, seen);
        }
        Fill::Misconfiguration => {
            let reason = ExitReason::EPT_MISCONFIGURATION;
            reflect(vcpu, Reflected::Changed { reason, qualification: 0 });
        }
    }
}

/// Called when the guest hypervisor resumes its nested guest after a reflected violation. If EPT12 now maps the
/// address, EPT02 gets the translation before the nested guest tries again, which saves a second exit.
pub fn fill_after_reflected_violation<M: Machine>(vcpu: &mut Vcpu<M>) {
    let (Some((address, qualification)), Some(ept12)) = (vcpu.nested.ept.violation.take(), vcpu.nested.ept.ept12)
    else {
        return;
    };
    // The nested guest may not repeat the access, so this sets no flag: hypervisors map a page with its flags set.
    let (tables, memory) = (&mut vcpu.tables, &mut Ept12Unflagged(Ept12Memory(&vcpu.memory)));
    let mut context = Context { tables, guest: memory, ept01: vcpu.machine.ept01() };
    let filled = vcpu.nested.ept.cache.fill(&mut context, ept12, address, qualification, Extent::Page);
    flush(&vcpu.machine, filled.unwrap_or_else(|_| stop(&vcpu.machine)).1);
}

#[inline(always)]
fn fill<M: Machine>(vcpu: &mut Vcpu<M>, ept12: Ept12, address: NestedGpa, qualification: EptViolation) -> Fill {
    let mut memory = Ept12Memory(&vcpu.memory);
    let mut context = Context { tables: &mut vcpu.tables, guest: &mut memory, ept01: vcpu.machine.ept01() };
    let (fill, dropped) = vcpu
        .nested
        .ept
        .cache
        .fill(&mut context, ept12, address, qualification, Extent::Table)
        .unwrap_or_else(|_| stop(&vcpu.machine));
    flush(&vcpu.machine, dropped);
    fill
}

/// Handles a violation with page-modification logging.
#[cold]
#[inline(never)]
fn handle_and_log<M: Machine>(vcpu: &mut Vcpu<M>, ept12: Ept12, address: NestedGpa, qualification: EptViolation) {
    let area = Gpa(vcpu.vmx.vmcs12.get(PML_ADDRESS));
    let mut memory = Logged::new(&vcpu.memory, vcpu.vmcs.vmcs02(), area, address);
    let mut context = Context { tables: &mut vcpu.tables, guest: &mut memory, ept01: vcpu.machine.ept01() };
    let (filled, dropped) = vcpu
        .nested
        .ept
        .cache
        .fill(&mut context, ept12, address, qualification, Extent::Table)
        .unwrap_or_else(|_| stop(&vcpu.machine));
    flush(&vcpu.machine, dropped);
    if memory.is_full() {
        // A page-modification log-full exit has only bit 12 of the qualification: NMI unblocking due to IRET (SDM
        // 28.2.1).
        let qualification = (qualification & EptViolation::NMI_UNBLOCKING).bits();
        return reflect(vcpu, Reflected::Changed { reason: ExitReason::PML_FULL, qualification });
    }
    handle_filled(vcpu, filled, address, qualification);
}

/// EPT01 does not permit an access by way of an address that EPT12 gives, or of one without EPT12: it lacks the address, or it watches the page for a write.
fn permit<M: Machine>(vcpu: &mut Vcpu<M>, gpa: Gpa) {
    vcpu.memory.unwatch(gpa);
    map_beyond(vcpu, gpa);
}

/// The nested guest tries again, and an event whose delivery was interrupted is delivered again.
fn repaired<M: Machine>(vcpu: &mut Vcpu<M>, qualification: EptViolation) {
    block_nmis_again(vcpu.vmcs.vmcs02(), qualification);
    injection::redeliver(vcpu);
}

/// Drops translations of one EPTP12 or of all: for an INVEPT of the guest hypervisor, or when EPT01 permits less than
/// before.
pub fn drop_translations<M: Machine>(vcpu: &mut Vcpu<M>, eptp12: Option<Eptp12>) {
    vcpu.nested.ept.violation = None;
    let (cache, tables) = (&mut vcpu.nested.ept.cache, &mut vcpu.tables);
    flush(
        &vcpu.machine,
        match eptp12 {
            Some(eptp12) => cache.invalidate(tables, eptp12),
            None => cache.invalidate_all(tables),
        },
    );
}

/// Drops an EPT02 at the entry of a nested guest without a VPID. On the bare machine such an entry drops linear and
/// combined translations and may keep guest-physical ones (SDM 29.4.3 "Invalidating Cached Translation Information"),
/// but the processor then walks EPT12 anew, so that software succeeds that edits EPT12 without INVEPT. It must succeed
/// here too.
pub fn drop_ept02_without_vpid<M: Machine>(vcpu: &mut Vcpu<M>) {
    let vmcs12 = &vcpu.vmx.vmcs12;
    if vmcs12.has_secondary(Secondary::ENABLE_EPT) {
        let eptp12 = Eptp12::from_bits(vmcs12.get(EPT_POINTER));
        flush(&vcpu.machine, vcpu.nested.ept.cache.invalidate(&mut vcpu.tables, eptp12));
    }
}

/// Makes room for a table of EPT01, without touching the EPT02 that vmcs02 has.
fn make_room<M: Machine>(vcpu: &mut Vcpu<M>) -> Result<(), OutOfTables> {
    flush(&vcpu.machine, vcpu.nested.ept.cache.reclaim(&mut vcpu.tables, Some(vcpu.nested.ept.eptp02))?);
    Ok(())
}

fn flush(machine: &impl Machine, dropped: Dropped) {
    match dropped {
        Dropped::Nothing => (),
        Dropped::One(eptp02) => machine.invept(Invept::Single(eptp02)),
        Dropped::All => machine.invept(Invept::Global),
    }
}

/// Maps the surroundings of an address in EPT01, if EPT01 does not map it yet. When tables run out, translations of
/// nested guests make room. Not inlined into the run loop, as this happens once for each address.
#[inline(never)]
pub fn map_beyond<M: Machine>(vcpu: &mut Vcpu<M>, address: Gpa) {
    loop {
        match vcpu.machine.map_beyond(&mut vcpu.tables, address) {
            Ok(false) => return,
            Ok(true) => return log::debug!("mapped what is around {address}"),
            Err(_) if make_room(vcpu).is_err() => {
                vcpu.machine.warn(format_args!("no table is left to map {address}: nothing is there from now on"));
                return vcpu.machine.map_to_nothing(address);
            }
            Err(_) => (),
        }
    }
}
