//! `cargo bench-nested`: what nesting costs on the bare machine, under l1hv and under KVM, counted alike.
//!
//! ```text
//!   bare   payload <- Linux KVM                          one level less: what the guest hypervisor itself costs
//!   l1hv   payload <- Linux KVM <- l1hv
//!   kvm    payload <- Linux KVM <- Linux KVM
//! ```
//!
//! The counters are the emulator's ([`crate::counters`]), the machine is deterministic, and a payload's
//! operation is the median of a thousand: timer interrupts do not show, and two runs are equal.

pub mod compare;
pub mod measure;

use std::fmt;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::build::{self, GuestPrograms};
use crate::guest::{KvmEpt, Plan, Work};
use crate::layout::Layout;
use crate::machine::{DEFAULT_IPS, Emulator, Machine, Module, Outcome};
use crate::progress::Progress;
use crate::protocol::RESULT_PREFIX;
use crate::provision::Provisioned;
use crate::table::Table;
use crate::transcript::{Event, Transcript};
use measure::{Measurement, NUMBERS};

/// Longest run of one machine.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Room for a Linux in a Linux in a Linux.
const MEMORY_MIB: u32 = 2048;

/// Who is the lowest hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// The guest hypervisor itself.
    Bare,
    /// l1hv.
    L1hv,
    /// Linux KVM as nesting hypervisor.
    Kvm,
}

impl System {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Bare, Self::L1hv, Self::Kvm];

    /// What the machine boots does this.
    fn work(self) -> Work {
        match self {
            Self::Bare | Self::L1hv => Work::Demo,
            Self::Kvm => Work::Nest,
        }
    }

    /// What the console says before a line of the guest hypervisor.
    fn console_prefix(self) -> &'static str {
        match self {
            Self::Bare | Self::L1hv => "",
            Self::Kvm => "nested: ",
        }
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bare => "bare",
            Self::L1hv => "l1hv",
            Self::Kvm => "kvm",
        })
    }
}

/// What all runs of the benchmark share.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Where things are.
    pub layout: &'a Layout,
    /// Shows what takes long.
    pub progress: &'a Progress,
    /// Kernels and emulators.
    pub provisioned: &'a Provisioned,
    /// Programs of the guest hypervisor.
    pub programs: &'a GuestPrograms,
    /// Debian kernel series of every Linux.
    pub series: &'a str,
}

impl Bench<'_> {
    /// Measures every operation on `system`.
    ///
    /// # Errors
    /// When the machine could not be started or did not do all its work.
    pub fn measure(&self, system: System) -> Result<Vec<Measurement>> {
        let transcript = self.run(system)?;
        let mut measurements = measure::operations(&system.to_string(), &transcript)?;
        measurements.extend(measure::boots(&system.to_string(), &transcript)?);
        Ok(measurements)
    }

    fn run(&self, system: System) -> Result<Transcript> {
        let plan = Plan { kernel: self.provisioned.kernel(self.series)?, work: system.work(), ept: KvmEpt::On };
        let guest = plan.prepare(self.layout, self.provisioned, self.programs, Emulator::Bochs, DEFAULT_IPS)?;
        let boot = match system {
            System::L1hv => guest.under(Module::new(build::l1hv(self.layout, self.progress)?)),
            System::Bare | System::Kvm => guest.on_bare_machine(),
        };
        let name = format!("bench-{system}");
        let machine = Machine {
            memory_mib: MEMORY_MIB,
            timeout: TIMEOUT,
            silence: TIMEOUT,
            ..Machine::new(name.as_str(), Emulator::Bochs, boot)
        };
        let step = self.progress.step(format!("measuring: {system}"));
        let mut transcript = Transcript::default();
        let outcome = machine.run(self.layout, self.provisioned, |line| {
            // One level up, the guest hypervisor's console is a nested guest's.
            let text = line.text.strip_prefix(system.console_prefix()).filter(|text| text.starts_with(RESULT_PREFIX));
            let line = crate::machine::Line { text: text.unwrap_or(line.text), ..line };
            if let Some(event) = Event::of(line) {
                transcript.add(event);
            }
        })?;
        step.done();
        let is_done = ["payload", "linux"].iter().all(|nested| transcript.is_done(nested));
        if outcome != Outcome::GuestShutdown || !is_done || transcript.error().is_some() {
            let what = transcript.error().map_or_else(|| outcome.to_string(), str::to_owned);
            bail!("{system}: {what} (logs: {})", self.layout.root().join("logs").join(name).display());
        }
        Ok(transcript)
    }
}

/// The measurements as a table for people, the systems of an operation side by side.
pub fn table(measurements: &[Measurement]) -> String {
    let headings: Vec<&str> =
        ["operation", "system"].into_iter().chain(NUMBERS.iter().map(|number| number.heading)).collect();
    let mut operations: Vec<&str> = Vec::new();
    for measurement in measurements {
        if !operations.contains(&measurement.operation.as_str()) {
            operations.push(&measurement.operation);
        }
    }
    let mut table = Table::new(&headings);
    for operation in operations {
        for measurement in measurements.iter().filter(|measurement| measurement.operation == operation) {
            let numbers = NUMBERS.iter().map(|number| Some((number.of)(measurement)));
            table.row_of(&[operation, &measurement.system], numbers);
        }
    }
    table.render()
}
