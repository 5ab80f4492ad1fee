//! `cargo l1hv fuzz`: random programs of a guest hypervisor, on the bare machine and under l1hv.

use std::time::Duration;

use anyhow::Result;

use super::machine::MachineArgs;
use crate::conformance::Place;
use crate::fuzz::{Fuzzer, Range};
use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision;

/// Programs without `--programs` and `--seconds`.
const DEFAULT_PROGRAMS: u64 = 20_000;

/// Arguments of `fuzz`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The seed: with a program's number it makes the program.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Run this many programs.
    #[arg(long, value_name = "COUNT")]
    programs: Option<u64>,
    /// Run programs for this many seconds.
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// The number of the first program.
    #[arg(long, value_name = "N", default_value_t = 0)]
    first: u64,
    /// Show what both sides see of one program.
    #[arg(long, value_name = "N", conflicts_with_all = ["programs", "seconds", "first"])]
    program: Option<u64>,
    /// Only these steps of the program.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', requires = "program", value_parser = clap::value_parser!(u32).range(0..64))]
    steps: Vec<u32>,
    /// Hostile programs, with several processors also one that scribbles on the others' structures: nothing is compared,
    /// the host has to survive.
    #[arg(long, conflicts_with_all = ["program", "findings"])]
    hostile: bool,
    /// Look closer at so many programs that differ.
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    findings: usize,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "")]
    hv_append: String,
    #[command(flatten)]
    options: MachineArgs,
}

/// Runs the programs; the exit status is 1 if any differs.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let place = Place { emulator: args.options.emulator()?, options: args.options.options(), only: None };
    let host = if args.hostile { format!("stats {}", args.hv_append) } else { args.hv_append.clone() };
    let fuzzer = Fuzzer::build(layout, progress, &provisioned, place, (&host, args.seed))?;
    if let Some(program) = args.program {
        let mask = args.steps.iter().fold(0, |mask, step| mask | 1 << step);
        let finding = fuzzer.look(program, if args.steps.is_empty() { u64::MAX } else { mask })?;
        println!("{finding}");
        return Ok(u8::from(finding.differs()));
    }
    let unlimited = args.seconds.map_or(DEFAULT_PROGRAMS, |_| u64::MAX / 2);
    let range = Range {
        first: args.first,
        count: args.programs.unwrap_or(unlimited),
        limit: args.seconds.map(Duration::from_secs),
    };
    if args.hostile {
        let survival = fuzzer.run_hostile(range)?;
        println!("{survival}");
        return Ok(u8::from(!survival.is_right()));
    }
    let report = fuzzer.run(range, args.findings)?;
    println!("{report}");
    Ok(u8::from(!report.is_right()))
}
