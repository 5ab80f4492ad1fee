//! The BIOS below the guest: it is told of the host's region, and starts a disk.

use core::ops::Range;

use boot::bios::{BASE_MEMORY_KIB, Bios, INT15_VECTOR, Place, SERVICES_BYTES};
use boot::entry::bios_services;
use boot::memory_map::MemoryMap;
use boot::multiboot::BootInfo;
use boot::stop::StopKind;
use ept::Hpa;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::nested::VmcsPair;
use shadow::registers::CR0_PE;

use crate::arch::phys::BootMemory;
use crate::hw::Vcpu;
use crate::mem::{GuestRam, HostPages};
use crate::stop::{StopReason, stop};

/// The machine's BIOS, and the place of what the host adds to it.
pub struct Extension {
    bios: Bios,
    place: Place,
}

/// A disk that the guest begins with.
#[derive(Clone, Copy, Debug)]
pub struct DiskStart {
    /// The first instruction, in real mode: segment and offset.
    pub entry: (u16, u16),
    /// The BIOS' number of the disk.
    drive: u8,
    /// The linear address of the VMCALL that says that there is no boot sector.
    no_boot_sector: u64,
}

impl Extension {
    /// `None` without a BIOS.
    pub fn find(boot_info: &BootInfo) -> Option<Self> {
        let bios = Bios::find(&BootMemory).filter(|_| !boot_info.is_efi)?;
        let place = Place::find(&boot_info.memory_map, &boot_info.module_ranges());
        if place.is_none() {
            log::warn!("no low memory is free: the BIOS will call the memory of l1hv free");
        }
        place.map(|place| Self { bios, place })
    }

    /// The memory that it takes.
    pub fn range(&self) -> Range<u64> {
        self.place.range()
    }

    /// Makes the BIOS tell of the memory in `map`, and start `drive` if the guest is to begin there. `scratch` is
    /// [`SERVICES_BYTES`].
    pub fn install(self, ram: &GuestRam, map: &MemoryMap, drive: Option<u8>, scratch: HostPages) -> Option<DiskStart> {
        let Self { bios, place } = self;
        let (services, _) = scratch.into_bytes().split_first_chunk_mut::<SERVICES_BYTES>()?;
        bios.compose(bios_services(), map, drive, services);
        ram.write(Hpa(place.range().start), services);
        ram.write(Hpa(INT15_VECTOR), &place.int15().to_le_bytes());
        ram.write(Hpa(BASE_MEMORY_KIB), &place.base_memory_kib().to_le_bytes());
        drive.map(|drive| DiskStart {
            entry: (place.segment(), place.start()),
            drive,
            no_boot_sector: place.no_boot_sector(),
        })
    }
}

/// Whether a VMCALL says that the disk has no boot sector.
pub fn is_without_boot_sector(vcpu: &mut Vcpu) -> bool {
    let Some(DiskStart { no_boot_sector, .. }) = vcpu.machine.disk else { return false };
    let vmcs01 = vcpu.vmcs.vmcs01();
    let address = vmcs01.read(GUEST_CS_BASE) + vmcs01.read(GUEST_RIP);
    vmcs01.read(GUEST_CR0) & CR0_PE == 0 && address == no_boot_sector
}

/// Stops because the disk cannot be started.
#[cold]
pub fn stop_without_boot_sector(vcpu: &Vcpu) -> ! {
    let drive = vcpu.machine.disk.map_or(0, |disk| disk.drive);
    let message = format_args!(
        "the BIOS finds no boot sector on drive {drive:#x}: attach a disk that boots, or name another with boot=0x80, boot=0x81, ..."
    );
    stop(StopReason::new(StopKind::NoGuestImage, message))
}
