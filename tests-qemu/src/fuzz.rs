//! Random programs of a guest hypervisor, on the bare machine and under l1hv: what they see must be the same.
//!
//! ```text
//!   side      programs on one side: lines of the image, restarts after a program that ends the machine
//!   compare   digests of batches, then of programs
//!   minimise  a program that differs, without the steps that do not matter
//!   look      what both sides see, step by step
//!   hostile   programs that nothing holds back: the host survives
//!   report    the table
//! ```

mod compare;
mod hostile;
mod look;
mod minimise;
mod report;
mod side;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::build;
use crate::conformance::Place;
use crate::layout::Layout;
use crate::machine::DEFAULT_IPS;
use crate::progress::Progress;
use crate::provision::Provisioned;

pub use hostile::Survival;
pub use report::{Finding, Report};
pub use side::Side;

/// Programs that share a digest.
const BATCH: u64 = 100;

/// Ticks to a second of emulated time: few, as firmware and boot loader wait in seconds, and programs do not.
const QUICK_START_IPS: u64 = 10_000_000;

/// Which programs.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// The number of the first.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// The time for them, without what follows.
    pub limit: Option<Duration>,
}

/// The programs of a seed, on a machine.
pub struct Fuzzer<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    provisioned: &'a Provisioned,
    place: Place,
    host: String,
    seed: u64,
    image: PathBuf,
    l1hv: PathBuf,
}

impl<'a> Fuzzer<'a> {
    /// Builds l1hv, which gets the command line `host`, and the image.
    ///
    /// # Errors
    /// When one of them does not build.
    pub fn build(
        layout: &'a Layout,
        progress: &'a Progress,
        provisioned: &'a Provisioned,
        place: Place,
        (host, seed): (&str, u64),
    ) -> Result<Self> {
        let image = build::conformance(layout, progress)?;
        let l1hv = build::l1hv(layout, progress)?;
        let mut place = place;
        if place.options.ips == DEFAULT_IPS {
            place.options.ips = QUICK_START_IPS;
        }
        Ok(Self { layout, progress, provisioned, place, host: host.to_owned(), seed, image, l1hv })
    }

    /// Runs the programs and compares them; looks closer at up to `findings` of those that differ.
    ///
    /// # Errors
    /// When a machine cannot be started, or the image does not run.
    pub fn run(&self, range: Range, findings: usize) -> Result<Report> {
        let began = Instant::now();
        let deadline = range.limit.map(|limit| began + limit);
        let [bare, l1hv] = self.on_both(|side| self.batches(side, range, deadline))?;
        let seconds = began.elapsed().as_secs();
        let mut report = Report::new(self.seed, seconds, &bare, &l1hv);
        for batch in compare::suspicious(&bare, &l1hv) {
            if report.findings.len() >= findings {
                report.left_out += 1;
                continue;
            }
            let last = range.first + range.count.saturating_sub(1);
            for (program, verdict) in self.compare_programs(batch, last)? {
                match verdict {
                    compare::Verdict::Excluded(reason) => report.excluded.push((program, reason)),
                    compare::Verdict::Differs if report.findings.len() < findings => {
                        report.findings.push(self.look_closer(program)?);
                    }
                    compare::Verdict::Differs => report.left_out += 1,
                }
            }
        }
        Ok(report)
    }

    /// A program that differs, minimised.
    fn look_closer(&self, program: u64) -> Result<Finding> {
        let step = self.progress.step(format!("minimising program {program}"));
        let mask = self.minimise(program)?;
        let finding = self.look(program, mask)?;
        step.done();
        Ok(finding)
    }

    /// What both sides see of the steps of a mask.
    ///
    /// # Errors
    /// When a machine cannot be started.
    pub fn look(&self, program: u64, mask: u64) -> Result<Finding> {
        let seen = self.on_both(|side| self.observations(side, program, mask))?;
        Ok(Finding::new(self.seed, program, mask, seen))
    }
}
