//! From the boot code's call to the guest's first instruction, step by step. A step that fails stops the machine and
//! says why.

use core::fmt;

use boot::acpi;
use boot::cmdline::Options;
use boot::multiboot::BootInfo;
use boot::stop::StopKind;

use crate::arch::gdt;
use crate::arch::phys::BootMemory;
use crate::arch::takeover::{LoadGuestError, Takeover, TakeoverError, take_over};
use crate::bios::{DiskStart, Extension};
use crate::host::{HostSetup, Start, check_processor, stop_host_memory};
use crate::stop::{StopReason, stop};
use crate::{iommu, sleep, startup};

/// Boots: `magic` and `info` are the loader's values of EAX and EBX.
pub fn run(magic: u32, info: u32) -> ! {
    crate::log::init();
    let segments = gdt::init();
    let boot_info = match BootInfo::parse(&BootMemory, magic, info) {
        Ok(boot_info) => boot_info,
        Err(error) => stop(StopReason::new(StopKind::BadBootInfo, format_args!("{error}"))),
    };
    if let Some(framebuffer) = &boot_info.framebuffer {
        crate::log::use_framebuffer(framebuffer);
    }
    let options = read_options(boot_info.command_line());
    log::set_max_level(options.log);
    log::info!("l1hv {} starts", env!("CARGO_PKG_VERSION"));
    for region in boot_info.memory_map.regions() {
        log::debug!("memory: {:#014x}..{:#014x} {:?}", region.start, region.end, region.kind);
    }
    let acpi_rsdp = boot_info.acpi_rsdp.or_else(|| acpi::find_rsdp(&BootMemory));
    log::debug!(
        "{} firmware, ACPI's root pointer at {:#x}",
        if boot_info.is_efi { "EFI" } else { "BIOS" },
        acpi_rsdp.unwrap_or(0)
    );
    let bios = Extension::find(&boot_info);
    let drive = guest_drive(&options, &boot_info, bios.is_some());
    check_processor();
    let apic_ids = startup::find_processors(acpi_rsdp, &boot_info);
    let sleep = sleep::find(acpi_rsdp);
    let iommu = iommu::plan(options.iommu, acpi_rsdp, &boot_info.memory_map, &apic_ids);
    let low = bios.as_ref().map(Extension::range);
    let mut machine = match take_over(&boot_info, apic_ids.len(), options.host_memory_mib, iommu.as_ref(), low) {
        Ok(machine) => machine,
        Err(error) => stop_takeover(&error),
    };
    log::info!("host memory: {}..{}", machine.region.start, machine.region.end);
    if let Some(plan) = &iommu {
        match machine.allocator.alloc_pages(plan.pages()) {
            Ok(pages) => iommu::turn_on(options.iommu, plan, machine.region, pages),
            Err(error) => stop_host_memory(&error),
        }
        iommu::hide_table(plan, acpi_rsdp, &machine.guest_ram);
    }
    let disk = bios.and_then(|bios| match machine.allocator.alloc_pages(1) {
        Ok(scratch) => bios.install(&machine.guest_ram, &machine.memory_map, drive, scratch),
        Err(error) => stop_host_memory(&error),
    });
    let start = match disk {
        Some(DiskStart { entry: (segment, offset), .. }) => Start::RealMode(segment, offset),
        None => Start::Entry(machine.load_guest(&boot_info, acpi_rsdp).unwrap_or_else(|error| stop_load(&error))),
    };
    let Takeover { region: host_region, allocator, guest_ram, held, memory_map, tables, .. } = machine;
    let setup =
        HostSetup { options, host_region, memory_map, guest_ram, held, segments, start, disk, apic_ids, tables, sleep };
    startup::launch(setup, allocator)
}

fn read_options(line: &[u8]) -> Options<'_> {
    let Ok(line) = str::from_utf8(line) else {
        stop(StopReason::new(StopKind::BadOption, format_args!("the command line is not UTF-8: use ASCII")));
    };
    match Options::parse(line) {
        Ok(options) => options,
        Err(error) => stop(StopReason::new(StopKind::BadOption, format_args!("{error}"))),
    }
}

/// The BIOS' number of the disk that the guest begins with; `None` if it begins with a module.
fn guest_drive(options: &Options<'_>, boot_info: &BootInfo, has_bios: bool) -> Option<u8> {
    let has_module = !boot_info.modules.is_empty();
    let refuse = |kind, message: fmt::Arguments<'_>| -> ! { stop(StopReason::new(kind, message)) };
    match options.disk {
        None if has_module => None,
        None => refuse(
            StopKind::NoGuestImage,
            format_args!(
                "no module was passed: pass a bzImage or a multiboot image as the first module (GRUB: `module FILE ARGUMENTS`, QEMU: `-initrd \"FILE ARGUMENTS\"`), or start a disk with boot=disk"
            ),
        ),
        Some(_) if has_module => refuse(
            StopKind::BadOption,
            format_args!("boot= starts a disk, and there is a module, too: leave one of them out"),
        ),
        Some(_) if !has_bios => refuse(
            StopKind::NoGuestImage,
            format_args!("boot= needs a BIOS, and this machine's firmware is none: pass a module instead"),
        ),
        Some(disk) => {
            const DRIVE: u32 = 24;
            Some(disk.number(boot_info.boot_device.map(|device| (device >> DRIVE) as u8)))
        }
    }
}

fn stop_takeover(error: &TakeoverError) -> ! {
    match error {
        TakeoverError::Layout(error) => stop(StopReason::new(StopKind::LowMemory, format_args!("{error}"))),
        TakeoverError::Map(error) => {
            stop(StopReason::new(StopKind::BadBootInfo, format_args!("{error}: remove memory or devices")))
        }
        TakeoverError::HostMemory(error) => stop_host_memory(error),
    }
}

fn stop_load(error: &LoadGuestError) -> ! {
    match error {
        LoadGuestError::NoImage => stop(StopReason::new(StopKind::NoGuestImage, format_args!("no module was passed"))),
        LoadGuestError::Image(error) => stop(StopReason::new(error.kind(), format_args!("{error}"))),
        LoadGuestError::HostMemory(error) => stop_host_memory(error),
    }
}
