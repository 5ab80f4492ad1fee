//! With the argument `fuzz` the image executes random programs of a guest hypervisor, close to the border of what VM
//! entry accepts, on the bare machine and under l1hv. Programs are numbered: the seed and the number make the program.
//!
//! ```text
//!   fuzz seed=N first=NUMBER count=NUMBER batch=NUMBER [steps=MASK,MASK,... verbose]
//!
//!   F-CAPABILITIES DIGEST
//!   F NUMBER DIGEST failed=ERROR:COUNT,... exits=REASON:COUNT,...
//!   F-END
//! ```
//!
//! A line is about the programs up to NUMBER, since the last line. With `steps`, the first program runs once for each
//! mask, which names the steps that are not left out, and each time is a line. With `verbose` each step and each
//! observation is a line.
//!
//! ```text
//!   generate   a program from its number       modes, mutation, rounding   a VMCS that should enter, or should not
//!   execute    its steps                       observe                     what it sees
//!   fresh      the state before each program   snippets, tables, areas     what nested guests use
//!   hostile    programs that nothing holds back, and a processor that scribbles on the others' structures
//! ```

mod areas;
mod execute;
mod fresh;
mod generate;
mod hostile;
mod modes;
mod mutation;
mod observe;
mod program;
mod rounding;
mod snippets;
mod state;
mod tables;

use core::fmt;

use shadow::fields::APIC_ACCESS_ADDRESS;

use crate::arguments;
use crate::memory::VMCS;
use crate::output::{power_off, print};
use crate::vm::Vm;

use execute::{Course, Run};
use fresh::Fresh;
use generate::Generator;
use observe::{Counts, Observer};
use program::Step;
use state::State;

/// The argument.
pub const WORD: &str = "fuzz";

/// What the arguments ask for.
#[derive(Default)]
struct Job {
    seed: u64,
    first: u64,
    count: u64,
    batch: u64,
}

/// Runs the programs.
pub fn run() -> ! {
    let number = |name, default| arguments::value(name).unwrap_or(default);
    let job = Job {
        seed: number("seed=", 0),
        first: number("first=", 0),
        count: number("count=", 1),
        batch: number("batch=", 1),
    };
    if arguments::words().any(|word| word == "hostile") {
        hostile::run(&job);
    }
    let mut fuzzer = Fuzzer::new(&job, false);
    let masks = arguments::word("steps=");
    let end = job.first.saturating_add(job.count);
    for program in job.first..end {
        let Some(masks) = masks else {
            fuzzer.run(program, u64::MAX);
            if (program + 1 - job.first).is_multiple_of(job.batch) || program + 1 == end {
                fuzzer.report(program);
            }
            continue;
        };
        for mask in masks.split(',').filter_map(|mask| u64::from_str_radix(mask, 16).ok()) {
            fuzzer.run(program, mask);
            fuzzer.report(program);
        }
    }
    print(format_args!("F-END"));
    power_off()
}

struct Fuzzer {
    generator: Generator,
    fresh: Fresh,
    observer: Observer,
    counts: Counts,
}

impl Fuzzer {
    fn new(job: &Job, is_hostile: bool) -> Self {
        fresh::begin();
        let caps = state::capabilities();
        let _ = Vm::at(&VMCS, modes::Mode::Long.rip(0));
        let mut base = State::of_current_vmcs(&caps.fields());
        base.set(APIC_ACCESS_ADDRESS, areas::apic_access_page());
        let fresh = Fresh::new();
        let observer = Observer::new(&caps, arguments::words().any(|word| word == "verbose"));
        let generator = Generator { caps, base, seed: job.seed, is_hostile };
        Self { generator, fresh, observer, counts: Counts::new() }
    }

    fn run(&mut self, number: u64, mask: u64) {
        let Self { generator, fresh, observer, counts } = self;
        fresh::begin();
        let (program, start) = generator.program(number);
        execute::second(number, &start);
        let repaired = generator.is_hostile.then_some(&generator.base);
        let course = Run::begin(&program, &start, observer, (counts, repaired)).steps(mask);
        observer.step(program.steps().len(), "end");
        let edits = |step: &Step| matches!(step, Step::MsrBit(_) | Step::PortBit(_));
        let has_edited = generator.is_hostile || program.steps().iter().any(edits);
        fresh.end_of_program(observer, course == Course::GoesOn, has_edited);
    }

    fn report(&mut self, number: u64) {
        let Counts { failed, exits } = &self.counts;
        let (failed, exits) = (List(failed), List(exits));
        print(format_args!("F {number} {:016x} failed={failed} exits={exits}", self.observer.digest()));
        self.observer.restart();
        self.counts = Counts::new();
    }
}

/// Counts that are not 0, each with its number.
struct List<'a>(&'a [u32]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, count) in self.0.iter().enumerate().filter(|(_, count)| **count > 0) {
            write!(f, "{number}:{count},")?;
        }
        Ok(())
    }
}
