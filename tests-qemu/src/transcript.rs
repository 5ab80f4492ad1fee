//! The parsed output of a run: marks, results, and l1hv's statistics.

use std::collections::BTreeMap;

use guest_abi::{MARK_PREFIX, RESULT_PREFIX};
use protocol::statistics::{self, Row};
use serde::{Deserialize, Serialize};

use crate::counters::{CountMark, Counters};
use crate::machine::{Line, Source};
use crate::parallel::{Clock, Parallel};

/// A result line of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum GuestResult {
    /// One operation of the bare-metal payload.
    Payload(Operation),
    /// All operations of the payload, with their system and processor.
    Timings(Timings),
    /// Linux as nested guest has reached its init.
    Linux {
        /// TSC ticks from its first entry.
        ticks_to_init: u64,
    },
    /// KVM's own counters of a nested guest that has ended.
    KvmStats {
        /// Which nested guest.
        of: String,
        /// Counters that are not zero.
        counters: BTreeMap<String, u64>,
    },
    /// The guest hypervisor's clocks when a nested guest printed its own.
    Clock(Clock),
    /// A nested guest has done all its work, with right results.
    Done {
        /// Which nested guest.
        of: String,
    },
    /// The work failed.
    Error {
        /// The error.
        message: String,
    },
    /// The init of the guest hypervisor is about to switch the machine off.
    Exit {
        /// Status of its work.
        status: i32,
    },
}

/// The times of nested exits on one system, in TSC ticks that the nested guest has read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// `bare`, `l1hv` or `kvm`: the lowest hypervisor.
    pub system: String,
    /// The hypervisor that runs the nested guest.
    pub guest_hypervisor: String,
    /// The processor.
    pub processor: Processor,
    /// The operations.
    pub operations: Vec<Operation>,
}

/// A processor, as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// CPUID's brand string.
    pub name: String,
    /// Ticks of the TSC in a millisecond, as the guest hypervisor knows them: from CPUID, or by its own calibration.
    pub tsc_khz: u64,
    /// Signature of the hypervisor that CPUID shows to the lowest Linux; l1hv shows none.
    pub hypervisor: Option<String>,
    /// Whether the TSC counts instructions: then the ticks mean nothing for silicon.
    pub is_emulated: bool,
    /// The ticks of reading the TSC twice, which the operations' ticks include.
    pub ticks_of_nothing: u64,
}

/// An operation of the payload and its cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Name, as in performance.md.
    #[serde(rename = "operation")]
    pub name: String,
    /// How often it was done.
    pub repeats: u64,
    /// How often the answer was right.
    pub right: u64,
    /// TSC ticks of the quickest one.
    pub minimum: u64,
    /// The 1st percentile.
    pub percentile_1: u64,
    /// The median of the TSC ticks.
    pub median: u64,
    /// The 99th percentile.
    pub percentile_99: u64,
}

/// Exits of one reason, counted by l1hv.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitCount {
    /// The basic exit reason's name, or `total`.
    pub reason: String,
    /// Exits of the guest hypervisor.
    pub guest_hypervisor: u64,
    /// Exits of the nested guest.
    pub nested: u64,
    /// Exits of the nested guest that were reflected to the guest hypervisor.
    pub reflected: u64,
}

/// A reached point, with the TSC at that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Name of the point.
    pub name: String,
    /// The time-stamp counter.
    pub tsc: u64,
}

/// A line with a meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A reached point.
    Mark(Mark),
    /// A guest's result.
    Result(GuestResult),
    /// A line of l1hv's statistics.
    HostStats(ExitCount),
    /// Counters of the emulator.
    Count(CountMark),
    /// A run of the parallel workload.
    Parallel(Parallel),
    /// The clocks of a nested guest.
    NestedClock(Clock),
}

impl Event {
    /// The meaning of `line`, if it has one.
    pub fn of(line: Line<'_>) -> Option<Self> {
        match line.source {
            Source::Debug => match line.text.strip_prefix(statistics::LINE_PREFIX) {
                Some(row) => Row::parse(row).map(ExitCount::from).map(Self::HostStats),
                None => CountMark::parse(line.text).map(Self::Count),
            },
            Source::Console => {
                if let Some(json) = line.text.strip_prefix(RESULT_PREFIX) {
                    return serde_json::from_str(json).ok().map(Self::Result);
                }
                if let Some(parallel) = Parallel::of(line.text) {
                    return Some(Self::Parallel(parallel));
                }
                if let Some(clock) = Clock::of_nested_guest(line.text) {
                    return Some(Self::NestedClock(clock));
                }
                let (name, tsc) = line.text.strip_prefix(MARK_PREFIX)?.split_once(" tsc=")?;
                let (name, tsc) = (name.to_owned(), tsc.trim().parse().ok()?);
                Some(Self::Mark(Mark { name, tsc }))
            }
        }
    }
}

impl From<Row<'_>> for ExitCount {
    fn from(Row { reason, guest_hypervisor, nested, reflected }: Row<'_>) -> Self {
        Self { reason: reason.to_owned(), guest_hypervisor, nested, reflected }
    }
}

/// All lines of a run that have a meaning.
#[derive(Debug, Clone, Default)]
pub struct Transcript {
    /// Reached points, in order.
    pub marks: Vec<Mark>,
    /// Results, in order.
    pub results: Vec<GuestResult>,
    /// l1hv's last statistics, without the total.
    pub host_stats: Vec<ExitCount>,
    /// The total of these.
    pub host_total: Option<ExitCount>,
    /// The emulator's counters, in the order of the marks.
    pub counts: Vec<CountMark>,
    /// Runs of the parallel workload, in order.
    pub parallel: Vec<Parallel>,
    /// The clocks of nested guests, in order.
    pub nested_clocks: Vec<Clock>,
}

impl Transcript {
    /// Keeps `event`.
    pub fn add(&mut self, event: Event) {
        match event {
            Event::Mark(mark) => self.marks.push(mark),
            Event::Result(result) => self.results.push(result),
            Event::Count(mark) => self.counts.push(mark),
            Event::Parallel(parallel) => self.parallel.push(parallel),
            Event::NestedClock(clock) => self.nested_clocks.push(clock),
            Event::HostStats(count) => {
                // A table ends with its total: a line after a total belongs to the next table.
                if self.host_total.take().is_some() {
                    self.host_stats.clear();
                }
                if count.reason == statistics::TOTAL {
                    self.host_total = Some(count);
                } else {
                    self.host_stats.push(count);
                }
            }
        }
    }

    /// Whether the nested guest called `name` did all its work.
    pub fn is_done(&self, name: &str) -> bool {
        self.results.iter().any(|result| matches!(result, GuestResult::Done { of } if of == name))
    }

    /// Whether the guest hypervisor's work ended without an error.
    pub fn exited_well(&self) -> bool {
        self.results.contains(&GuestResult::Exit { status: 0 })
    }

    /// The first error that a guest reported.
    pub fn error(&self) -> Option<&str> {
        self.results.iter().find_map(|result| match result {
            GuestResult::Error { message } => Some(message.as_str()),
            _ => None,
        })
    }

    /// The payload's operations.
    pub fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.results.iter().filter_map(|result| match result {
            GuestResult::Payload(operation) => Some(operation),
            _ => None,
        })
    }

    /// The payload's operations with their processor.
    pub fn timings(&self) -> Option<&Timings> {
        self.results.iter().find_map(|result| match result {
            GuestResult::Timings(timings) => Some(timings),
            _ => None,
        })
    }

    /// The counters of KVM in the guest hypervisor for the nested guest called `name`.
    pub fn kvm_counters(&self, name: &str) -> Option<&BTreeMap<String, u64>> {
        self.results.iter().find_map(|result| match result {
            GuestResult::KvmStats { of, counters } if of == name => Some(counters),
            _ => None,
        })
    }

    /// The emulator's counters at the first mark called `name`.
    pub fn counters_at(&self, name: &str) -> Option<&Counters> {
        Some(&self.counts.iter().find(|mark| mark.name == name)?.counters)
    }

    /// The TSC at the point called `name`.
    pub fn tsc_at(&self, name: &str) -> Option<u64> {
        Some(self.marks.iter().find(|mark| mark.name == name)?.tsc)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn event(source: Source, text: &str) -> Option<Event> {
        let at = Duration::ZERO;
        Event::of(Line { source, text, at })
    }

    #[test]
    fn a_result_is_believed_only_on_the_guests_console() {
        let line = r#"L1HV-RESULT {"kind":"done","of":"payload"}"#;
        let done = GuestResult::Done { of: "payload".into() };
        assert_eq!(event(Source::Console, line), Some(Event::Result(done)));
        assert_eq!(event(Source::Debug, line), None);
    }

    #[test]
    fn a_mark_carries_the_tsc() {
        let mark = Mark { name: "init".into(), tsc: 12 };
        assert_eq!(event(Source::Console, "L1HV-MARK init tsc=12"), Some(Event::Mark(mark)));
    }

    #[test]
    fn the_last_table_of_statistics_counts() {
        let mut transcript = Transcript::default();
        for line in
            ["reason guest-hypervisor nested reflected", "CPUID 1 2 3", "total 1 2 3", "CPUID 7 8 9", "total 7 8 9"]
        {
            if let Some(event) = event(Source::Debug, &format!("{}{line}", statistics::LINE_PREFIX)) {
                transcript.add(event);
            }
        }
        assert_eq!(transcript.host_stats.len(), 1);
        assert_eq!(transcript.host_stats[0].guest_hypervisor, 7);
        assert_eq!(transcript.host_total.unwrap().reflected, 9);
    }
}
