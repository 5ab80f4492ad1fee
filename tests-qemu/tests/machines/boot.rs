//! Booting guests, with nothing nested.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, FirmwareVmx, Machine, Module};

use crate::context::{Context, Finished, Test};

/// More exits than this to boot a Linux would cost something.
const MOST_EXITS_TO_INIT: u64 = 2_000;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "linux_boots_under_l1hv_as_fast_as_bare", run: linux_boots_as_fast_as_bare },
        Test { name: "linux_6_12_boots_under_l1hv", run: linux_6_12_boots },
        Test { name: "vmx_that_the_firmware_left_unlocked_is_used", run: unlocked_feature_control },
        Test { name: "a_multiboot_guest_gets_its_command_line_and_modules", run: multiboot_guest },
    ]
}

fn boot_only(context: &Context, name: &str, series: &str) -> Result<Finished> {
    let guest = context.guest_hypervisor(series, Work::BootOnly, KvmEpt::On)?;
    let finished = context.run(&context.bochs(name, guest.under(context.host("stats"))))?;
    finished.must_have_done(&[])?;
    Ok(finished)
}

fn linux_boots_as_fast_as_bare(context: &Context, name: &str) -> Result<()> {
    let finished = boot_only(context, name, "6.1")?;
    let total = finished.transcript.host_total.as_ref().context("l1hv printed no statistics")?;
    let exits = total.guest_hypervisor;
    ensure!(exits < MOST_EXITS_TO_INIT, "{exits} exits to init");

    let guest = context.guest_hypervisor("6.1", Work::BootOnly, KvmEpt::On)?;
    let bare = context.run(&context.bochs(&format!("{name}-bare"), guest.on_bare_machine()))?;
    bare.must_have_done(&[])?;
    let ticks = |run: &Finished| run.transcript.boot_microseconds().context("the kernel's log has no start of init");
    let (under, bare) = (ticks(&finished)?, ticks(&bare)?);
    ensure!(under * 100 < bare * 101, "{under} us under l1hv, {bare} us bare");
    Ok(())
}

fn linux_6_12_boots(context: &Context, name: &str) -> Result<()> {
    boot_only(context, name, "6.12").map(|_| ())
}

/// Firmware that leaves the choice to the operating system leaves it to l1hv.
fn unlocked_feature_control(context: &Context, name: &str) -> Result<()> {
    let boot = Boot::L1hv { host: context.host(""), guest: vec![Module::new(&context.programs.multiboot_guest)] };
    let machine = Machine { firmware_vmx: FirmwareVmx::Unlocked, ..context.bochs(name, boot) };
    context.run(&machine)?.must_shut_down()
}

fn multiboot_guest(context: &Context, name: &str) -> Result<()> {
    let module = context.layout.root().join("module.txt");
    fs::write(&module, "content of the module")?;
    let boot = Boot::L1hv {
        host: context.host(""),
        guest: vec![
            Module::with_args(&context.programs.multiboot_guest, "one two"),
            Module::with_args(&module, "first"),
            Module::with_args(&module, "second third"),
        ],
    };
    let finished = context.run(&context.bochs(name, boot))?;
    finished.must_shut_down()?;
    for text in [
        "multiboot guest: command line: one two",
        "multiboot guest: module first: content of the module",
        "multiboot guest: module second third: content of the module",
    ] {
        finished.console_must_say(text)?;
    }
    Ok(())
}
