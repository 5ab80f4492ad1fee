//! Sleeping states of the machine. After most of them the firmware resumes outside VMX operation, at an address of the
//! guest's: only the one that switches the machine off goes through.

use core::sync::atomic::{AtomicBool, Ordering};

use boot::acpi::sleep::SleepControl;
use shadow::exit::IoAccess;

use crate::arch::on_behalf;
use crate::arch::phys::BootMemory;
use crate::iommu;
use crate::log::warn_of_repeatable;

/// A sleep was denied, and no guest has cleared the status that says that the machine has woken up.
static SEEMS_WOKEN: AtomicBool = AtomicBool::new(false);

/// What the firmware says of the registers.
pub fn find(acpi_rsdp: Option<u64>) -> SleepControl {
    let Some(rsdp) = acpi_rsdp else { return SleepControl::default() };
    let control = SleepControl::find(&BootMemory, rsdp).unwrap_or_else(|error| {
        log::warn!("the firmware's tables are damaged: {error}: l1hv does not keep the machine from sleeping");
        SleepControl::default()
    });
    if control.ports().next().is_some() && !control.knows_off() {
        log::warn!("the firmware names no state in which the machine is off: guests cannot switch it off by ACPI");
    }
    control
}

/// IN or OUT of a guest's to one of the ports. To a guest whose machine was to sleep it looks as if it had woken up at
/// once.
pub fn access(control: &SleepControl, access: IoAccess, value: u32) -> u32 {
    let (port, bytes) = (access.port(), access.bytes());
    if access.is_in() {
        let value = on_behalf::port_in(port, bytes);
        let seems_woken = SEEMS_WOKEN.load(Ordering::Relaxed);
        return if seems_woken { control.read_after_denial(port, bytes, value) } else { value };
    }
    iommu::report();
    let written = control.write(port, bytes, value);
    if written.clears_wake_status {
        SEEMS_WOKEN.store(false, Ordering::Relaxed);
    }
    on_behalf::port_out(port, bytes, written.value);
    if let Some(kind) = written.denied {
        SEEMS_WOKEN.store(true, Ordering::Relaxed);
        warn_of_repeatable(format_args!(
            "a guest asks for the sleeping state of SLP_TYP {kind}, from which the machine would wake up outside l1hv: denied"
        ));
    }
    0
}
