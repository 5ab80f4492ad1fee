//! The differential suite: one image on the bare machine and under l1hv, compared case by case.
//!
//! The image (`guests/conformance`) prints `C GROUP/CASE RESULT` for each case and `C-END COUNT` at its end. A
//! difference is a defect unless [`Explained`] gives its reason; a reason that explains nothing is an error as well.

mod explained;
mod glob;
pub mod matrix;
mod models;
mod processors;
mod verdict;

use std::iter;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::build;
use crate::layout::Layout;
use crate::machine::{self, BOCHS, Boot, ChosenEmulator, Line, Machine, MachineOptions, Module, Outcome, UnknownMsrs};
use crate::models::Model;
use crate::progress::Progress;
use crate::provision::Provisioned;
use crate::side_by_side;

pub use explained::{Explained, KVM};
pub use glob::matches;
pub use models::of_model;
pub use processors::{Found, OfProcessor, Verdicts};
pub use verdict::{Case, Report, Verdict};

/// Limit on one of the two runs, on a host that does other work too.
const TIMEOUT: Duration = Duration::from_secs(600);

/// How long an l1hv that may hang shows nothing new.
const MUTANT_SILENCE: Duration = Duration::from_secs(60);

/// The limit on slow machines ([`crate::machine::Emulator::is_slow`]).
const SLOW_TIMEOUT: Duration = Duration::from_secs(7200);

const CASE_PREFIX: &str = "C ";
const END_PREFIX: &str = "C-END ";
const PANIC_PREFIX: &str = "C-PANIC";

/// The way in which l1hv runs the suite.
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
    /// l1hv without options.
    pub const DEFAULT: Self = Self { name: "conformance-l1hv", host: "", image: "" };
}

/// The machine that the suite runs on.
#[derive(Debug, Clone)]
pub struct Place {
    /// The emulator.
    pub emulator: ChosenEmulator,
    /// Processors and the like.
    pub options: MachineOptions,
    /// Only these groups of cases, separated by commas.
    pub only: Option<String>,
}

impl Place {
    /// The usual machine with `cpus` processors.
    pub fn usual(cpus: u32) -> Self {
        let options = MachineOptions { cpus, ..MachineOptions::default() };
        Self { emulator: machine::with_nested_vmx(), options, only: None }
    }

    /// Bochs with one processor of this model.
    pub fn model(model: &'static Model) -> Self {
        let options = MachineOptions { model: Some(model), ..MachineOptions::default() };
        Self { emulator: BOCHS, options, only: None }
    }

    /// The name of a run's logs.
    fn logs(&self, name: &str) -> String {
        let model = self.options.model.map(|model| format!("-{}", model.name));
        let turns = self.options.turns_seed.map(|seed| format!("-turns-{seed}"));
        [Some(name.to_owned()), model, turns].into_iter().flatten().collect()
    }

    /// Describes, for people, where the suite runs.
    fn describe(&self, place: &str) -> String {
        match self.options.model {
            Some(model) => format!("{place} on {}", model.name),
            None => place.to_owned(),
        }
    }
}

/// The suite, built.
pub struct Suite<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    provisioned: &'a Provisioned,
    explained: Explained,
    place: Place,
    image: PathBuf,
    l1hv: PathBuf,
}

impl<'a> Suite<'a> {
    /// Builds l1hv and the image.
    pub fn build(
        layout: &'a Layout,
        progress: &'a Progress,
        provisioned: &'a Provisioned,
        place: Place,
    ) -> Result<Self> {
        let explained = Explained::find(layout)?;
        let image = build::conformance(layout, progress)?;
        let l1hv = build::l1hv(layout, progress)?;
        Ok(Self { layout, progress, provisioned, explained, place, image, l1hv })
    }

    /// Runs the suite on the bare machine and, side by side with that, under l1hv in each mode: the cases for one
    /// processor, or those for several. Compares the cases whose names match `filter`.
    ///
    /// # Errors
    /// When a machine could not be started, or the suite does not end on the bare one.
    pub fn compare<const MODES: usize>(
        &self,
        modes: [Mode<'_>; MODES],
        filter: Option<&str>,
    ) -> Result<[Report; MODES]> {
        let sides = iter::once(None).chain(modes.iter().map(Some)).collect();
        let results = side_by_side::map(sides, |side: Option<&Mode<'_>>| match side {
            None => self.run_on_bare_machine(),
            Some(mode) => self.run_under_l1hv(*mode),
        });
        let mut results = results.into_iter().collect::<Result<Vec<_>>>()?;
        let bare = results.remove(0);
        ensure!(bare.complete, "the suite does not end on the bare machine: {}", bare.end);
        let mut results = results.into_iter();
        Ok(modes.map(|mode| {
            let under = results.next().expect("each mode has its results");
            self.report(mode, &bare, &under, filter)
        }))
    }

    /// The cases on the bare machine, once l1hv as it is has shown the same with this command line.
    ///
    /// # Errors
    /// When they differ, or a machine cannot be started.
    pub fn reference(&self, host: &str) -> Result<Results> {
        let bare = self.run_on_bare_machine()?;
        ensure!(bare.complete, "the suite does not end on the bare machine: {}", bare.end);
        let report = self.compare_host(&self.l1hv, host, &bare)?;
        ensure!(report.different == 0, "before anything is left out: {report}");
        Ok(bare)
    }

    /// Compares with what another l1hv shows, which may hang.
    ///
    /// # Errors
    /// When the machine cannot be started.
    pub fn compare_host(&self, l1hv: &Path, host: &str, bare: &Results) -> Result<Report> {
        let mode = Mode { name: "conformance-mutant", host, image: "" };
        let boot = Boot::L1hv { host: Module::with_args(l1hv, host), guest: vec![self.image("")] };
        let under = self.run_within((TIMEOUT, MUTANT_SILENCE), mode.name, "under another l1hv", boot)?;
        Ok(self.report(mode, bare, &under, None))
    }

    fn report(&self, mode: Mode<'_>, bare: &Results, under: &Results, filter: Option<&str>) -> Report {
        let Place { emulator, options, only } = &self.place;
        let explained = self.explained.under(mode.host, options.cpus, emulator.hypervisor(), &bare.cases);
        // Unused entries are reported only for the whole suite on our own emulator.
        let is_part = only.is_some() || emulator.hypervisor().is_some();
        let filter = filter.or(is_part.then_some("*"));
        let mut report = Report::compare(&bare.cases, &under.cases, &explained, filter);
        if !under.complete {
            report.note(format!("under l1hv the suite does not end: {}", under.end));
        }
        report
    }

    /// Boots l1hv on a processor that lacks a feature, where it must stop with this kind. Returns what happens instead,
    /// if anything.
    fn must_stop(&self, mode: Mode<'_>, kind: &str) -> Result<Option<String>> {
        let under = self.run_under_l1hv(mode)?;
        Ok((under.stop.as_deref() != Some(kind)).then_some(under.end))
    }

    fn run_on_bare_machine(&self) -> Result<Results> {
        let boot = Boot::Multiboot { kernel: self.image(""), modules: Vec::new() };
        self.run(&format!("conformance-{}-bare", self.place.options.cpus), "on the bare machine", boot)
    }

    fn run_under_l1hv(&self, mode: Mode<'_>) -> Result<Results> {
        let host = Module::with_args(&self.l1hv, mode.host);
        let boot = Boot::L1hv { host, guest: vec![self.image(mode.image)] };
        let place = format!("under l1hv {} {}", mode.host, mode.image);
        self.run(mode.name, place.trim(), boot)
    }

    /// The image with its arguments. On several processors other groups run than on one, unless the place names groups.
    fn image(&self, arguments: &str) -> Module {
        let only = self.place.only.as_ref().map_or_else(String::new, |group| format!(" only={group}"));
        let memory = if self.place.emulator.reads_ones_beyond_memory() { "" } else { " memory-only" };
        Module::with_args(&self.image, format!("{arguments}{only}{memory}"))
    }

    fn run(&self, name: &str, what: &str, boot: Boot) -> Result<Results> {
        let timeout = if self.place.emulator.is_slow() { SLOW_TIMEOUT } else { TIMEOUT };
        self.run_within((timeout, timeout), name, what, boot)
    }

    fn run_within(
        &self,
        (timeout, silence): (Duration, Duration),
        name: &str,
        what: &str,
        boot: Boot,
    ) -> Result<Results> {
        let place = &self.place;
        let step = self.progress.step(format!("conformance {}", place.describe(what)));
        let machine = place.options.apply(Machine {
            timeout,
            silence,
            unknown_msrs: UnknownMsrs::Fault,
            ..Machine::new(place.logs(name), place.emulator, boot)
        });
        let mut results = Results::default();
        let outcome = machine.run(self.layout, self.provisioned, |line: Line<'_>| {
            results.add(line.text);
            if let (true, Some((case, _))) = (results.cases.len().is_multiple_of(1000), results.cases.last()) {
                step.detail(case);
            }
        })?;
        results.complete &= outcome == Outcome::GuestShutdown;
        if let Outcome::HostStop(stop) = &outcome {
            results.stop = Some(stop.kind.clone());
        }
        let last = results.cases.last().map_or("none", |(case, _)| case);
        results.end =
            format!("{}; the last case was {last}", results.panic.take().unwrap_or_else(|| outcome.to_string()));
        step.done();
        Ok(results)
    }
}

/// The output of one run.
#[derive(Debug, Default)]
pub struct Results {
    /// Name and result of each case, in order.
    cases: Vec<(String, String)>,
    /// Whether the last line was printed and counts all cases.
    complete: bool,
    /// The kind of l1hv's stop, if the run ended so.
    stop: Option<String>,
    /// The text of a `C-PANIC` line.
    panic: Option<String>,
    /// How the machine ended.
    end: String,
}

impl Results {
    /// Adds a line of the stream, which may not be the image's.
    fn add(&mut self, line: &str) {
        if let Some(case) = line.strip_prefix(CASE_PREFIX) {
            let (case, result) = case.split_once(' ').unwrap_or((case, ""));
            self.cases.push((case.to_owned(), result.to_owned()));
        } else if let Some(count) = line.strip_prefix(END_PREFIX) {
            self.complete = count.trim().parse() == Ok(self.cases.len());
        } else if line.starts_with(PANIC_PREFIX) {
            self.panic = Some(line.to_owned());
        }
    }
}

/// Writes a report as JSON.
pub fn write_json(report: &impl Serialize, file: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
}
