//! A PC with EFI firmware: OVMF, and GRUB as an EFI application.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use tests_qemu::command;
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, Drive, DriveKind, Firmware, Machine, Module, QEMU_TCG};

use crate::context::{Context, Test};

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "efi_firmware_boots_linux_under_l1hv_and_its_kvm_runs_a_payload", run: linux },
        Test { name: "an_image_boots_from_cd_by_a_bios_and_by_efi_firmware", run: image },
        Test { name: "an_efi_application_on_a_disk_boots_with_all_that_is_in_it", run: application },
        Test { name: "efi_firmware_of_qemu_without_vmx_comes_to_the_line_that_says_so", run: no_vmx },
    ]
}

fn linux(context: &Context, name: &str) -> Result<()> {
    let mut guest = context.guest_hypervisor("6.1", Work::Payload, KvmEpt::On)?;
    // OVMF has no ACPI tables for Bochs: Linux cannot switch the machine off, and resets it by a triple fault.
    guest.kernel.args += " l1hv.end=reset";
    let boot = guest.under(context.host(""));
    let machine = Machine { firmware: Firmware::Uefi, ..context.bochs(name, boot) };
    let finished = context.run(&machine)?;
    finished.must_stop("triple-fault", "the guest hypervisor triple-faulted")?;
    finished.must_have_worked(&["payload"])?;
    let touched = finished.debug.iter().any(|line| line.contains("which is the host's"));
    ensure!(!touched, "a guest that knows its memory has come to the host's");
    Ok(())
}

fn no_vmx(context: &Context, name: &str) -> Result<()> {
    let guest = vec![Module::new(&context.programs.multiboot_guest)];
    let boot = Boot::L1hv { host: context.host("log=debug"), guest };
    let machine = Machine { firmware: Firmware::Uefi, emulator: QEMU_TCG, ..context.bochs(name, boot) };
    let finished = context.run(&machine)?;
    finished.must_stop("no-vmx", "this processor offers no VMX")?;
    // It is not below 1 MiB, where a BIOS leaves it.
    finished.debug_must_say("EFI firmware, ACPI's root pointer at 0x3")
}

/// Makes an image with the command of that name.
fn make(context: &Context, file: &str, more: &[&str]) -> Result<PathBuf> {
    let out = context.layout.root().join(file);
    let mut command = Command::new(env!("CARGO_BIN_EXE_tests-qemu"));
    command.arg("image").arg("--out").arg(&out).arg("--kernel").arg(&context.programs.multiboot_guest);
    command::output(command.args(["--append", "one two", "--menu", "0"]).args(more))?;
    Ok(out)
}

const GREETING: &str = "multiboot guest: command line: one two";

fn image(context: &Context, name: &str) -> Result<()> {
    let iso = make(context, "image.iso", &[])?;
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        let bochs = Machine { firmware, ..context.bochs(name, Boot::Iso(iso.clone())) };
        let finished = context.run(&bochs)?;
        finished.must_shut_down()?;
        finished.console_must_say(GREETING)?;
        finished.debug_must_say("the guest hypervisor starts")?;
        context.run(&Machine { emulator: QEMU_TCG, ..bochs })?.must_stop("no-vmx", "")?;
        // The menu's other entry.
        let kernel = Module::with_args(&context.programs.multiboot_guest, "one two");
        let bare = Boot::Multiboot { kernel, modules: Vec::new() };
        let finished = context.run(&Machine { firmware, ..context.bochs(name, bare) })?;
        finished.must_shut_down()?;
        finished.console_must_say(GREETING)?;
    }
    // The same file as a disk.
    let drives = vec![Drive { file: iso, kind: DriveKind::Disk }];
    let finished = context.run(&Machine { drives, ..context.bochs(name, Boot::Disk) })?;
    finished.must_shut_down()?;
    finished.console_must_say(GREETING)
}

fn application(context: &Context, name: &str) -> Result<()> {
    let file = make(context, "BOOTX64.EFI", &["--efi"])?;
    let disk = context.layout.root().join("efi-disk.img");
    fs::write(&disk, vec![0; 64 << 20])?;
    let tool = |program: &str, arguments: &[&Path]| {
        command::output(Command::new(program).arg("-i").arg(&disk).args(arguments)).map(|_| ())
    };
    tool("mformat", &["-F", "::"].map(Path::new))?;
    tool("mmd", &["::/EFI", "::/EFI/BOOT"].map(Path::new))?;
    tool("mcopy", &[&file, Path::new("::/EFI/BOOT/BOOTX64.EFI")])?;
    let drives = vec![Drive { file: disk, kind: DriveKind::Disk }];
    let machine = Machine { firmware: Firmware::Uefi, drives, ..context.bochs(name, Boot::Disk) };
    let finished = context.run(&machine)?;
    finished.must_shut_down()?;
    finished.console_must_say(GREETING)
}
