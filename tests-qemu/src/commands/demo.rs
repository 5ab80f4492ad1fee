//! `cargo demo`.

use anyhow::Result;

use super::machine::MachineArgs;
use crate::demo::{self, Host, Settings};
use crate::layout::Layout;
use crate::progress::Progress;

/// Arguments of `demo`. With several processors, guest hypervisor and nested guest run a parallel workload.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: MachineArgs,
    /// Debian kernel series of the guest hypervisor and of the nested guest.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// Without l1hv, for comparison.
    #[arg(long, hide = true)]
    bare: bool,
}

/// Runs the demo.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let settings = Settings {
        emulator: args.options.emulator()?,
        options: args.options.options(),
        series: args.series.clone(),
        host: if args.bare { Host::Bare } else { Host::L1hv },
    };
    demo::run(&settings, layout, progress)
}
