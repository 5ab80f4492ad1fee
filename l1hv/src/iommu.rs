//! IOMMUs: all devices are kept from the host's memory, by tables that do not change while the guest runs. The guest
//! finds neither the units nor the firmware's table of them.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use boot::acpi::dmar::{Dmar, MAX_UNITS};
use boot::acpi::{Processors, hide};
use boot::cmdline::Iommu;
use boot::iommu::{Capabilities, Fault, Plan, TableArea, Unit, Unusable};
use boot::memory_map::MemoryMap;
use boot::stop::StopKind;
use ept::Hpa;
use spin::{Mutex, Once};

use crate::arch::mmio::{self, Mmio};
use crate::arch::phys::BootMemory;
use crate::arch::{cpu, on_behalf};
use crate::log::warn_of_repeatable;
use crate::mem::{GuestRam, HostPages, HostRegion};
use crate::stop::{StopReason, stop};

/// A unit that is on, and the PCI segment of its devices.
type Active = (Unit<Mmio>, u16);

/// The units that are on.
static UNITS: Once<Mutex<ArrayVec<Active, MAX_UNITS>>> = Once::new();

/// How the units will be used. `None`, after a line in the log, if they are not.
pub fn plan(wanted: Iommu, acpi_rsdp: Option<u64>, memory: &MemoryMap, apic_ids: &Processors) -> Option<Plan> {
    if wanted == Iommu::Off {
        log_none(format_args!("iommu=off"));
        return None;
    }
    make_plan(acpi_rsdp, memory, apic_ids).map_err(|why| refuse(wanted, why)).ok()
}

fn make_plan(acpi_rsdp: Option<u64>, memory: &MemoryMap, apic_ids: &Processors) -> Result<Plan, Unusable> {
    /// The last id that an interrupt can name without remapping; 255 are all processors.
    const LAST_ID: u32 = 254;
    let rsdp = acpi_rsdp.ok_or(Unusable::NoUnit)?;
    let dmar = Dmar::find(&BootMemory, rsdp)?.ok_or(Unusable::NoUnit)?;
    if cpu::is_locked_in_x2apic_mode() || apic_ids.iter().any(|&id| id > LAST_ID) {
        return Err(Unusable::NeededByGuest);
    }
    Plan::new(&dmar, memory, on_behalf::physical_address_bits(), |unit| {
        mmio::unit_at_boot(&unit.registers).map_or(Capabilities::ABSENT, |unit| unit.capabilities())
    })
}

fn log_none(why: fmt::Arguments<'_>) {
    log::info!("devices can reach the memory of l1hv, as the guest hypervisor tells them: {why}");
}

/// The units are of no use. Stops if the user insists on them.
fn refuse(wanted: Iommu, why: Unusable) {
    if wanted == Iommu::On {
        stop(StopReason::new(
            StopKind::NoIommu,
            format_args!("{why}, and iommu=on asks for one: leave the option out"),
        ));
    }
    log_none(format_args!("{why}"));
}

/// Makes all units translate, by tables in `pages`, of which there are as many as the plan says.
pub fn turn_on(wanted: Iommu, plan: &Plan, region: HostRegion, pages: HostPages) {
    let (address, count) = (pages.phys(), plan.pages());
    let root = plan.build(region.start.0..region.end.0, TableArea::new(address.0, pages.into_tables()));
    if !plan.is_coherent {
        on_behalf::write_back_caches();
    }
    match turn_on_each(plan, root) {
        Ok(units) => {
            let (number, bits) = (units.len(), plan.address_bits());
            log::info!(
                "devices are kept from the memory of l1hv by IOMMUs: {number}, with addresses of {bits} bits, {count} pages"
            );
            if let Some(segment) = plan.partial_segment() {
                log::warn!(
                    "no IOMMU is for devices of PCI segment {segment} that the firmware does not list: they would reach the memory of l1hv"
                );
            }
            UNITS.call_once(|| Mutex::new(units));
        }
        Err(why) => refuse(wanted, why),
    }
}

fn turn_on_each(plan: &Plan, root: u64) -> Result<ArrayVec<Active, MAX_UNITS>, Unusable> {
    let turn_on = |(registers, segment): &(Range<u64>, u16)| {
        let mut unit = mmio::held_unit(registers);
        unit.turn_on(root).map_err(|silent| Unusable::Silent(registers.start, silent))?;
        Ok((unit, *segment))
    };
    plan.units.iter().map(turn_on).collect()
}

/// Takes the firmware's table of units from where a guest looks for it.
pub fn hide_table(plan: &Plan, acpi_rsdp: Option<u64>, ram: &GuestRam) {
    let Some(rsdp) = acpi_rsdp else { return };
    let hidden = hide(&BootMemory, rsdp, plan.table, |at, bytes| ram.write(Hpa(at), bytes));
    if hidden.is_err() || !matches!(Dmar::find(&BootMemory, rsdp), Ok(None)) {
        log::warn!(
            "the firmware's table of IOMMUs (DMAR) cannot be changed: guests find it, and no IOMMU where it says"
        );
    }
}

/// Logs what the units have blocked since the last time. Of many faults only the first are logged.
pub fn report() {
    let Some(mut units) = UNITS.get().and_then(|units| units.try_lock()) else { return };
    for (unit, segment) in units.iter_mut() {
        let report = |fault: Fault| warn_of_repeatable(format_args!("an IOMMU has blocked {fault}, segment {segment}"));
        if unit.faults(report) {
            warn_of_repeatable(format_args!("an IOMMU has blocked more than it could note, segment {segment}"));
        }
    }
}

/// [`report`], but rarely: for exits that a guest may cause often.
#[inline]
pub fn report_now_and_then() {
    if UNITS.get().is_some() {
        report_if_due();
    }
}

#[cold]
fn report_if_due() {
    /// A tenth of a second, more or less.
    const TSC_TICKS: u64 = 1 << 28;
    static DUE: AtomicU64 = AtomicU64::new(0);
    let now = cpu::tsc();
    let is_due = |due: u64| (now >= due).then(|| now.saturating_add(TSC_TICKS));
    if DUE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, is_due).is_ok() {
        report();
    }
}
