//! Leaves the guest one processor of the machine's, by taking the others out of the firmware's lists.

use boot::acpi::{self, OneProcessor, TableError};
use ept::Hpa;
use log::Level;

use crate::arch::cpu;
use crate::arch::phys::BootMemory;
use crate::mem::GuestRam;

/// Patches the firmware's lists; returns where ACPI's root pointer is, if there is one.
///
/// Nothing here stops the machine: a guest on a machine with one processor runs whatever the tables are like, and one that does
/// not start the others runs too.
pub fn keep_one(guest_ram: &GuestRam) -> Option<u64> {
    let rsdp = acpi::find_rsdp(&BootMemory);
    let in_madt = rsdp.and_then(|rsdp| patch(guest_ram, "the MADT", Level::Warn, plan_madt(rsdp)));
    // With a MADT hardly a guest reads the older table, which often cannot be changed.
    let importance = if in_madt.is_some() { Level::Debug } else { Level::Warn };
    let in_mp_table = patch(guest_ram, "the MP table", importance, acpi::disable_in_mp_table(&BootMemory));
    let processors = in_madt.max(in_mp_table).unwrap_or(1);
    if processors > 1 {
        log::warn!(
            "the machine has {processors} processors: l1hv and its guest run on one of them, the others stay idle"
        );
    }
    rsdp
}

fn plan_madt(rsdp: u64) -> Result<Option<OneProcessor>, TableError> {
    match acpi::find_madt(&BootMemory, rsdp)? {
        Some(madt) => acpi::disable_in_madt(&BootMemory, madt, cpu::apic_id()).map(Some),
        None => Ok(None),
    }
}

/// Carries out a table's plan; returns how many processors the table had. A failure is logged at level `importance`.
fn patch(
    guest_ram: &GuestRam,
    table: &'static str,
    importance: Level,
    plan: Result<Option<OneProcessor>, TableError>,
) -> Option<usize> {
    let plan = match plan {
        Ok(plan) => plan?,
        Err(error) => {
            log::log!(
                importance,
                "{table} is unusable: {error}: if the machine has several processors, start the guest with one"
            );
            return None;
        }
    };
    for patch in &plan.patches {
        let mut now = [0];
        guest_ram.write(Hpa(patch.address), &[patch.value]);
        guest_ram.read(Hpa(patch.address), &mut now);
        if now != [patch.value] {
            // Old firmware leaves its tables in write-protected shadow memory.
            log::log!(importance, "{table} is write-protected: start the guest with one processor (Linux: `nosmp`)");
            break;
        }
    }
    Some(plan.processors)
}
