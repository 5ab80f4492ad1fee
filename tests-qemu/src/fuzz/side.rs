//! Programs on one side.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use protocol::stop::StopKind;
use shadow::exit::ExitReason;

use super::{BATCH, Fuzzer, Range};
use crate::machine::{Boot, Line, Machine, Module, Outcome, UnknownMsrs};
use crate::side_by_side;

/// A program takes less than a millisecond, and a machine's start a few seconds, on a busy host many.
const SILENCE: Duration = Duration::from_secs(60);

/// Limit on a run without a deadline.
const FOREVER: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// On the bare machine.
    Bare,
    /// Under l1hv.
    L1hv,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bare => "bare",
            Self::L1hv => "l1hv",
        })
    }
}

/// What became of a batch, or of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// The digest of all observations.
    Digest(String),
    /// The digest of a program whose nested guest ran until its time was over, at no determined instruction.
    OutOfTime(String),
    /// A program ended the machine.
    Death(String),
    /// l1hv stopped, where the bare machine would not have ended.
    Defect(String),
}

impl Fate {
    fn of_end(outcome: &Outcome) -> Self {
        let how = outcome.to_string();
        let is_stop = matches!(outcome, Outcome::HostStop(_));
        if is_stop && !is_the_guests_fault(outcome) { Self::Defect(how) } else { Self::Death(how) }
    }
}

/// Whether a bare machine would have ended, too.
pub fn is_the_guests_fault(outcome: &Outcome) -> bool {
    let kinds = [StopKind::TripleFault, StopKind::VmxAbort].map(StopKind::name);
    match outcome {
        Outcome::HostStop(stop) => kinds.contains(&stop.kind.as_str()),
        // The image has noticed that its own memory is not what it was.
        Outcome::MachineError(error) => error.starts_with("C-PANIC"),
        _ => false,
    }
}

/// Numbers of events, by number of an error or of an exit reason.
pub type Counts = BTreeMap<u16, u64>;

/// The programs of one side.
#[derive(Debug, Default)]
pub struct Batches {
    /// The fate of each batch, by the number of its first program.
    pub fates: BTreeMap<u64, Fate>,
    /// VM entries that failed, by VM-instruction error; 0 is VMfailInvalid.
    pub failed: Counts,
    /// VM exits by basic reason, and entry failures.
    pub exits: Counts,
}

/// The time until the deadline, if it is not over.
pub fn time_left(deadline: Option<Instant>) -> Option<Duration> {
    let left = deadline.map_or(FOREVER, |deadline| deadline.saturating_duration_since(Instant::now()));
    (!left.is_zero()).then_some(left)
}

/// A line of the image: `F NUMBER DIGEST failed=... exits=...`.
struct Done {
    digest: String,
    failed: Counts,
    exits: Counts,
}

impl Done {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix("F ")?.split(' ');
        let (_, digest) = (words.next()?, words.next()?.to_owned());
        let mut list = |name: &str| counts(words.next()?.strip_prefix(name)?);
        Some(Self { digest, failed: list("failed=")?, exits: list("exits=")? })
    }
}

/// `NUMBER:COUNT,NUMBER:COUNT,`
fn counts(list: &str) -> Option<Counts> {
    let items = list.split(',').filter(|item| !item.is_empty());
    items.map(|item| item.split_once(':').and_then(|(n, count)| Some((n.parse().ok()?, count.parse().ok()?)))).collect()
}

fn add(sum: &mut Counts, counts: &Counts) {
    for (number, count) in counts {
        *sum.entry(*number).or_default() += count;
    }
}

impl Fuzzer<'_> {
    /// Does the same on both sides at the same time.
    pub(super) fn on_both<T: Send>(&self, work: impl Fn(Side) -> Result<T> + Sync) -> Result<[T; 2]> {
        let results: Result<Vec<T>> = side_by_side::map(vec![Side::Bare, Side::L1hv], work).into_iter().collect();
        results.map(|results| results.try_into().unwrap_or_else(|_| unreachable!("two sides have two results")))
    }

    /// Runs the range in batches, and starts again behind a batch that ends the machine.
    pub(super) fn batches(&self, side: Side, range: Range, deadline: Option<Instant>) -> Result<Batches> {
        let step = self.progress.step(format!("seed {}, {side}", self.seed));
        let mut batches = Batches::default();
        let (mut next, end) = (range.first, range.first.saturating_add(range.count));
        while next < end {
            let Some(left) = time_left(deadline) else { break };
            let arguments = format!("first={next} count={} batch={BATCH}", end - next);
            let outcome = self.run_image(side, "batches", (&arguments, left), |line| {
                if let Some(result) = Done::parse(line) {
                    add(&mut batches.failed, &result.failed);
                    add(&mut batches.exits, &result.exits);
                    batches.fates.insert(next, Fate::Digest(result.digest));
                    next += BATCH.min(end - next);
                    if (next / BATCH).is_multiple_of(50) {
                        step.detail(&format!("{} programs", next - range.first));
                    }
                }
            })?;
            match outcome {
                None => (),
                Some(Outcome::Timeout) => break,
                Some(outcome) => {
                    step.line(&format!("  {side}: programs {next} to {}: {outcome}", next + BATCH - 1));
                    batches.fates.insert(next, Fate::of_end(&outcome));
                    next += BATCH.min(end - next);
                }
            }
        }
        step.done();
        Ok(batches)
    }

    /// The fate of each of the `count` programs, or masks of a program, that `arguments` lists for the image, up to the
    /// first that ends the machine.
    pub(super) fn until_its_end(&self, side: Side, count: usize, arguments: &str) -> Result<Vec<Fate>> {
        let mut fates = Vec::new();
        let outcome = self.run_image(side, "programs", (arguments, FOREVER), |line| {
            if let Some(result) = Done::parse(line) {
                let is_out_of_time = result.exits.contains_key(&ExitReason::PREEMPTION_TIMER.basic());
                fates.push(if is_out_of_time { Fate::OutOfTime } else { Fate::Digest }(result.digest));
            }
        })?;
        match outcome {
            None if fates.len() == count => (),
            None => bail!("the image has done {} of {count} programs", fates.len()),
            Some(outcome) => fates.push(Fate::of_end(&outcome)),
        }
        Ok(fates)
    }

    /// Boots the image, and passes its lines on. Returns how it ended, unless it came to its end.
    pub(super) fn run_image(
        &self,
        side: Side,
        name: &str,
        (arguments, limit): (&str, Duration),
        mut on_line: impl FnMut(&str),
    ) -> Result<Option<Outcome>> {
        let image = Module::with_args(&self.image, format!("fuzz seed={} {arguments}", self.seed));
        let boot = match side {
            Side::Bare => Boot::Multiboot { kernel: image, modules: Vec::new() },
            Side::L1hv => Boot::L1hv { host: Module::with_args(&self.l1hv, &self.host), guest: vec![image] },
        };
        let mut is_complete = false;
        let mut panic = None;
        let name = format!("fuzz-{name}-{side}");
        let machine = Machine {
            unknown_msrs: UnknownMsrs::Fault,
            timeout: limit,
            silence: SILENCE,
            ..Machine::new(name, self.place.emulator, boot)
        };
        let outcome = self.place.options.apply(machine).run(self.layout, self.provisioned, |line: Line<'_>| {
            is_complete |= line.text == "F-END";
            if line.text.starts_with("C-PANIC") {
                panic = Some(line.text.to_owned());
            }
            on_line(line.text);
        })?;
        Ok(match (is_complete, panic) {
            (true, _) => None,
            (false, Some(panic)) => Some(Outcome::MachineError(panic)),
            (false, None) => Some(outcome),
        })
    }
}
