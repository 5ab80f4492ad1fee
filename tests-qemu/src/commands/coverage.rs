//! `cargo l1hv coverage`: which lines of l1hv the runs with `--coverage` have executed.

use std::path::PathBuf;

use anyhow::Result;

use crate::coverage::Coverage;
use crate::layout::Layout;

/// Arguments of `coverage`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The directory that runs have got as --coverage.
    dir: PathBuf,
    /// Only files whose paths contain this, each with the lines that have not executed.
    filter: Option<String>,
}

/// Prints the table.
pub fn run(args: &Args, layout: &Layout) -> Result<u8> {
    let coverage = Coverage::read(&args.dir, layout)?;
    print!(
        "{}",
        match &args.filter {
            Some(filter) => coverage.only(filter).by_file(),
            None => coverage.by_directory(),
        }
    );
    Ok(0)
}
