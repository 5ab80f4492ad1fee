//! `cargo l1hv mutants`: whether the suite notices when l1hv leaves out an invalidation.

use anyhow::Result;

use crate::layout::Layout;
use crate::mutants;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `mutants`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only those whose names contain this.
    #[arg(default_value = "")]
    filter: String,
}

/// Runs the list; the exit status is 1 if one survives that should not, or the other way round.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let verdicts = mutants::run(layout, progress, &provisioned, &args.filter)?;
    print!("{verdicts}");
    Ok(u8::from(!verdicts.are_right()))
}
