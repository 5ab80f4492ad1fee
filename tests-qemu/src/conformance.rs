//! The differential suite: one image on the bare machine and under l1hv, compared case by case.
//!
//! The image (`guests/conformance`) prints `C GROUP/CASE RESULT` for each case and `C-END COUNT` at its end. A difference is a
//! defect unless [`Explained`] gives its reason; a reason that explains nothing is an error as well.

mod explained;
mod glob;
mod verdict;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::layout::Layout;
use crate::machine::{Boot, Emulator, Line, Machine, Module, Outcome};
use crate::progress::Progress;
use crate::provision::Provisioned;

pub use explained::Explained;
pub use glob::matches;
pub use verdict::{Case, Report, Verdict};

/// Limit on one of the two runs, for a machine that does other work too.
const TIMEOUT: Duration = Duration::from_secs(290);

const CASE_PREFIX: &str = "C ";
const END_PREFIX: &str = "C-END ";
const PANIC_PREFIX: &str = "C-PANIC";

/// Runs the suite, with l1hv's command line `hv_append`; keeps the cases whose names match `filter`.
pub fn run(
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
    filter: Option<&str>,
    hv_append: &str,
) -> Result<Report> {
    let explained = Explained::read(&layout.workspace().join(explained::FILE))?;
    let image = build::conformance(layout, progress)?;
    let l1hv = build::l1hv(layout, progress)?;
    let emulator = Emulator::for_nested_vmx();
    let bare = Boot::Multiboot { kernel: Module::new(&image), modules: Vec::new() };
    let under = Boot::L1hv { host: Module::with_args(l1hv, hv_append), guest: vec![Module::new(&image)] };
    let bare = results("conformance-bare", "on the bare machine", emulator, bare, layout, progress, provisioned)?;
    ensure!(bare.complete, "the suite does not end on the bare machine: {}", bare.end);
    let under = results("conformance-l1hv", "under l1hv", emulator, under, layout, progress, provisioned)?;
    let mut report = Report::compare(&bare.cases, &under.cases, &explained, filter);
    if !under.complete {
        report.note(format!("under l1hv the suite does not end: {}", under.end));
    }
    Ok(report)
}

/// What one run printed.
struct Results {
    /// Name and result of each case, in order.
    cases: Vec<(String, String)>,
    /// Whether the last line came and counts them all.
    complete: bool,
    /// How the machine ended.
    end: String,
}

fn results(
    name: &str,
    place: &str,
    emulator: Emulator,
    boot: Boot,
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
) -> Result<Results> {
    let step = progress.step(format!("conformance {place}"));
    let machine = Machine { timeout: TIMEOUT, silence: TIMEOUT, ..Machine::new(name, emulator, boot) };
    let mut results = Results { cases: Vec::new(), complete: false, end: String::new() };
    let mut panic = None;
    let outcome = machine.run(layout, provisioned, |line: Line<'_>| {
        if let Some(case) = line.text.strip_prefix(CASE_PREFIX) {
            let (case, result) = case.split_once(' ').unwrap_or((case, ""));
            if results.cases.len().is_multiple_of(1000) {
                step.detail(case);
            }
            results.cases.push((case.to_owned(), result.to_owned()));
        } else if let Some(count) = line.text.strip_prefix(END_PREFIX) {
            results.complete = count.trim().parse() == Ok(results.cases.len());
        } else if line.text.starts_with(PANIC_PREFIX) {
            panic = Some(line.text.to_owned());
        }
    })?;
    results.complete &= outcome == Outcome::GuestShutdown;
    let last = results.cases.last().map_or("none", |(case, _)| case);
    results.end = format!("{}; the last case was {last}", panic.unwrap_or_else(|| outcome.to_string()));
    step.done();
    Ok(results)
}

/// Writes the report as JSON.
pub fn write_json(report: &Report, file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}
