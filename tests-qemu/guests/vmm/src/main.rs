//! A small VMM on KVM, the init system's helper in the guest hypervisor.
//!
//! ```text
//!   vmm payload FILE [counted]               runs the bare-metal payload, reports each operation; counted: once more for an emulator
//!   vmm linux MIB CPUS KERNEL INITRD [ARGUMENTS]
//!                                            boots a bzImage until its init has asked for a reset
//!   vmm multiboot FILE [ARGUMENTS]           boots a multiboot 1 image until it ends the machine
//!   vmm timings table|json SYSTEM FILE       shows the payload's results that FILE has, as those of SYSTEM
//!   vmm mark NAME                            prints NAME with the time-stamp counter
//!   vmm boots                                prints how often it did so before on this machine
//!   vmm stats                                asks l1hv for its statistics; nothing elsewhere
//! ```
//!
//! Results are lines `L1HV-RESULT {json}`; the exit status is 0 only if all work was done.

mod acpi;
mod cmos;
mod cpu;
mod elf;
mod kvm;
mod linux;
mod multiboot;
mod payload;
mod processors;
mod report;
mod serial;
mod timings;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use linux::Size;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &[&str]) -> Result<()> {
    match args {
        ["payload", file] => payload::run(Path::new(file), 0),
        ["payload", file, "counted"] => payload::run(Path::new(file), 1),
        ["linux", mib, processors, kernel, initrd, arguments @ ..] => {
            let mib: u64 = mib.parse().context("the memory is a number of MiB")?;
            let processors = processors.parse().context("processors are a number")?;
            linux::run(
                Size { memory: mib << 20, processors },
                Path::new(kernel),
                Path::new(initrd),
                &arguments.join(" "),
            )
        }
        ["multiboot", file, arguments @ ..] => multiboot::run(Path::new(file), &arguments.join(" ")),
        ["timings", form, system, file] => timings::show(form.parse()?, system, Path::new(file)),
        ["mark", name] => {
            report::mark(name);
            Ok(())
        }
        ["boots"] => {
            println!("{}", cmos::count_boot()?);
            Ok(())
        }
        ["stats"] => {
            cpu::request_host_stats();
            Ok(())
        }
        _ => bail!(
            "usage: vmm payload FILE [counted] | linux MIB CPUS KERNEL INITRD [ARGUMENTS] | multiboot FILE [ARGUMENTS] | timings table|json SYSTEM FILE | mark NAME | boots | stats"
        ),
    }
}
