//! What the programs have shown.

use std::fmt;

use shadow::exit::ExitReason;
use table::{Table, grouped};

use super::look::{Observations, Seen};
use super::minimise::steps;
use super::side::{Batches, Counts};
use super::{BATCH, Side};

/// A program, as both sides see it.
#[derive(Debug)]
pub struct Finding {
    seed: u64,
    program: u64,
    mask: u64,
    bare: Observations,
    l1hv: Observations,
}

impl Finding {
    /// What the two sides see.
    pub fn new(seed: u64, program: u64, mask: u64, [bare, l1hv]: [Observations; 2]) -> Self {
        Self { seed, program, mask, bare, l1hv }
    }

    /// The number of the program's steps, if the mask is of all of them.
    pub fn steps(&self) -> u32 {
        self.bare.steps.last().map_or(0, |seen| seen.number)
    }

    /// Whether the sides differ.
    pub fn differs(&self) -> bool {
        self.bare.steps != self.l1hv.steps || self.bare.death != self.l1hv.death
    }

    /// The command that runs these steps again.
    fn replay(&self) -> String {
        let list: Vec<String> = steps(self.mask).map(|step| step.to_string()).collect();
        let steps = if self.mask == u64::MAX { String::new() } else { format!(" --steps {}", list.join(",")) };
        format!("cargo l1hv fuzz --seed {} --program {}{steps}", self.seed, self.program)
    }
}

/// Writes what a side sees and the other does not.
fn difference(f: &mut fmt::Formatter<'_>, side: Side, seen: &Seen, other: Option<&Seen>) -> fmt::Result {
    let known = other.map_or(&[][..], |seen| &seen.observations);
    let own: Vec<&str> = seen.observations.iter().filter(|line| !known.contains(line)).map(String::as_str).collect();
    if own.is_empty() { Ok(()) } else { writeln!(f, "      {side}: {}", own.join(" ")) }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}, program {}", self.seed, self.program)?;
        let count = self.bare.steps.len().max(self.l1hv.steps.len());
        for index in 0..count {
            let (bare, l1hv) = (self.bare.steps.get(index), self.l1hv.steps.get(index));
            let Some(step) = bare.or(l1hv) else { continue };
            writeln!(f, "  {:>3} {}", step.number, step.step)?;
            if let (Some(bare), Some(l1hv)) = (bare, l1hv) {
                difference(f, Side::Bare, bare, Some(l1hv))?;
                difference(f, Side::L1hv, l1hv, Some(bare))?;
            }
        }
        for (side, seen) in [(Side::Bare, &self.bare), (Side::L1hv, &self.l1hv)] {
            if let Some(death) = &seen.death {
                writeln!(f, "      {side} ends here: {death}")?;
            }
        }
        write!(f, "  {}", self.replay())
    }
}

/// A whole run.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    seconds: u64,
    programs: u64,
    failed: Counts,
    exits: Counts,
    /// Programs that end the bare machine, and how.
    pub excluded: Vec<(u64, String)>,
    /// Programs that differ.
    pub findings: Vec<Finding>,
    /// Further programs, or batches, that differ or end the bare machine.
    pub left_out: usize,
}

impl Report {
    /// The report before the differences are known.
    pub fn new(seed: u64, seconds: u64, bare: &Batches, l1hv: &Batches) -> Self {
        let both = bare.fates.keys().filter(|first| l1hv.fates.contains_key(first)).count();
        Self {
            seed,
            seconds,
            programs: both as u64 * BATCH,
            failed: l1hv.failed.clone(),
            exits: l1hv.exits.clone(),
            excluded: Vec::new(),
            findings: Vec::new(),
            left_out: 0,
        }
    }

    /// Whether nothing differs.
    pub fn is_right(&self) -> bool {
        self.findings.is_empty() && self.left_out == 0
    }

    /// The programs that both sides have run.
    pub fn programs(&self) -> u64 {
        self.programs
    }

    /// Of all VM entries, the percentage that succeeded.
    pub fn entered_percent(&self) -> u64 {
        let entered = self.entered();
        let refused = self.refused() + self.failed.values().sum::<u64>();
        (entered * 100).checked_div(entered + refused).unwrap_or(0)
    }

    fn is_entry_failure(reason: u16) -> bool {
        let failures = [ExitReason::ENTRY_FAILURE_GUEST_STATE, ExitReason::ENTRY_FAILURE_MSR_LOADING];
        failures.iter().any(|failure| failure.basic() == reason)
    }

    fn refused(&self) -> u64 {
        self.exits.iter().filter(|(reason, _)| Self::is_entry_failure(**reason)).map(|(_, count)| count).sum()
    }

    fn entered(&self) -> u64 {
        self.exits.values().sum::<u64>() - self.refused()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["VM entries and exits under l1hv", "count"]);
        for (error, count) in &self.failed {
            let name = if *error == 0 { "VMfailInvalid".to_owned() } else { format!("VMfailValid, error {error}") };
            table.row(&name, [Some(*count)]);
        }
        for (reason, count) in &self.exits {
            let name = ExitReason(u32::from(*reason)).name().unwrap_or("unknown exit reason");
            table.row(name, [Some(*count)]);
        }
        f.write_str(&table.render())?;
        for (program, reason) in &self.excluded {
            writeln!(f, "program {program} ends the bare machine: {reason}")?;
        }
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        if self.left_out > 0 {
            writeln!(f, "{} further differences are not shown", self.left_out)?;
        }
        let rate = self.programs / self.seconds.max(1);
        write!(
            f,
            "seed {}: {} programs in {} s ({rate} a second), {}% of {} VM entries succeed, {} excluded, {} different",
            self.seed,
            grouped(self.programs),
            grouped(self.seconds),
            self.entered_percent(),
            grouped(self.entered() + self.refused() + self.failed.values().sum::<u64>()),
            self.excluded.len(),
            self.findings.len() + self.left_out
        )
    }
}
