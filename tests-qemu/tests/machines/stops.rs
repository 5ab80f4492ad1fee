//! Every reason for which l1hv cannot continue gives a clean stop and one line, which says what is wrong and what to
//! do.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests_qemu::linux;
use tests_qemu::machine::{BOCHS, Boot, DEFAULT_IPS, FirmwareVmx, Machine, Module, Outcome, QEMU_TCG};

use crate::context::{Context, Test};
use crate::madt;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "a_processor_without_vmx_is_named_as_the_reason", run: no_vmx },
        Test { name: "a_processor_without_long_mode_is_named_as_the_reason", run: no_long_mode },
        Test { name: "vmx_locked_off_by_firmware_is_named_as_the_reason", run: vmx_locked },
        Test { name: "a_processor_without_ept_is_named_as_the_reason", run: no_ept },
        Test { name: "a_processor_without_unrestricted_guest_is_named_as_the_reason", run: no_unrestricted_guest },
        Test { name: "a_machine_without_the_iommu_that_the_user_asks_for_is_named_as_the_reason", run: no_iommu },
        Test { name: "a_processor_that_does_not_start_is_named_as_the_reason", run: no_start },
        Test { name: "more_processors_than_there_is_room_for_are_named_as_the_reason", run: too_many_processors },
        Test { name: "no_guest_image_is_named_as_the_reason", run: no_guest_image },
        Test { name: "a_file_that_is_no_image_is_named_as_the_reason", run: not_an_image },
        Test { name: "a_truncated_kernel_is_named_as_the_reason", run: truncated_kernel },
        Test { name: "an_unknown_option_is_named_as_the_reason", run: bad_option },
        Test { name: "too_little_memory_is_named_as_the_reason", run: low_memory },
        Test { name: "a_triple_fault_of_the_guest_stops_the_machine", run: triple_fault },
        Test { name: "a_vmx_abort_stops_the_machine_with_its_number", run: vmx_abort_4 },
        Test { name: "an_msr_that_an_exit_cannot_store_is_a_vmx_abort_of_the_guest_hypervisors", run: vmx_abort_1 },
    ]
}

/// l1hv with a guest that never runs, because l1hv stops before.
fn boot(context: &Context) -> Boot {
    with_guest(context, vec![Module::new(&context.programs.multiboot_guest)])
}

fn with_guest(context: &Context, guest: Vec<Module>) -> Boot {
    Boot::L1hv { host: context.host(""), guest }
}

/// A file that holds `content`.
fn file(context: &Context, name: &str, content: &[u8]) -> Result<PathBuf> {
    let path = context.layout.root().join(name);
    fs::write(&path, content)?;
    Ok(path)
}

fn no_vmx(context: &Context, name: &str) -> Result<()> {
    let machine = Machine::new(name, QEMU_TCG, boot(context));
    context.run(&machine)?.must_stop("no-vmx", "VMX")
}

fn no_long_mode(context: &Context, name: &str) -> Result<()> {
    let machine = Machine { cpu_model: Some("qemu32"), ..Machine::new(name, QEMU_TCG, boot(context)) };
    context.run(&machine)?.must_stop("no-long-mode", "64-bit")
}

fn vmx_locked(context: &Context, name: &str) -> Result<()> {
    let machine = Machine { firmware_vmx: FirmwareVmx::LockedOff, ..context.bochs(name, boot(context)) };
    context.run(&machine)?.must_stop("vmx-locked", "firmware")
}

fn no_ept(context: &Context, name: &str) -> Result<()> {
    let machine = Machine { cpu_model: Some("core2_penryn_t9600"), ..context.bochs(name, boot(context)) };
    context.run(&machine)?.must_stop("no-ept", "EPT")
}

fn no_unrestricted_guest(context: &Context, name: &str) -> Result<()> {
    let machine = Machine { cpu_model: Some("corei5_lynnfield_750"), ..context.bochs(name, boot(context)) };
    context.run(&machine)?.must_stop("no-unrestricted-guest", "unrestricted guest")
}

fn no_iommu(context: &Context, name: &str) -> Result<()> {
    let guest = vec![Module::new(&context.programs.multiboot_guest)];
    let boot = Boot::L1hv { host: context.host("iommu=on"), guest };
    context.run(&context.bochs(name, boot))?.must_stop("no-iommu", "VT-d")
}

/// The firmware's list has a processor that the machine does not have.
fn no_start(context: &Context, name: &str) -> Result<()> {
    let table = madt::file(context, "madt-with-one-too-many", &[0, 7].map(madt::local_apic).concat())?;
    let machine = Machine { madt: Some(table), ..context.bochs(name, boot(context)) };
    context.run(&machine)?.must_stop("processors", "APIC id 7 does not start")
}

/// The guest would start those for which there is no room.
fn too_many_processors(context: &Context, name: &str) -> Result<()> {
    let table = madt::file(context, "madt-of-257", &(0..257).flat_map(madt::local_x2apic).collect::<Vec<_>>())?;
    let machine = Machine { madt: Some(table), ..context.bochs(name, boot(context)) };
    context.run(&machine)?.must_stop("processors", "more than 256 processors")
}

fn no_guest_image(context: &Context, name: &str) -> Result<()> {
    let machine = context.bochs(name, with_guest(context, Vec::new()));
    context.run(&machine)?.must_stop("no-guest-image", "module")
}

fn not_an_image(context: &Context, name: &str) -> Result<()> {
    let image = file(context, "not-an-image", &[0xa5; 64 * 1024])?;
    let machine = context.bochs(name, with_guest(context, vec![Module::new(image)]));
    context.run(&machine)?.must_stop("bad-image", "neither a Linux bzImage nor a multiboot 1 image")
}

fn truncated_kernel(context: &Context, name: &str) -> Result<()> {
    let kernel = fs::read(&context.provisioned.kernel("6.1")?.image)?;
    let image = file(context, "truncated-kernel", &kernel[..4096])?;
    let machine = context.bochs(name, with_guest(context, vec![Module::new(image)]));
    context.run(&machine)?.must_stop("bad-image", "ends within its kernel")
}

fn bad_option(context: &Context, name: &str) -> Result<()> {
    for (option, named) in [("colour=green", "colour"), ("shadow=HOST_RIP:r", "HOST_RIP cannot be granted")] {
        let guest = vec![Module::new(&context.programs.multiboot_guest)];
        let boot = Boot::L1hv { host: context.host(option), guest };
        context.run(&context.bochs(name, boot))?.must_stop("bad-option", named)?;
    }
    Ok(())
}

fn low_memory(context: &Context, name: &str) -> Result<()> {
    let guest = vec![Module::new(&context.programs.multiboot_guest)];
    let boot = Boot::L1hv { host: context.host("host-memory=1024"), guest };
    let machine = Machine { memory_mib: 256, ..context.bochs(name, boot) };
    context.run(&machine)?.must_stop("low-memory", "memory")
}

/// The guest hypervisor's VM exit cannot load an MSR: abort 4 (SDM 28.7).
fn vmx_abort_4(context: &Context, name: &str) -> Result<()> {
    vmx_abort(context, name, "vmx-abort-load", "VMX abort 4")
}

/// The guest hypervisor's VM exit cannot store an MSR that it can read: abort 1.
fn vmx_abort_1(context: &Context, name: &str) -> Result<()> {
    vmx_abort(context, name, "vmx-abort-store", "VMX abort 1")
}

/// The bare machine does not go on either.
fn vmx_abort(context: &Context, name: &str, argument: &str, abort: &str) -> Result<()> {
    let image = Module::with_args(&context.programs.conformance, argument);
    let finished = context.run(&context.bochs(name, with_guest(context, vec![image.clone()])))?;
    finished.must_stop("vmx-abort", abort)?;
    let bare = Boot::Multiboot { kernel: image, modules: Vec::new() };
    // The bare machine is in shutdown state: no output follows.
    let limit = Duration::from_secs(20);
    let machine = Machine { timeout: limit, silence: limit, ..context.bochs(&format!("{name}-bare"), bare) };
    let bare = context.run(&machine)?;
    ensure!(bare.outcome != Outcome::GuestShutdown, "the bare machine goes on after a VMX abort");
    Ok(())
}

/// A Linux without a root file system panics, and `reboot=t` turns the panic into a triple fault.
fn triple_fault(context: &Context, name: &str) -> Result<()> {
    let kernel = &context.provisioned.kernel("6.1")?.image;
    let guest = Module::with_args(kernel, linux::default_args(BOCHS, DEFAULT_IPS));
    let finished = context.run(&context.bochs(name, with_guest(context, vec![guest])))?;
    finished.must_stop("triple-fault", "the guest hypervisor triple-faulted at 0x10:0xffffffff")?;
    finished.console_must_say("Kernel panic")
}
