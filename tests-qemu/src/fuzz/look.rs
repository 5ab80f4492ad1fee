//! A program's steps and observations, as lines of the image.

use std::time::Duration;

use anyhow::Result;

use super::{Fuzzer, Side};

/// Limit on one program.
const LIMIT: Duration = Duration::from_secs(60);

/// A step, and what is seen in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The step's number.
    pub number: u32,
    /// The step, in words.
    pub step: String,
    /// The observations.
    pub observations: Vec<String>,
}

/// The program on one side.
#[derive(Debug, Clone, Default)]
pub struct Observations {
    /// Its steps; the last is what it has left behind.
    pub steps: Vec<Seen>,
    /// How it ended the machine, if it did.
    pub death: Option<String>,
}

impl Observations {
    fn add(&mut self, line: &str) {
        if let Some((number, step)) = line.strip_prefix("F-STEP ").and_then(|rest| rest.split_once(' ')) {
            let number = number.parse().unwrap_or(0);
            self.steps.push(Seen { number, step: step.to_owned(), observations: Vec::new() });
        } else if let (Some(seen), Some(step)) = (line.strip_prefix("F-SEES "), self.steps.last_mut()) {
            step.observations.push(seen.to_owned());
        }
    }
}

impl Fuzzer<'_> {
    /// Runs one program and notes everything.
    pub(super) fn observations(&self, side: Side, program: u64, mask: u64) -> Result<Observations> {
        let mut all = Observations::default();
        let arguments = format!("first={program} steps={mask:x} verbose");
        let outcome = self.run_image(side, "look", (&arguments, LIMIT), |line| all.add(line))?;
        all.death = outcome.map(|outcome| outcome.to_string());
        Ok(all)
    }
}
