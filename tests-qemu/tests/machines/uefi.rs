//! A PC with EFI firmware: OVMF, and GRUB as an EFI application.

use anyhow::{Result, ensure};
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, Firmware, Machine, Module, QEMU_TCG};

use crate::context::{Context, Test};

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "efi_firmware_boots_linux_under_l1hv_and_its_kvm_runs_a_payload", run: linux },
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
