//! `cargo l1hv conformance`: compares a guest hypervisor's observations under l1hv and on the bare machine.

use std::path::PathBuf;

use anyhow::Result;

use super::machine::MachineArgs;
use crate::conformance::{self, Mode, OfProcessor, Place, Suite, Verdicts, matrix};
use crate::layout::Layout;
use crate::models::MODELS;
use crate::progress::Progress;
use crate::provision::{self, Provisioned};

/// Arguments of `conformance`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Compare only cases whose names match; `*`, `?` and `{a,b}` as in a shell.
    #[arg(long, value_name = "GLOB")]
    filter: Option<String>,
    /// Run only these groups of cases.
    #[arg(long, value_name = "GROUP,GROUP")]
    only: Option<String>,
    /// With one processor the cases for one run, with more those for several.
    #[command(flatten)]
    options: MachineArgs,
    /// Run on every model, one after the other, and print one table.
    #[arg(long, conflicts_with_all = ["model", "cpus"])]
    all_models: bool,
    /// On processors of QEMU that each lack something: run quick groups, and print one table. Rows whose names contain
    /// FILTER, or all.
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["model", "cpus", "all_models", "only"])]
    matrix: Option<String>,
    /// Write the numbers and a record per case.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "")]
    hv_append: String,
    /// The image's command line under l1hv: `permissions=SEED` changes shadow permissions after each case (with l1hv's
    /// `hypercalls`).
    #[arg(long, value_name = "STRING", default_value = "")]
    append: String,
}

/// Runs the suite; the exit status is 1 if anything differs.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let mode = Mode { host: &args.hv_append, image: &args.append, ..Mode::DEFAULT };
    if let Some(filter) = &args.matrix {
        let verdicts = matrix::run(layout, progress, &provisioned, "matrix", filter)?;
        verdicts.0.iter().for_each(show_if_wrong);
        return conclude(args, &verdicts);
    }
    if args.all_models {
        return run_on_all_models(args, mode, layout, progress, &provisioned);
    }
    let place = Place { emulator: args.options.emulator()?, options: args.options.options(), only: args.only.clone() };
    let suite = Suite::build(layout, progress, &provisioned, place)?;
    let [report] = suite.compare([mode], args.filter.as_deref())?;
    if let Some(file) = &args.json {
        conformance::write_json(&report, file)?;
    }
    println!("{report}");
    Ok(u8::from(report.different > 0))
}

/// Differences go to standard error as soon as a model is done, the table of all models to standard output.
fn run_on_all_models(
    args: &Args,
    mode: Mode<'_>,
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
) -> Result<u8> {
    let mut verdicts = Verdicts(Vec::new());
    for model in &MODELS {
        let filter = args.filter.as_deref();
        let of_model = conformance::of_model(layout, progress, provisioned, model, (mode, filter))?;
        show_if_wrong(&of_model);
        verdicts.0.push(of_model);
    }
    conclude(args, &verdicts)
}

fn show_if_wrong(verdict: &OfProcessor) {
    if !verdict.is_right() {
        eprintln!("{verdict}");
    }
}

/// Writes the file, prints the table, and returns the exit status.
fn conclude(args: &Args, verdicts: &Verdicts) -> Result<u8> {
    if let Some(file) = &args.json {
        conformance::write_json(verdicts, file)?;
    }
    print!("{verdicts}");
    Ok(u8::from(!verdicts.are_right()))
}
