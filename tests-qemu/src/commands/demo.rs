//! `cargo demo`.

use anyhow::Result;

use super::run::MachineChoice;
use crate::demo::{self, Host, Settings};
use crate::layout::Layout;
use crate::progress::Progress;

/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The machine.
    #[arg(long, value_enum, default_value_t = MachineChoice::Auto)]
    machine: MachineChoice,
    /// Debian kernel series of the guest hypervisor and of the nested guest.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// Processors; with several, guest hypervisor and nested guest run a parallel workload.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Without l1hv, for comparison.
    #[arg(long, hide = true)]
    bare: bool,
}

/// Runs the demo.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let settings = Settings {
        emulator: args.machine.emulator(),
        series: args.series.clone(),
        cpus: args.cpus,
        host: if args.bare { Host::Bare } else { Host::L1hv },
    };
    demo::run(&settings, layout, progress)
}
