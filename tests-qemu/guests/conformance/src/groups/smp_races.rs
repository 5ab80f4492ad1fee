//! Races: odd processors edit at random the structures that even ones use to enter and exit. An entry has one of a few
//! outcomes, whichever edits it meets (SDM 25.11.4 "Software Access to Related Structures" allows for any time of
//! access), and every processor continues.
//!
//! ```text
//!   arena     the memory that is edited            controls   bitmaps, MSR areas, VMCS regions
//!   paging    EPT12, the nested guest's tables     apic       virtual-APIC pages, posted-interrupt descriptors
//! ```
//!
//! `seed=NUMBER` makes other edits.

mod apic;
mod arena;
mod controls;
mod paging;

use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use crate::arguments;
use crate::fault::{Outcome, take_interrupt};
use crate::output::Suite;
use crate::random::Random;
use crate::smp::{Meeting, Processors, count, number};
use crate::vm::{Verdict, Vm};

/// Entries of each nested guest in each race.
const ROUNDS: u64 = 1000;

/// A race: even processors use, odd ones edit.
struct Race {
    name: &'static str,
    /// The first processor's part before all others.
    build: fn(),
    /// Whether the processor has the feature of this race.
    exists: fn() -> bool,
    /// Prepares the nested guest.
    prepare: fn(&mut Vm),
    /// One entry, or another action that the race is about.
    step: fn(&mut Vm, &mut Random) -> Verdict,
    /// One edit of a common structure, or of the structure of the user with this number.
    edit: fn(&mut Random, usize),
    /// The allowed outcomes, as [`outcome`] numbers them.
    allowed: &'static [u64],
}

const RACES: &[&[Race]] = &[controls::RACES, paging::RACES, apic::RACES];

/// An exit of the nested guest by VMCALL.
const VMCALL: u64 = 18;
/// An entry, or other VMX instruction, that fails with an error.
const FAILS: u64 = 1 << 40;
/// An entry, or other VMX instruction, that fails without an error number.
const FAILS_INVALID: u64 = 1 << 41;
/// VMPTRLD and VMCLEAR succeed.
const SUCCEEDS: u64 = 1 << 42;

fn outcome(verdict: &Verdict) -> u64 {
    match verdict {
        Verdict::Exited(exit) => exit.reason,
        Verdict::NotEntered(Outcome::FailValid(error)) => FAILS | error,
        Verdict::NotEntered(Outcome::Success) => SUCCEEDS,
        Verdict::NotEntered(_) => FAILS_INVALID,
    }
}

#[unsafe(link_section = ".shared")]
static MEETING: Meeting = Meeting::new();
/// Users that are done.
#[unsafe(link_section = ".shared")]
static DONE: AtomicUsize = AtomicUsize::new(0);

/// Processors that enter.
fn users() -> usize {
    count().div_ceil(2)
}

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    for (index, race) in RACES.iter().copied().flatten().enumerate() {
        if !(race.exists)() {
            continue;
        }
        (race.build)();
        MEETING.clear();
        DONE.store(0, Release);
        let wrong = processors.run_on_all(take_part, index as u64);
        if wrong.iter().all(|&wrong| wrong == 0) {
            suite.case(race.name, format_args!("{} outcomes, all allowed", ROUNDS * users() as u64));
        } else {
            suite.case(race.name, format_args!("wrong: {wrong:x?}"));
        }
        arena::tidy_up();
    }
}

/// Uses or edits. Returns the first outcome that is not allowed, or 0.
fn take_part(index: u64) -> u64 {
    let Some(race) = RACES.iter().copied().flatten().nth(index as usize) else { return 0 };
    let seed = arguments::value("seed=").unwrap_or(1);
    let mut random = Random(seed.wrapping_mul(1000) + index * 100 + number() as u64);
    if number() % 2 == 1 {
        MEETING.join();
        while DONE.load(Acquire) < users() {
            (race.edit)(&mut random, number() / 2);
        }
        return 0;
    }
    let mut vm = Vm::new(crate::code!("nop"));
    (race.prepare)(&mut vm);
    MEETING.join();
    let wrong = (0..ROUNDS).map(|_| outcome(&(race.step)(&mut vm, &mut random))).find(|it| !race.allowed.contains(it));
    DONE.fetch_add(1, AcqRel);
    // The last interrupt is taken after the editors have stopped.
    while DONE.load(Acquire) < users() {
        let _ = take_interrupt();
    }
    crate::smp::settle();
    let _ = take_interrupt();
    wrong.unwrap_or(0)
}

/// Enters at the beginning of a program, with its registers.
fn enter(vm: &mut Vm, code: u64) -> Verdict {
    vm.set_entry_point(code);
    vm.rerun()
}
