//! The loop around a running emulator.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::streams::Follower;
use super::{Emulator, Machine, Outcome, bochs, qemu};
use crate::command::which;
use crate::protocol::{self, HostStop};

/// Log file of the guest's console.
pub const CONSOLE: &str = "console.log";
/// Log file of the debug port.
pub const DEBUG: &str = "debug.log";
/// Log file of the emulator's own complaints.
pub const ERRORS: &str = "emulator.err";

/// How often the logs are read.
const POLL: Duration = Duration::from_millis(10);

/// How long an emulator may live on after l1hv's last line.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// Where a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// COM1, the guest's console.
    Console,
    /// Port 0xe9: l1hv's log and fast markers.
    Debug,
}

/// A line that the machine wrote.
#[derive(Debug, Clone, Copy)]
pub struct Line<'a> {
    /// The stream.
    pub source: Source,
    /// The text, without its newline.
    pub text: &'a str,
    /// Time since the machine was started.
    pub at: Duration,
}

/// `program`, killed when this process dies however it dies.
pub fn supervised(program: &Path) -> Command {
    match which("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// A child that is killed when it goes out of scope.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Either fails only when the child is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `command` and follows it to its end.
pub fn run(machine: &Machine, mut command: Command, logs: &Path, on_line: impl FnMut(Line<'_>)) -> Result<Outcome> {
    command.stdin(Stdio::null()).stderr(File::create(logs.join(ERRORS))?).stdout(match machine.emulator {
        Emulator::Bochs => Stdio::from(File::create(logs.join(DEBUG))?),
        Emulator::QemuKvm | Emulator::QemuTcg => Stdio::null(),
    });
    let program = command.get_program().to_owned();
    let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let banner_lines = match machine.emulator {
        Emulator::Bochs => bochs::BANNER_LINES,
        Emulator::QemuKvm | Emulator::QemuTcg => 0,
    };
    let mut follow = Follow::new(logs, banner_lines, on_line);
    let outcome = follow.until_the_end(machine, &mut Guard(child))?;
    Ok(match outcome {
        Ending::Exited(status) => match machine.emulator {
            Emulator::Bochs => bochs::outcome(logs),
            Emulator::QemuKvm | Emulator::QemuTcg => qemu::outcome(logs, status),
        },
        Ending::Stopped(stop) => Outcome::HostStop(stop),
        Ending::Timeout => Outcome::Timeout,
        Ending::Silence => Outcome::Silence,
    })
}

enum Ending {
    Exited(ExitStatus),
    Stopped(HostStop),
    Timeout,
    Silence,
}

/// Both streams of a running machine.
struct Follow<F> {
    streams: [(Source, Follower); 2],
    on_line: F,
    /// Lines of the debug stream that are the emulator's own greeting.
    banner_lines: usize,
    began: Instant,
    last_line: Instant,
    stop: Option<HostStop>,
}

impl<F: FnMut(Line<'_>)> Follow<F> {
    fn new(logs: &Path, banner_lines: usize, on_line: F) -> Self {
        let now = Instant::now();
        Self {
            streams: [
                (Source::Console, Follower::new(logs.join(CONSOLE))),
                (Source::Debug, Follower::new(logs.join(DEBUG))),
            ],
            on_line,
            banner_lines,
            began: now,
            last_line: now,
            stop: None,
        }
    }

    fn until_the_end(&mut self, machine: &Machine, child: &mut Guard) -> Result<Ending> {
        loop {
            // The status first: what was written before the end is then read in this very turn.
            let status = child.0.try_wait()?;
            self.read();
            if status.is_some() {
                self.flush();
            }
            match (self.stop.take(), status) {
                (Some(stop), Some(_)) => return Ok(Ending::Stopped(stop)),
                (Some(stop), None) if self.last_line.elapsed() > STOP_GRACE => return Ok(Ending::Stopped(stop)),
                (None, Some(status)) => return Ok(Ending::Exited(status)),
                (stop, None) => self.stop = stop,
            }
            if self.began.elapsed() > machine.timeout {
                return Ok(Ending::Timeout);
            }
            if self.last_line.elapsed() > machine.silence {
                return Ok(Ending::Silence);
            }
            thread::sleep(POLL);
        }
    }

    fn read(&mut self) {
        for index in 0..self.streams.len() {
            let source = self.streams[index].0;
            for text in self.streams[index].1.lines() {
                self.report(source, &text);
            }
        }
    }

    fn flush(&mut self) {
        for index in 0..self.streams.len() {
            if let Some(text) = self.streams[index].1.unfinished() {
                self.report(self.streams[index].0, &text);
            }
        }
    }

    fn report(&mut self, source: Source, text: &str) {
        self.last_line = Instant::now();
        if source == Source::Debug && self.banner_lines > 0 {
            self.banner_lines -= 1;
            return;
        }
        // Only l1hv writes here with this prefix; the console belongs to the guest, which may lie.
        if source == Source::Debug && self.stop.is_none() {
            self.stop = protocol::parse_stop(text);
        }
        (self.on_line)(Line { source, text, at: self.began.elapsed() });
    }
}
