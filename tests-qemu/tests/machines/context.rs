//! The tests' shared context: provisioned files, built programs, and one way to run a machine.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Failed;
use tests_qemu::build::{self, GuestPrograms};
use tests_qemu::counters::Counters;
use tests_qemu::guest::{GuestHypervisor, KvmEpt, Plan, Work};
use tests_qemu::layout::Layout;
use tests_qemu::machine::{BOCHS, Boot, DEFAULT_IPS, Machine, Module, Outcome, Source};
use tests_qemu::progress::Progress;
use tests_qemu::provision::{self, Provisioned};
use tests_qemu::transcript::{Event, Transcript};

/// Limit on one machine; the longest takes a quarter of it.
const TIMEOUT: Duration = Duration::from_secs(240);

/// A test: its name is a sentence and names the log directory.
#[derive(Clone, Copy)]
pub struct Test {
    pub name: &'static str,
    pub run: fn(&Context, &str) -> Result<()>,
}

/// Provisioned files and built programs.
pub struct Context {
    pub layout: Layout,
    pub provisioned: Provisioned,
    pub programs: GuestPrograms,
    pub l1hv: PathBuf,
}

/// Runs the demo on a machine with `cpus` processors. Returns its lines of progress.
pub fn demo(machine: &str, cpus: u32) -> Result<String> {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tests-qemu"));
    let output = command.args(["demo", "--machine", machine, "--cpus", &cpus.to_string()]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{}:\n{said}", output.status);
    Ok(said)
}

impl Context {
    /// The one context of this process; the first caller makes it.
    pub fn shared() -> Result<&'static Self, Failed> {
        static SHARED: OnceLock<Result<Context, String>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| Self::make().map_err(|error| format!("{error:#}")));
        shared.as_ref().map_err(Failed::from)
    }

    fn make() -> Result<Self> {
        let layout = Layout::find()?;
        let progress = Progress::stderr();
        Ok(Self {
            provisioned: provision::provision(&layout, &progress)?,
            programs: build::guest_programs(&layout, &progress)?,
            l1hv: build::l1hv(&layout, &progress)?,
            layout,
        })
    }

    /// l1hv with these arguments.
    pub fn host(&self, arguments: &str) -> Module {
        Module::with_args(&self.l1hv, arguments)
    }

    /// Debian's kernel as guest hypervisor.
    pub fn guest_hypervisor(&self, series: &str, work: Work, ept: KvmEpt) -> Result<GuestHypervisor> {
        self.prepare(&Plan::new(self.provisioned.kernel(series)?, work, ept))
    }

    /// The guest hypervisor of `plan`.
    pub fn prepare(&self, plan: &Plan<'_>) -> Result<GuestHypervisor> {
        plan.prepare(&self.layout, &self.provisioned, &self.programs, BOCHS, DEFAULT_IPS)
    }

    /// Bochs, booting `boot`.
    pub fn bochs(&self, name: &str, boot: Boot) -> Machine {
        Machine { timeout: TIMEOUT, ..Machine::new(name, BOCHS, boot) }
    }

    /// Runs `machine` to its end.
    pub fn run(&self, machine: &Machine) -> Result<Finished> {
        let mut finished = Finished {
            outcome: Outcome::Timeout,
            transcript: Transcript::default(),
            console: Vec::new(),
            debug: Vec::new(),
            logs: self.layout.root().join("logs").join(&machine.name),
        };
        finished.outcome = machine.run(&self.layout, &self.provisioned, |line| {
            if let Some(event) = Event::of(line) {
                finished.transcript.add(event);
            }
            match line.source {
                Source::Console => finished.console.push(line.text.to_owned()),
                Source::Debug => finished.debug.push(line.text.to_owned()),
            }
        })?;
        Ok(finished)
    }
}

/// A machine that has ended, and all its output.
pub struct Finished {
    pub outcome: Outcome,
    pub transcript: Transcript,
    pub console: Vec<String>,
    pub debug: Vec<String>,
    logs: PathBuf,
}

impl Finished {
    /// Fails unless the guest switched the machine off.
    pub fn must_shut_down(&self) -> Result<()> {
        match self.outcome {
            Outcome::GuestShutdown => Ok(()),
            _ => bail!("{}\n{}", self.outcome, self.last_words()),
        }
    }

    /// Fails unless l1hv stopped for the reason `kind` with a message that contains `message`.
    pub fn must_stop(&self, kind: &str, message: &str) -> Result<()> {
        let Outcome::HostStop(stop) = &self.outcome else {
            bail!("expected l1hv to stop ({kind}): {}\n{}", self.outcome, self.last_words());
        };
        ensure!(stop.kind == kind, "expected l1hv to stop ({kind}): {}", self.outcome);
        ensure!(stop.message.contains(message), "\"{}\" does not say \"{message}\"", stop.message);
        Ok(())
    }

    /// Fails unless the guest hypervisor's work and that of all `nested` guests is done.
    pub fn must_have_done(&self, nested: &[&str]) -> Result<()> {
        self.must_shut_down()?;
        self.must_have_worked(nested)
    }

    /// As [`Self::must_have_done`], however the machine has ended.
    pub fn must_have_worked(&self, nested: &[&str]) -> Result<()> {
        if let Some(error) = self.transcript.error() {
            bail!("{error}\n{}", self.last_words());
        }
        for name in nested {
            ensure!(self.transcript.is_done(name), "{name} is not done\n{}", self.last_words());
        }
        ensure!(self.transcript.exited_well(), "the init's work failed\n{}", self.last_words());
        Ok(())
    }

    /// Fails unless a line of the console contains `text`.
    pub fn console_must_say(&self, text: &str) -> Result<()> {
        let says = self.console.iter().any(|line| line.contains(text));
        ensure!(says, "the console never says \"{text}\"\n{}", self.last_words());
        Ok(())
    }

    /// Fails unless a line of the debug stream contains `text`.
    pub fn debug_must_say(&self, text: &str) -> Result<()> {
        let says = self.debug.iter().any(|line| line.contains(text));
        ensure!(says, "the debug stream never says \"{text}\"\n{}", self.last_words());
        Ok(())
    }

    /// The emulator's counters at the mark called `name`.
    pub fn counters_at(&self, name: &str) -> Result<&Counters> {
        self.transcript.counters_at(name).with_context(|| format!("no counters at {name}\n{}", self.last_words()))
    }

    fn last_words(&self) -> String {
        let mut text = format!("logs: {}\n", self.logs.display());
        for (name, lines) in [("console", &self.console), ("debug", &self.debug)] {
            for line in &lines[lines.len().saturating_sub(8)..] {
                // Formatting into a string cannot fail.
                let _ = writeln!(text, "  {name}: {line}");
            }
        }
        text
    }
}
