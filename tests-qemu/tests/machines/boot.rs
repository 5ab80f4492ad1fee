//! Booting guests, with nothing nested.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, Firmware, FirmwareVmx, Machine, Module};
use tests_qemu::protocol::KERNEL_STARTS;

use crate::context::{Context, Finished, Test};

/// The most exits that booting a Linux may cause.
const MOST_EXITS_TO_INIT: u64 = 2_000;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "linux_boots_under_l1hv_with_1_percent_more_instructions_at_most", run: cost_of_boot },
        Test { name: "linux_6_12_boots_under_l1hv", run: linux_6_12_boots },
        Test { name: "linux_boots_on_all_four_processors_under_l1hv", run: four_processors },
        Test { name: "processors_start_although_the_interval_timer_is_stopped", run: stopped_timer },
        Test { name: "linux_gets_the_memory_above_2_gib_too", run: much_memory },
        Test { name: "vmx_that_the_firmware_left_unlocked_is_used", run: unlocked_feature_control },
        Test { name: "the_machine_does_not_sleep_and_can_be_switched_off", run: sleep },
        Test { name: "without_a_debug_console_the_log_is_on_com1_and_on_the_screen", run: screen },
        Test { name: "a_multiboot_guest_gets_its_command_line_and_modules", run: multiboot_guest },
    ]
}

fn boot_only(context: &Context, name: &str, series: &str) -> Result<Finished> {
    let guest = context.guest_hypervisor(series, Work::BootOnly, KvmEpt::On)?;
    let finished = context.run(&context.bochs(name, guest.under(context.host("stats"))))?;
    finished.must_have_done(&[])?;
    Ok(finished)
}

/// The cost that the emulator counts from the kernel's first steps to init.
fn cost_of_boot(context: &Context, name: &str) -> Result<()> {
    let nested = boot_only(context, name, "6.1")?;
    let guest = context.guest_hypervisor("6.1", Work::BootOnly, KvmEpt::On)?;
    let bare = context.run(&context.bochs(&format!("{name}-bare"), guest.on_bare_machine()))?;
    bare.must_have_done(&[])?;

    let init = nested.counters_at("init")?;
    ensure!(init.hardware_exits() < MOST_EXITS_TO_INIT, "{} exits to init", init.hardware_exits());
    ensure!(bare.counters_at("init")?.hardware_exits() == 0, "the bare machine has VM exits");
    let instructions = |run: &Finished| -> Result<u64> {
        Ok((run.counters_at("init")? - run.counters_at(KERNEL_STARTS)?).instructions())
    };
    let (under, bare) = (instructions(&nested)?, instructions(&bare)?);
    eprintln!("{under} instructions and {} exits under l1hv, {bare} instructions bare", init.hardware_exits());
    ensure!(under * 100 < bare * 101, "{under} instructions under l1hv, {bare} bare");
    Ok(())
}

fn linux_6_12_boots(context: &Context, name: &str) -> Result<()> {
    boot_only(context, name, "6.12").map(|_| ())
}

fn four_processors(context: &Context, name: &str) -> Result<()> {
    let guest = context.guest_hypervisor("6.1", Work::BootOnly, KvmEpt::On)?;
    let machine = Machine { cpus: 4, ..context.bochs(name, guest.under(context.host(""))) };
    let finished = context.run(&machine)?;
    finished.must_have_done(&[])?;
    finished.console_must_say("init: 4 cpu")?;
    finished.debug_must_say("the guest hypervisor starts on 4 processors")
}

fn stopped_timer(context: &Context, name: &str) -> Result<()> {
    for output in [false, true] {
        let image = Module::new(&context.programs.multiboot_guest);
        let boot = Boot::L1hv { host: context.host(""), guest: vec![image] };
        let machine = Machine { cpus: 3, timer_stuck_at: Some(output), ..context.bochs(name, boot) };
        let finished = context.run(&machine)?;
        finished.must_shut_down()?;
        finished.debug_must_say("the interval timer does not count: l1hv waits by the time-stamp counter, ")?;
        finished.debug_must_say("the guest hypervisor starts on 3 processors")?;
    }
    Ok(())
}

fn much_memory(context: &Context, name: &str) -> Result<()> {
    let guest = context.guest_hypervisor("6.1", Work::BootOnly, KvmEpt::On)?;
    let machine = Machine { memory_mib: 3000, ..context.bochs(name, guest.under(context.host(""))) };
    let finished = context.run(&machine)?;
    finished.must_have_done(&[])?;
    let line = finished.console.iter().find(|line| line.contains("MemTotal:")).context("init names no memory")?;
    let kib: u64 = line.split_whitespace().rev().nth(1).context("no number")?.parse()?;
    // The kernel keeps some memory for itself, and l1hv its documented 32 MiB and 1/256.
    ensure!(kib > 2850 * 1024, "{line}");
    Ok(())
}

/// If the firmware leaves IA32_FEATURE_CONTROL unlocked, l1hv enables VMX.
fn unlocked_feature_control(context: &Context, name: &str) -> Result<()> {
    let boot = Boot::L1hv { host: context.host(""), guest: vec![Module::new(&context.programs.multiboot_guest)] };
    let machine = Machine { firmware_vmx: FirmwareVmx::Unlocked, ..context.bochs(name, boot) };
    context.run(&machine)?.must_shut_down()
}

/// By the guest hypervisor, by a nested guest without I/O exiting, and by one with I/O bitmaps of zeros.
fn sleep(context: &Context, name: &str) -> Result<()> {
    let image = Module::with_args(&context.programs.conformance, "sleep");
    let finished = context.run(&context.bochs(name, Boot::L1hv { host: context.host(""), guest: vec![image] }))?;
    finished.must_shut_down()?;
    for text in [
        "SLP_TYP 1, from which the machine would wake up outside l1hv: denied",
        "sleep: the hypervisor goes on, wake status 0x8000",
        "sleep: cleared, wake status 0x0",
        "sleep: by one byte, wake status 0x8000",
        "sleep: a nested guest with bitmaps false: exit=0x12",
        "sleep: a nested guest with bitmaps true: exit=0x12",
    ] {
        finished.debug_must_say(text)?;
    }
    let nested = finished.debug.iter().filter(|line| line.contains("a nested guest with bitmaps"));
    ensure!(
        nested.filter(|line| line.ends_with("wake status 0x8000")).count() == 2,
        "a nested guest saw no wake status"
    );
    let panic = finished.debug.iter().any(|line| line.contains("C-PANIC"));
    ensure!(!panic, "the machine was not switched off by its register");
    Ok(())
}

/// The guest prints what the screen shows, on COM1 as well: text of a BIOS, and pixels of EFI firmware.
fn screen(context: &Context, name: &str) -> Result<()> {
    let image = Module::with_args(&context.programs.conformance, "screen");
    let boot = Boot::L1hv { host: context.host(""), guest: vec![image] };
    let bios = Machine { debug_console: false, ..context.bochs(name, boot) };
    screen_has_the_log(&context.run(&bios)?)?;
    let finished = context.run(&Machine { firmware: Firmware::Uefi, ..bios })?;
    finished.console_must_say("pixels")?;
    screen_has_the_log(&finished)
}

fn screen_has_the_log(finished: &Finished) -> Result<()> {
    finished.must_shut_down()?;
    for line in ["[l1hv INFO] l1hv", "[l1hv INFO] host memory:", "[l1hv INFO] the guest hypervisor starts"] {
        finished.console_must_say(line)?;
        finished.console_must_say(&format!("screen: {line}"))?;
    }
    Ok(())
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
