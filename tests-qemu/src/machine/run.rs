//! The loop around a running emulator.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::emulator::Stream;
use super::files::ERRORS;
use super::streams::Follower;
use super::{Machine, Outcome};
use crate::protocol::HostStop;

/// How often the logs are read.
const POLL: Duration = Duration::from_millis(10);

/// How long an emulator may live on after l1hv's last line.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// The source of a line.
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

/// The meaning of l1hv's last line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostStops {
    /// It ends the run.
    EndTheRun,
    /// It is a line like others: other machines follow.
    AreLines,
}

/// A child that is killed when it goes out of scope.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Each call fails only if the child has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `command` and follows it to its end.
pub fn run(
    machine: &Machine,
    stops: HostStops,
    mut command: Command,
    logs: &Path,
    on_line: impl FnMut(Line<'_>),
) -> Result<Outcome> {
    let emulator = machine.emulator;
    command.stdout(File::create(logs.join(emulator.stdout()))?).stderr(File::create(logs.join(ERRORS))?);
    let program = command.get_program().to_owned();
    let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
    let mut follow = Follow::new(logs, emulator.streams(), stops, on_line);
    let outcome = follow.until_the_end(machine, &mut Guard(child))?;
    Ok(match outcome {
        Ending::Exited(status) => emulator.outcome(logs, status),
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

/// The streams of a running machine.
struct Follow<F> {
    /// The streams, each with its remaining banner lines.
    streams: Vec<(Stream, Follower)>,
    on_line: F,
    began: Instant,
    last_line: Instant,
    stops: HostStops,
    stop: Option<HostStop>,
}

impl<F: FnMut(Line<'_>)> Follow<F> {
    fn new(logs: &Path, streams: &[Stream], stops: HostStops, on_line: F) -> Self {
        let now = Instant::now();
        Self {
            streams: streams.iter().map(|stream| (*stream, Follower::new(logs.join(stream.file)))).collect(),
            on_line,
            began: now,
            last_line: now,
            stops,
            stop: None,
        }
    }

    fn until_the_end(&mut self, machine: &Machine, child: &mut Guard) -> Result<Ending> {
        loop {
            // The status is read first, so that all output before the end is read in the same turn.
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
            for text in self.streams[index].1.lines() {
                self.report(index, &text);
            }
        }
    }

    fn flush(&mut self) {
        for index in 0..self.streams.len() {
            if let Some(text) = self.streams[index].1.unfinished() {
                self.report(index, &text);
            }
        }
    }

    fn report(&mut self, index: usize, text: &str) {
        self.last_line = Instant::now();
        let stream = &mut self.streams[index].0;
        let source = stream.source;
        if stream.banner_lines > 0 {
            stream.banner_lines -= 1;
            return;
        }
        // Only l1hv writes this prefix to the debug stream; the console belongs to the guest, which may write anything.
        if source == Source::Debug && self.stop.is_none() && self.stops == HostStops::EndTheRun {
            self.stop = HostStop::parse(text);
        }
        (self.on_line)(Line { source, text, at: self.began.elapsed() });
    }
}
