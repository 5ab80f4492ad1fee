//! The command line.

mod bench;
mod bench_image;
mod conformance;
mod coverage;
mod demo;
mod fuzz;
mod guest;
mod guests;
mod image;
mod load;
mod machine;
mod mutants;
mod profile;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision::{self, Incomplete};

/// Runs hypervisors under l1hv on an emulated machine.
#[derive(Debug, Parser)]
#[command(name = "l1hv", bin_name = "cargo l1hv", version, after_help = STATUSES)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
}

const STATUSES: &str = "Exit status:
  0  the guest shut the machine down
  1  an error of the runner or of the emulator
  2  a bad argument
  3  l1hv stopped (its last log line says why)
  4  triple fault
  5  timeout: the run, or a silence, took longer than its limit
  6  provisioning is incomplete (the message lists what is missing)
  7  the guest ended the machine with a code other than 0: a dword to port f4H (QEMU isa-debug-exit)

Environment:
  L1HV_BOCHS     Bochs program to use instead of the one built here
  L1HV_QEMU      QEMU program to use instead of qemu-system-x86_64
  L1HV_COVERAGE  directory for --coverage, for every machine on Bochs, those of tests among them";

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Show each level coming up, run nested guests, print what their exits cost.
    #[command(after_help = STATUSES)]
    Demo(demo::Args),
    /// Count, or time, what nested exits and boots cost: bare machine, l1hv and KVM side by side.
    BenchNested(bench::Args),
    /// Make an ISO that boots a PC and times nested exits on it.
    BenchImage(bench_image::Args),
    /// Compare what a guest hypervisor observes under l1hv and on the bare machine, case by case.
    Conformance(conformance::Args),
    /// Run random programs of a guest hypervisor under l1hv and on the bare machine, and compare what they see.
    Fuzz(fuzz::Args),
    /// Say which lines of l1hv have executed in the runs with --coverage.
    Coverage(coverage::Args),
    /// Leave an invalidation out of l1hv, one after the other, and see whether the suite notices.
    Mutants(mutants::Args),
    /// Count a guest hypervisor's accesses to VMCS fields, propose which to grant, and show what that is worth.
    Profile(profile::Args),
    /// Fetch and build what the machines need.
    Provision,
    /// Boot a bzImage, a multiboot 1 image or a disk under l1hv.
    #[command(after_help = STATUSES)]
    Run(run::Args),
    /// Make an ISO, or an EFI application, that boots a PC with l1hv and a guest.
    Image(image::Args),
    /// Run guest hypervisors that others wrote on the machines that they were tried on, and print a table.
    Guests(guests::Args),
    /// Boot Debian's KVM as guest hypervisor and let it run nested guests.
    #[command(after_help = STATUSES)]
    Guest(guest::Args),
}

/// An invalid argument; exit status 2.
#[derive(Debug)]
struct BadArgument(String);

impl std::fmt::Display for BadArgument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadArgument {}

/// Parses the arguments and runs the command.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli.command) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(status_of(&error))
        }
    }
}

fn dispatch(command: CliCommand) -> anyhow::Result<u8> {
    let layout = Layout::find()?;
    let progress = Progress::stderr();
    match command {
        CliCommand::Provision => {
            let provisioned = provision::provision(&layout, &progress)?;
            eprintln!("provisioned in {}", layout.root().display());
            for kernel in &provisioned.kernels {
                println!("Linux {}: {}", kernel.release, kernel.image.display());
            }
            println!("Bochs: {}", provisioned.bochs.binary.display());
            println!("QEMU: {}", provisioned.qemu.display());
            Ok(0)
        }
        CliCommand::BenchNested(args) => bench::run(&args, &layout, &progress),
        CliCommand::BenchImage(args) => bench_image::run(&args, &layout, &progress),
        CliCommand::Conformance(args) => conformance::run(&args, &layout, &progress),
        CliCommand::Coverage(args) => coverage::run(&args, &layout),
        CliCommand::Fuzz(args) => fuzz::run(&args, &layout, &progress),
        CliCommand::Mutants(args) => mutants::run(&args, &layout, &progress),
        CliCommand::Profile(args) => profile::run(&args, &layout, &progress),
        CliCommand::Demo(args) => demo::run(&args, &layout, &progress),
        CliCommand::Guests(args) => guests::run(&args, &layout, &progress),
        CliCommand::Image(args) => image::run(&args, &layout, &progress),
        CliCommand::Guest(args) => guest::run(&args, &layout, &progress),
        CliCommand::Run(args) => run::run(&args, &layout, &progress),
    }
}

fn status_of(error: &anyhow::Error) -> u8 {
    if error.is::<BadArgument>() {
        2
    } else if error.is::<Incomplete>() {
        6
    } else {
        1
    }
}
