//! `cargo l1hv conformance`: what a guest hypervisor observes under l1hv and on the bare machine.

use std::path::PathBuf;

use anyhow::Result;

use crate::conformance::{self, Mode, Suite};
use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `conformance`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Compare only cases whose names match; `*`, `?` and `{a,b}` as in a shell.
    #[arg(long, value_name = "GLOB")]
    filter: Option<String>,
    /// Processors of the machine: with 1 the cases for one run, with more those for several.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Write the numbers and a record per case.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "")]
    hv_append: String,
    /// The image's command line under l1hv: `permissions=SEED` changes shadow permissions after each case (with l1hv's `hypercalls`).
    #[arg(long, value_name = "STRING", default_value = "")]
    append: String,
}

/// Runs the suite; the exit status is 1 if anything differs.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let mode = Mode { host: &args.hv_append, image: &args.append, ..Mode::DEFAULT };
    let suite = Suite::on_bare_machine(layout, progress, &provisioned, args.cpus)?;
    let report = suite.under_l1hv(mode, args.filter.as_deref())?;
    if let Some(file) = &args.json {
        conformance::write_json(&report, file)?;
    }
    println!("{report}");
    Ok(u8::from(report.different > 0))
}
