//! `cargo bench-nested`: what nesting costs on the bare machine, under l1hv and under KVM, counted alike.
//!
//! ```text
//!   bare   payload <- Linux KVM                          one level less: what the guest hypervisor itself costs
//!   l1hv   payload <- Linux KVM <- l1hv
//!   kvm    payload <- Linux KVM <- Linux KVM
//!
//!   the same with the minimal guest hypervisor and its nested guest in place of the upper Linux KVM and the payload
//! ```
//!
//! The counters are the emulator's ([`crate::counters`]), the machine is deterministic, and a payload's
//! operation is the median of a thousand: timer interrupts do not show, and two runs are equal.
//!
//! Silicon has no such counters. There the payload reads the TSC ([`timed`]), started by the runner or from an ISO
//! without the runner ([`image`]).

pub mod chart;
pub mod compare;
pub mod image;
pub mod markdown;
pub mod measure;
pub mod model;
pub mod timed;

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use guest_abi::{NESTED_PREFIX, RESULT_PREFIX};
use table::Table;

use crate::build::{self, GuestPrograms};
use crate::guest::{KvmEpt, Plan, Shown, Work};
use crate::layout::Layout;
use crate::machine::{Boot, ChosenEmulator, Machine, MachineOptions, Module, Outcome};
use crate::progress::Progress;
use crate::provision::Provisioned;
use crate::transcript::{Event, Timings, Transcript};
use measure::{Measurement, NUMBERS};

/// Longest run of one machine.
const TIMEOUT: Duration = Duration::from_secs(900);

/// Longest run of one slow machine.
const SLOW_TIMEOUT: Duration = Duration::from_secs(3600);

/// Memory for a Linux in a Linux in a Linux.
pub const MEMORY_MIB: u32 = 2048;

/// The lowest hypervisor.
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
    /// All systems, in the order of the table.
    pub const ALL: [Self; 3] = [Self::Bare, Self::L1hv, Self::Kvm];

    /// The work of the machine's first Linux, so that the guest hypervisor does [`Work::Demo`].
    fn demo(self) -> Work {
        match self {
            Self::Bare | Self::L1hv => Work::Demo,
            Self::Kvm => Work::Nest,
        }
    }

    /// The work of the machine's first Linux, so that the guest hypervisor does [`Work::Payload`].
    pub(crate) fn payload(self) -> Work {
        match self {
            Self::Bare | Self::L1hv => Work::Payload,
            Self::Kvm => Work::NestPayload,
        }
    }

    /// The prefix of the guest hypervisor's lines on the console.
    fn console_prefix(self) -> &'static str {
        match self {
            Self::Bare | Self::L1hv => "",
            Self::Kvm => NESTED_PREFIX,
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

/// A machine of the benchmark.
#[derive(Debug, Clone, Copy)]
struct Run<'a> {
    system: System,
    work: Work,
    ept: KvmEpt,
    /// l1hv's command line.
    options: &'a str,
    /// Parameters of the lowest KVM.
    parameters: &'a [&'a str],
    shown: Option<Shown<'a>>,
    name: &'a str,
}

impl<'a> Run<'a> {
    /// A run with default settings.
    fn new(system: System, work: Work, name: &'a str) -> Self {
        Self { system, work, ept: KvmEpt::On, options: "", parameters: &[], shown: None, name }
    }
}

/// Operations that are measured once more, in another way.
#[derive(Debug)]
struct Variant {
    name: &'static str,
    /// The suffix of the operations' names.
    suffix: &'static str,
    systems: &'static [System],
    ept: KvmEpt,
    options: &'static str,
    parameters: &'static [&'static str],
    operations: &'static [&'static str],
}

const VARIANTS: [Variant; 2] = [
    Variant {
        name: "ept-off",
        suffix: ", guest hypervisor with ept=0",
        systems: &System::ALL,
        ept: KvmEpt::Off,
        options: "",
        parameters: &[],
        operations: &["CPUID", "MOV to CR3"],
    },
    Variant {
        name: "emulated",
        suffix: ", without VMCS shadowing",
        systems: &[System::L1hv, System::Kvm],
        ept: KvmEpt::On,
        options: "vmcs-shadowing=off",
        parameters: &["enable_shadow_vmcs=0"],
        operations: &["CPUID", "first touch of a page, backed"],
    },
];

/// The settings that all runs of the benchmark share.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The directories.
    pub layout: &'a Layout,
    /// Shows the steps that take long.
    pub progress: &'a Progress,
    /// Kernels and emulators.
    pub provisioned: &'a Provisioned,
    /// Programs of the guest hypervisor.
    pub programs: &'a GuestPrograms,
    /// Debian kernel series of every Linux.
    pub series: &'a str,
    /// The machine.
    pub emulator: ChosenEmulator,
    /// Its other options.
    pub options: &'a MachineOptions,
}

impl Bench<'_> {
    /// Measures every operation on `system`.
    ///
    /// # Errors
    /// When the machine could not be started or did not do all its work.
    pub fn measure(&self, system: System) -> Result<Vec<Measurement>> {
        let name = system.to_string();
        if self.emulator.is_slow() {
            let transcript = self.run(Run::new(system, system.payload(), &name), |_| ())?;
            let mut measurements = measure::operations(&name, &measure::PAYLOAD, &transcript)?;
            measurements.extend(self.minimal(system)?);
            return Ok(measurements);
        }
        let transcript = self.run(Run::new(system, system.demo(), &name), |_| ())?;
        let mut measurements = measure::operations(&name, &measure::PAYLOAD, &transcript)?;
        measurements.extend(measure::boots(&name, &transcript)?);
        for variant in VARIANTS.iter().filter(|variant| variant.systems.contains(&system)) {
            let name = format!("{system}-{}", variant.name);
            let Variant { ept, options, parameters, .. } = *variant;
            let run = Run { ept, options, parameters, ..Run::new(system, system.payload(), &name) };
            let operations = measure::operations(&system.to_string(), &measure::PAYLOAD, &self.run(run, |_| ())?)?;
            let wanted = operations.into_iter().filter(|measured| variant.operations.contains(&&*measured.operation));
            measurements.extend(wanted.map(|measured| measured.renamed(variant.suffix)));
        }
        measurements.extend(self.minimal(system)?);
        Ok(measurements)
    }

    /// Lets the payload time every operation on `system`.
    ///
    /// # Errors
    /// When the machine could not be started or did not do all its work.
    pub fn time(&self, system: System) -> Result<Timings> {
        let (system_name, name) = (system.to_string(), format!("{system}-timed"));
        let shown = Some(Shown { system: &system_name, linger_seconds: 0 });
        let transcript = self.run(Run { shown, ..Run::new(system, system.payload(), &name) }, |_| ())?;
        transcript.timings().cloned().with_context(|| format!("{system}: the payload timed nothing"))
    }

    /// Measures the minimal guest hypervisor.
    fn minimal(&self, system: System) -> Result<Vec<Measurement>> {
        let image = Module::with_args(&self.programs.conformance, "minimal");
        let boot = match system {
            System::Bare => Boot::Multiboot { kernel: image, modules: Vec::new() },
            System::L1hv => {
                Boot::L1hv { host: Module::new(build::l1hv(self.layout, self.progress)?), guest: vec![image] }
            }
            System::Kvm => {
                let kernel = self.provisioned.kernel(self.series)?;
                let plan = Plan::new(kernel, Work::Minimal, KvmEpt::On);
                plan.prepare(self.layout, self.provisioned, self.programs, self.emulator, self.options.ips)?
                    .on_bare_machine()
            }
        };
        let transcript = self.boot(&format!("{system}-minimal"), boot, "", &[], |_| ())?;
        measure::operations(&system.to_string(), &measure::MINIMAL, &transcript)
    }

    /// Runs the payload under l1hv with `options`. `see` gets every line of every stream.
    ///
    /// # Errors
    /// When the machine could not be started or did not do all its work.
    pub fn payload_under_l1hv(
        &self,
        name: &str,
        options: &str,
        ept: KvmEpt,
        see: impl FnMut(&str),
    ) -> Result<Transcript> {
        self.run(Run { ept, options, ..Run::new(System::L1hv, Work::Payload, name) }, see)
    }

    fn run(&self, run: Run<'_>, see: impl FnMut(&str)) -> Result<Transcript> {
        let system = run.system;
        let Run { work, ept, parameters, shown, .. } = run;
        let counted = shown.is_none();
        let plan = Plan { parameters, counted, shown, ..Plan::new(self.provisioned.kernel(self.series)?, work, ept) };
        let guest = plan.prepare(self.layout, self.provisioned, self.programs, self.emulator, self.options.ips)?;
        let boot = match system {
            System::L1hv => guest.under(Module::with_args(build::l1hv(self.layout, self.progress)?, run.options)),
            System::Bare | System::Kvm => guest.on_bare_machine(),
        };
        let parts: &[&str] = if run.work == system.payload() { &["payload"] } else { &["payload", "linux"] };
        self.boot(run.name, boot, system.console_prefix(), parts, see)
    }

    /// Runs a machine, on whose console the lines of the guest hypervisor begin with `prefix`, until `parts` are done.
    fn boot(
        &self,
        name: &str,
        boot: Boot,
        prefix: &str,
        parts: &[&str],
        mut see: impl FnMut(&str),
    ) -> Result<Transcript> {
        let name = format!("bench-{name}");
        let timeout = if self.emulator.is_slow() { SLOW_TIMEOUT } else { TIMEOUT };
        let machine = Machine { timeout, silence: timeout, ..Machine::new(name.as_str(), self.emulator, boot) };
        let machine = self.options.apply(machine);
        let step = self.progress.step(format!("measuring: {}", &name["bench-".len()..]));
        let mut transcript = Transcript::default();
        let outcome = machine.run(self.layout, self.provisioned, |line| {
            see(line.text);
            // Under KVM as nesting hypervisor, the guest hypervisor's console is that of a nested guest.
            let text = line.text.strip_prefix(prefix).filter(|text| text.starts_with(RESULT_PREFIX));
            let line = crate::machine::Line { text: text.unwrap_or(line.text), ..line };
            if let Some(event) = Event::of(line) {
                transcript.add(event);
            }
        })?;
        step.done();
        let is_done = parts.iter().all(|nested| transcript.is_done(nested));
        if outcome != Outcome::GuestShutdown || !is_done || transcript.error().is_some() {
            let what = transcript.error().map_or_else(|| outcome.to_string(), str::to_owned);
            bail!("{name}: {what} (logs: {})", self.layout.root().join("logs").join(&name).display());
        }
        Ok(transcript)
    }
}

/// The measurements as a table for people, the systems of an operation side by side.
pub fn table(measurements: &[Measurement]) -> String {
    let headings: Vec<&str> = ["operation", "guest hypervisor", "system"]
        .into_iter()
        .chain(NUMBERS.iter().map(|number| number.heading))
        .collect();
    let mut operations: Vec<(&str, &str)> = Vec::new();
    for measurement in measurements {
        let key = (measurement.operation.as_str(), measurement.guest_hypervisor.as_str());
        if !operations.contains(&key) {
            operations.push(key);
        }
    }
    let mut table = Table::new(&headings);
    for key in operations {
        let same = |m: &&Measurement| (m.operation.as_str(), m.guest_hypervisor.as_str()) == key;
        for measurement in measurements.iter().filter(same) {
            let numbers = NUMBERS.iter().map(|number| Some((number.of)(measurement)));
            table.row_of(&[key.0, key.1, &measurement.system], numbers);
        }
    }
    table.render()
}
