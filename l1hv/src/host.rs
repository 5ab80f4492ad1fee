//! The results of the boot, and the checks and stops that its steps share.

use boot::acpi::Processors;
use boot::acpi::sleep::SleepControl;
use boot::cmdline::Options;
use boot::guest::GuestEntry;
use boot::machine::Unsupported;
use boot::memory_map::MemoryMap;
use boot::stop::StopKind;

use crate::arch::cpu;
use crate::arch::gdt::HostSegments;
use crate::bios::DiskStart;
use crate::mem::{GuestRam, HeldPages, HostRegion, HostTables, OutOfHostMemory};
use crate::stop::{StopReason, stop};

/// Everything that the boot hands to the run loop.
#[derive(Debug)]
pub struct HostSetup<'a> {
    /// The host's command line.
    pub options: Options<'a>,
    /// The memory that is the host's: the hole in EPT01.
    pub host_region: HostRegion,
    /// The machine's memory, with the host's region reserved.
    pub memory_map: MemoryMap,
    /// All memory that is not the host's.
    pub guest_ram: GuestRam,
    /// Pages of devices that are the host's.
    pub held: HeldPages,
    /// Selectors and bases for the host-state area.
    pub segments: HostSegments,
    /// How the guest's boot processor begins.
    pub start: Start,
    /// The disk that it begins with, if it does.
    pub disk: Option<DiskStart>,
    /// The machine's processors, the boot processor first.
    pub apic_ids: Processors,
    /// The host's page tables.
    pub tables: HostTables,
    /// The registers that put the machine to sleep.
    pub sleep: SleepControl,
}

/// How a guest's processor begins.
#[derive(Clone, Copy, Debug)]
pub enum Start {
    /// The boot processor runs the guest's image.
    Entry(GuestEntry),
    /// The boot processor begins in real mode, at this segment and offset.
    RealMode(u16, u16),
    /// The others wait until the guest starts them.
    WaitForSipi,
}

/// Checks that the processor has what the host needs, and enables VMX in IA32_FEATURE_CONTROL if the firmware left the
/// MSR unlocked.
pub fn check_processor() {
    let refuse = |why: Unsupported| -> ! { stop(StopReason::new(why.kind(), format_args!("{why}"))) };
    match cpu::vmx_support().check() {
        Ok(None) => {}
        Ok(Some(value)) => {
            if cpu::lock_feature_control(value).is_err() {
                refuse(Unsupported::VmxLocked);
            }
        }
        Err(why) => refuse(why),
    }
}

/// Stops because the host's region is too small for what the host must keep.
pub fn stop_host_memory(error: &OutOfHostMemory) -> ! {
    let message = format_args!(
        "the host needs {} more KiB and has {} left: raise host-memory=MIB or leave it out",
        error.wanted_pages * 4,
        error.free_pages * 4
    );
    stop(StopReason::new(StopKind::LowMemory, message))
}
