//! The differential suite: one image on the bare machine and under l1hv, compared case by case.
//!
//! The image (`guests/conformance`) prints `C GROUP/CASE RESULT` for each case and `C-END COUNT` at its end. A difference is a
//! defect unless [`Explained`] gives its reason; a reason that explains nothing is an error as well.

mod explained;
mod glob;
mod verdict;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::layout::Layout;
use crate::machine::{self, Boot, Line, Machine, Module, Outcome};
use crate::progress::Progress;
use crate::provision::Provisioned;

pub use explained::Explained;
pub use glob::matches;
pub use verdict::{Case, Report, Verdict};

/// Limit on one of the two runs, for a machine that does other work too.
const TIMEOUT: Duration = Duration::from_secs(600);

const CASE_PREFIX: &str = "C ";
const END_PREFIX: &str = "C-END ";
const PANIC_PREFIX: &str = "C-PANIC";

/// How l1hv runs the suite.
#[derive(Debug, Clone, Copy)]
pub struct Mode<'a> {
    /// The name of the run's logs.
    pub name: &'a str,
    /// l1hv's command line.
    pub host: &'a str,
    /// The image's command line, which it does not have on the bare machine.
    pub image: &'a str,
}

impl Mode<'_> {
    /// As l1hv is without options.
    pub const DEFAULT: Self = Self { name: "conformance-l1hv", host: "", image: "" };
}

/// The suite with its results on the bare machine, which those under l1hv are compared with.
pub struct Suite<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    provisioned: &'a Provisioned,
    explained: Explained,
    cpus: u32,
    image: PathBuf,
    l1hv: PathBuf,
    bare: Results,
}

impl<'a> Suite<'a> {
    /// Builds what is needed, and runs the suite on the bare machine with so many processors: the cases for one, or those for several.
    pub fn on_bare_machine(
        layout: &'a Layout,
        progress: &'a Progress,
        provisioned: &'a Provisioned,
        cpus: u32,
    ) -> Result<Self> {
        let explained = Explained::find(layout)?;
        let image = build::conformance(layout, progress)?;
        let l1hv = build::l1hv(layout, progress)?;
        let bare = Results::default();
        let mut suite = Self { layout, progress, provisioned, explained, cpus, image, l1hv, bare };
        let boot = Boot::Multiboot { kernel: Module::new(&suite.image), modules: Vec::new() };
        suite.bare = suite.run(&format!("conformance-{cpus}-bare"), "on the bare machine", boot)?;
        ensure!(suite.bare.complete, "the suite does not end on the bare machine: {}", suite.bare.end);
        Ok(suite)
    }

    /// Names and results of the cases on the bare machine, in order.
    pub fn bare_cases(&self) -> &[(String, String)] {
        &self.bare.cases
    }

    /// Runs the suite under l1hv, and compares the cases whose names match `filter`.
    pub fn under_l1hv(&self, mode: Mode<'_>, filter: Option<&str>) -> Result<Report> {
        let host = Module::with_args(&self.l1hv, mode.host);
        let boot = Boot::L1hv { host, guest: vec![Module::with_args(&self.image, mode.image)] };
        let place = format!("under l1hv {} {}", mode.host, mode.image);
        let under = self.run(mode.name, place.trim(), boot)?;
        let explained = self.explained.under(mode.host, self.cpus);
        let mut report = Report::compare(&self.bare.cases, &under.cases, &explained, filter);
        if !under.complete {
            report.note(format!("under l1hv the suite does not end: {}", under.end));
        }
        Ok(report)
    }

    fn run(&self, name: &str, place: &str, boot: Boot) -> Result<Results> {
        let step = self.progress.step(format!("conformance {place}"));
        let machine = Machine {
            cpus: self.cpus,
            timeout: TIMEOUT,
            silence: TIMEOUT,
            ..Machine::new(name, machine::with_nested_vmx(), boot)
        };
        let mut results = Results::default();
        let mut panic = None;
        let outcome = machine.run(self.layout, self.provisioned, |line: Line<'_>| {
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
}

/// What one run printed.
#[derive(Default)]
struct Results {
    /// Name and result of each case, in order.
    cases: Vec<(String, String)>,
    /// Whether the last line came and counts them all.
    complete: bool,
    /// How the machine ended.
    end: String,
}

/// Writes the report as JSON.
pub fn write_json(report: &Report, file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}
