//! A parallel workload: a thread pinned to each processor, which
//!
//! ```text
//!   fills memory, chunk by chunk, and adds up what another may have filled    shared memory, atomics
//!   takes a lock, waits for all others, and again                             futexes: sleeps and wake-ups
//!   passes a token on to the next processor, round and round                  pipes: a wake-up across processors each
//! ```
//!
//! `parallel [TIMES]` does all this TIMES times, prints one line of [`Results`], and fails unless they were right each
//! time. Before and after that it prints the clocks ([`CLOCK_PREFIX`](guest_abi::CLOCK_PREFIX)). CLOCK_MONOTONIC must
//! never go back on any processor.

mod clocks;

use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use guest_abi::parallel::{FACTOR, LAPS, PREFIX, ROUNDS, Results, WORDS};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use clocks::Clocks;

/// Words that a thread takes at a time.
const CHUNK: u64 = 256;

fn main() -> ExitCode {
    match run() {
        Ok(results) => {
            println!("{PREFIX}{results}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("parallel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Results> {
    let times: u64 = std::env::args().nth(1).map_or(Ok(1), |times| times.parse()).context("usage: parallel [TIMES]")?;
    let cpus = processors()?;
    let clocks = Clocks::new();
    clocks.print();
    let mut results = Results::of(0);
    for _ in 0..times {
        results = together(&cpus)?;
        ensure!(results.are_right(), "{results}, but right is {}", Results::of(results.cpus));
    }
    clocks.print();
    Ok(results)
}

/// The numbers of the processors that are online.
fn processors() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None).context("sched_getaffinity")?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// The state that the threads of one run share.
struct Shared {
    words: Vec<AtomicU64>,
    /// The first word that no thread has taken yet, for the pass that fills words and for the pass that adds them.
    next: [AtomicU64; 2],
    sum: AtomicU64,
    locked: Mutex<Locked>,
    barrier: Barrier,
}

/// The data that the lock protects.
struct Locked {
    count: u64,
    /// The time at which any processor took the lock last.
    at: Instant,
}

fn together(cpus: &[usize]) -> Result<Results> {
    let shared = &Shared {
        words: (0..WORDS).map(|_| AtomicU64::new(0)).collect(),
        next: [AtomicU64::new(0), AtomicU64::new(0)],
        sum: AtomicU64::new(0),
        locked: Mutex::new(Locked { count: 0, at: Instant::now() }),
        barrier: Barrier::new(cpus.len()),
    };
    let (readers, mut writers): (Vec<_>, Vec<_>) =
        cpus.iter().map(|_| pipe()).collect::<std::io::Result<Vec<_>>>()?.into_iter().unzip();
    // Each thread reads its own pipe and writes to the next one's.
    writers.rotate_left(1);
    let hops = thread::scope(|scope| {
        let threads: Vec<_> = cpus
            .iter()
            .zip(readers.into_iter().zip(writers))
            .map(|(&cpu, ring)| scope.spawn(move || alone(cpu, cpu == cpus[0], shared, ring)))
            .collect();
        let ends = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?);
        ends.collect::<Result<Vec<u64>>>()
    })?;
    Ok(Results {
        cpus: cpus.len() as u64,
        sum: shared.sum.load(Ordering::Relaxed),
        locked: shared.locked.lock().unwrap_or_else(PoisonError::into_inner).count,
        hops: hops.into_iter().max().unwrap_or(0),
    })
}

/// The thread of processor `cpu`. Returns the number of processors that the token had visited when it arrived here for
/// the last time.
fn alone(cpu: usize, is_first: bool, shared: &Shared, ring: (PipeReader, PipeWriter)) -> Result<u64> {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).with_context(|| format!("sched_setaffinity to {cpu}"))?;
    while let Some(chunk) = shared.take(0) {
        for index in chunk {
            shared.words[index as usize].store(FACTOR.wrapping_mul(index), Ordering::Relaxed);
        }
    }
    shared.barrier.wait();
    while let Some(chunk) = shared.take(1) {
        let words = chunk.map(|index| shared.words[index as usize].load(Ordering::Relaxed));
        shared.sum.fetch_add(words.fold(0, u64::wrapping_add), Ordering::Relaxed);
    }
    for _ in 0..ROUNDS {
        let backwards = shared.take_lock();
        shared.barrier.wait();
        ensure!(!backwards, "the clock of processor {cpu} is behind that of another");
    }
    pass_token(is_first, ring).context("the ring of pipes")
}

impl Shared {
    /// Counts. Returns whether this processor's clock is behind that of the last processor that took the lock.
    fn take_lock(&self) -> bool {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let backwards = now.checked_duration_since(locked.at).is_none();
        *locked = Locked { count: locked.count + 1, at: now };
        backwards
    }

    /// A chunk that no thread has taken yet.
    fn take(&self, pass: usize) -> Option<Range<u64>> {
        let first = self.next[pass].fetch_add(CHUNK, Ordering::Relaxed);
        (first < WORDS).then(|| first..(first + CHUNK).min(WORDS))
    }
}

/// Takes the token and passes it on, once per lap. The first processor creates the token, and keeps it at the end.
fn pass_token(is_first: bool, (mut from, mut to): (PipeReader, PipeWriter)) -> std::io::Result<u64> {
    let mut token = 0_u64;
    if is_first {
        to.write_all(&token.to_le_bytes())?;
    }
    for lap in 1..=LAPS {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes)?;
        token = u64::from_le_bytes(bytes) + 1;
        if !is_first || lap < LAPS {
            to.write_all(&token.to_le_bytes())?;
        }
    }
    Ok(token)
}
