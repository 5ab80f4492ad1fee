//! `cargo demo`: shows every level coming up, and the cost of its exits.

use std::time::Duration;

use anyhow::Result;
use guest_abi::NESTED_INIT;

use crate::build::{self, GuestPrograms};
use crate::guest::{KvmEpt, Plan, Work};
use crate::layout::Layout;
use crate::machine::{ChosenEmulator, DEFAULT_IPS, Line, Machine, MachineOptions, Module, Outcome, Source};
use crate::parallel::{Level, Parallel, Results};
use crate::progress::{Progress, Step};
use crate::provision::{self, Provisioned};
use crate::report;
use crate::side_by_side;
use crate::transcript::{Event, GuestResult, Transcript};

/// Processors of the nested Linux, if the machine has several.
const NESTED_CPUS: u32 = 2;

/// Longest run of one machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Longest run of one slow machine, beside others.
const SLOW_TIMEOUT: Duration = Duration::from_secs(1800);

/// The settings of the demo.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The machine.
    pub emulator: ChosenEmulator,
    /// Its other options.
    pub options: MachineOptions,
    /// Debian kernel series of the guest hypervisor and of the nested guest.
    pub series: String,
    /// Whether l1hv runs below KVM. Without it, KVM is the only hypervisor.
    pub host: Host,
}

/// What runs on the machine itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// l1hv.
    L1hv,
    /// The guest hypervisor.
    Bare,
}

/// A finished run of the guest hypervisor.
#[derive(Debug)]
pub struct Run {
    /// With or without EPT.
    pub ept: KvmEpt,
    /// The machine's processors.
    pub cpus: u32,
    /// How the machine ended.
    pub outcome: Outcome,
    /// The machine's output.
    pub transcript: Transcript,
}

impl Run {
    /// The failure of the run, if it failed.
    pub fn failure(&self) -> Option<String> {
        if self.outcome != Outcome::GuestShutdown {
            return Some(self.outcome.to_string());
        }
        if let Some(message) = self.transcript.error() {
            return Some(message.to_owned());
        }
        for nested in ["payload", "linux"] {
            if !self.transcript.is_done(nested) {
                return Some(format!("the nested guest \"{nested}\" did not finish"));
            }
        }
        if self.cpus > 1 {
            let expected = [(Level::GuestHypervisor, self.cpus), (Level::NestedGuest, NESTED_CPUS)];
            if let Some(failure) = Parallel::failure(&self.transcript.parallel, expected) {
                return Some(failure);
            }
        }
        (!self.transcript.exited_well()).then(|| "the guest hypervisor's work failed".to_owned())
    }
}

/// Provisions, builds, runs; prints the tables. Returns the exit status: 0 if all work was done.
pub fn run(settings: &Settings, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let host = match settings.host {
        Host::L1hv => Some(Module::with_args(build::l1hv(layout, progress)?, "stats")),
        Host::Bare => None,
    };
    let demo = Demo { settings, layout, progress, provisioned: &provisioned, programs: &programs, host };
    let both = [KvmEpt::On, KvmEpt::Off];
    let runs: Vec<Result<Run>> = if settings.emulator.counts_instructions() {
        // The machines do not affect each other's counts.
        side_by_side::map(both.into(), |ept| demo.run(ept))
    } else {
        both.map(|ept| demo.run(ept)).into()
    };
    let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
    print!("{}", report::demo(&runs));
    let mut status = 0;
    for run in &runs {
        if let Some(failure) = run.failure() {
            eprintln!("error: {}: {failure}", run.ept);
            status = run.outcome.status().max(1);
        }
    }
    Ok(status)
}

struct Demo<'a> {
    settings: &'a Settings,
    layout: &'a Layout,
    progress: &'a Progress,
    provisioned: &'a Provisioned,
    programs: &'a GuestPrograms,
    host: Option<Module>,
}

impl Demo<'_> {
    fn run(&self, ept: KvmEpt) -> Result<Run> {
        let emulator = self.settings.emulator;
        let options = &self.settings.options;
        let plan = Plan {
            nested_cpus: if options.cpus > 1 { NESTED_CPUS } else { 1 },
            ..Plan::new(self.provisioned.kernel(&self.settings.series)?, Work::Demo, ept)
        };
        let guest = plan.prepare(self.layout, self.provisioned, self.programs, emulator, DEFAULT_IPS)?;
        let boot = match &self.host {
            Some(host) => guest.under(host.clone()),
            None => guest.on_bare_machine(),
        };
        let paging = match ept {
            KvmEpt::On => "ept",
            KvmEpt::Off => "no-ept",
        };
        let name = format!("demo-{}-{paging}", options.cpus);
        // The payload prints nothing until it has measured.
        let timeout = if emulator.is_slow() { SLOW_TIMEOUT } else { TIMEOUT };
        let machine = Machine { timeout, silence: timeout, ..Machine::new(name, emulator, boot) };
        let machine = options.apply(machine);
        let step = self.progress.step(format!("machine: {emulator}, guest hypervisor's KVM with {ept}"));
        step.detail("firmware and boot loader");
        let mut transcript = Transcript::default();
        let mut levels = Levels::new(&step, ept);
        let outcome = machine.run(self.layout, self.provisioned, |line| {
            levels.show(line);
            if let Some(event) = Event::of(line) {
                levels.show_event(&event, line.at);
                transcript.add(event);
            }
        })?;
        step.done();
        Ok(Run { ept, cpus: options.cpus, outcome, transcript })
    }
}

/// Shows the levels as they come up.
struct Levels<'a> {
    step: &'a Step,
    ept: KvmEpt,
    host_seen: bool,
}

impl<'a> Levels<'a> {
    fn new(step: &'a Step, ept: KvmEpt) -> Self {
        Self { step, ept, host_seen: false }
    }

    fn say(&self, level: &str, what: &str, at: Duration) {
        let seconds = at.as_secs_f64();
        self.step.line(&format!("    {}  {seconds:>6.1} s  {level:<18}  {what}", self.ept));
    }

    fn show(&mut self, line: Line<'_>) {
        let is_host = line.source == Source::Debug && line.text.starts_with("[l1hv");
        if is_host && !self.host_seen {
            self.host_seen = true;
            self.say("l1hv", "is up", line.at);
            self.step.detail("l1hv boots the guest hypervisor");
        }
        if let Some((_, greeting)) = line.text.split_once(NESTED_INIT) {
            self.say("nested guest", &format!("init runs:{greeting}"), line.at);
        }
    }

    fn show_event(&self, event: &Event, at: Duration) {
        match event {
            Event::Mark(mark) => {
                let (level, what, next) = match mark.name.as_str() {
                    "init" => ("guest hypervisor", "init runs", "loading KVM"),
                    "kvm-loaded" => ("guest hypervisor", "KVM is loaded", "starting a nested guest"),
                    "payload-begin" => ("nested guest", "the payload begins", "the payload exits"),
                    "nested-begin" => ("nested guest", "Linux begins", "Linux boots as nested guest"),
                    _ => return,
                };
                self.say(level, what, at);
                self.step.detail(next);
            }
            Event::Result(GuestResult::Payload(operation)) => {
                let what = format!("{:>5} x {}", operation.right, operation.name);
                self.say("nested guest", &what, at);
            }
            Event::Result(GuestResult::Error { message }) => self.say("guest hypervisor", message, at),
            Event::Result(GuestResult::Exit { .. }) => self.say("guest hypervisor", "switches the machine off", at),
            Event::Parallel(Parallel { level, results }) => {
                let Results { cpus, sum, locked, hops } = results;
                let what =
                    format!("{cpus} processors: sum {sum}, a lock taken {locked} times, a token passed {hops} times");
                self.say(&level.to_string(), &what, at);
            }
            Event::Result(_) | Event::NestedClock(_) | Event::HostStats(_) | Event::Count(_) => {}
        }
    }
}
