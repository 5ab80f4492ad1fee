//! `cargo bench-nested`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::BadArgument;
use super::machine::MachineArgs;
use crate::bench::{self, Bench, System, chart, compare::compare, markdown, measure::Measurement, timed, timed::Timed};
use crate::build;
use crate::layout::Layout;
use crate::machine::{self, BOCHS};
use crate::progress::Progress;
use crate::provision;

/// Arguments of `bench-nested`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this system; repeatable [default: all].
    #[arg(long, value_enum)]
    system: Vec<SystemChoice>,
    /// Debian kernel series of every Linux.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// By default Bochs, which counts instructions.
    #[command(flatten)]
    machine: MachineArgs,
    /// Let the nested guest time the payload's operations by the TSC, instead of counting; always so on QEMU. On
    /// emulators the ticks mean nothing.
    #[arg(long)]
    timed: bool,
    /// Write the measurements here, as an array of objects.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table of the README here.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw the instructions per operation here.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Show what changed since the run that wrote this file.
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SystemChoice {
    Bare,
    L1hv,
    Kvm,
}

impl From<System> for SystemChoice {
    fn from(system: System) -> Self {
        match system {
            System::Bare => Self::Bare,
            System::L1hv => Self::L1hv,
            System::Kvm => Self::Kvm,
        }
    }
}

/// Measures, prints the table, writes and compares files.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let emulator = args.machine.emulator_or(BOCHS)?;
    let is_timed = args.timed || !emulator.counts_instructions();
    if is_timed && (args.markdown.is_some() || args.svg.is_some() || args.compare.is_some()) {
        return Err(BadArgument("--markdown, --svg and --compare are for counted instructions".to_owned()).into());
    }
    if !emulator.counts_instructions() && !machine::host_has_nested_vmx() {
        return Err(BadArgument("--machine qemu: KVM on this host offers no nested VMX".to_owned()).into());
    }
    let old = args.compare.as_deref().map(read).transpose()?;
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let bench = Bench {
        layout,
        progress,
        provisioned: &provisioned,
        programs: &programs,
        series: &args.series,
        emulator,
        options: &args.machine.options_with(bench::MEMORY_MIB),
    };
    let systems =
        System::ALL.into_iter().filter(|&system| args.system.is_empty() || args.system.contains(&system.into()));
    if is_timed {
        return time(&bench, systems, args.json.as_deref());
    }
    let mut measurements = Vec::new();
    for system in systems {
        measurements.extend(bench.measure(system)?);
    }
    println!("\nPer operation: medians of 1,000; boots: totals. \"Host\" is the lowest hypervisor.\n");
    print!("{}", bench::table(&measurements));
    let json = serde_json::to_string_pretty(&measurements)?;
    write(args.json.as_deref(), || json + "\n")?;
    write(args.svg.as_deref(), || chart::svg(&measurements))?;
    write(args.markdown.as_deref(), || markdown::table(&measurements))?;
    if let Some(old) = &old {
        println!("\nAgainst the older run\n");
        print!("{}", compare(old, &measurements));
    }
    Ok(0)
}

/// Measures by the nested guest's own clock.
fn time(bench: &Bench<'_>, systems: impl Iterator<Item = System>, json: Option<&Path>) -> Result<u8> {
    let timed = systems.map(|system| Ok(Timed::new(bench.emulator.to_string(), bench.time(system)?)));
    let timed = timed.collect::<Result<Vec<_>>>()?;
    println!("\nPer operation: 1st percentile, median and 99th percentile of 1,000.\n");
    print!("{}", timed::table(&timed));
    let text = serde_json::to_string_pretty(&timed)?;
    write(json, || text + "\n")?;
    Ok(0)
}

fn write(file: Option<&Path>, text: impl FnOnce() -> String) -> Result<()> {
    let Some(file) = file else { return Ok(()) };
    fs::write(file, text()).with_context(|| format!("cannot write {}", file.display()))
}

/// The measurements of an older run. A file without any is a bad argument.
fn read(file: &Path) -> Result<Vec<Measurement>> {
    let text = fs::read_to_string(file).map_err(|error| error.to_string());
    text.and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))
        .map_err(|error| BadArgument(format!("--compare {}: {error}", file.display())).into())
}
