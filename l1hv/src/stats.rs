//! Counters: exits by reason at each level, and the exits of nested guests that were reflected.

use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ept::nested::NestedPaging;
use protocol::statistics::{CHECKSUM_PREFIX, HEADING, LINE_PREFIX, Row, TOTAL};
use shadow::exit::ExitReason;

use crate::arch::relocate::checksum_of_constants;
use crate::ept01::Ept01;
use crate::tables::TablePool;

/// Counters of reasons: a power of two, so that counting needs no bounds check. The SDM defines fewer reasons.
const REASONS: usize = 128;
const _: () = assert!(ExitReason::BASIC_COUNT <= REASONS);

/// The counters of one processor, which alone changes them.
#[derive(Debug)]
pub struct Stats {
    guest_hypervisor: [AtomicU64; REASONS],
    nested: [AtomicU64; REASONS],
    reflected: [AtomicU64; REASONS],
}

/// Increments without an atomic read-modify-write, as no other processor counts here.
#[inline(always)]
fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

#[inline(always)]
fn slot(reason: ExitReason) -> usize {
    usize::from(reason.basic()) % REASONS
}

/// How often the counters are printed at most. User mode may ask for it, and a serial port takes long.
static PRINTS_LEFT: AtomicU32 = AtomicU32::new(256);

/// Whether the counters may be printed once more.
pub fn may_print() -> bool {
    PRINTS_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl Stats {
    /// Counters at 0.
    pub const fn new() -> Self {
        let zeros = [const { AtomicU64::new(0) }; REASONS];
        Self {
            guest_hypervisor: zeros,
            nested: [const { AtomicU64::new(0) }; REASONS],
            reflected: [const { AtomicU64::new(0) }; REASONS],
        }
    }

    /// Counts an exit of the guest hypervisor.
    #[inline]
    pub fn guest_hypervisor_exit(&self, reason: ExitReason) {
        increment(&self.guest_hypervisor[slot(reason)]);
    }

    /// Counts an exit of a nested guest.
    #[inline]
    pub fn nested_exit(&self, reason: ExitReason) {
        increment(&self.nested[slot(reason)]);
    }

    /// Counts an exit that was reflected to the guest hypervisor.
    #[inline]
    pub fn reflect(&self, reason: ExitReason) {
        increment(&self.reflected[slot(reason)]);
    }
}

/// Exits of one reason, or of all reasons: of the guest hypervisor, of nested guests, and of these the reflected ones.
fn sums<'a>(all: impl Iterator<Item = &'a Stats>, reasons: Range<usize>) -> [u64; 3] {
    let mut sums = [0; 3];
    for Stats { guest_hypervisor, nested, reflected } in all {
        for (sum, counters) in sums.iter_mut().zip([guest_hypervisor, nested, reflected]) {
            *sum += counters[reasons.clone()].iter().map(|counter| counter.load(Ordering::Relaxed)).sum::<u64>();
        }
    }
    sums
}

/// Writes the counters of all processors to the log, a line for each reason that occurred, the use of tables by
/// this processor and the parts of the host's memory that guests have come to, and a checksum of the host's code and constants. The runner reads these lines.
pub fn print<'a>(
    all: impl Iterator<Item = &'a Stats> + Clone,
    tables: &TablePool,
    paging: &NestedPaging,
    ept01: &Ept01,
) {
    let write = |reason: &str, [guest_hypervisor, nested, reflected]: [u64; 3]| {
        let row = Row { reason, guest_hypervisor, nested, reflected };
        crate::log::write_line(format_args!("{LINE_PREFIX}{row}"));
    };
    crate::log::write_line(format_args!("{LINE_PREFIX}{HEADING}"));
    for number in 0..REASONS {
        let counts = sums(all.clone(), number..number + 1);
        if counts != [0; 3] {
            write(ExitReason(number as u32).name().unwrap_or("unknown"), counts);
        }
    }
    write(TOTAL, sums(all, 0..REASONS));
    let counters = paging.counters();
    crate::log::write_line(format_args!(
        "{LINE_PREFIX}ept-tables budget={} in-use={} most-in-use={} reclaims={} kept={} dropped={} host-memory={}",
        tables.budget(),
        tables.in_use(),
        tables.most_in_use(),
        counters.reclaims,
        counters.kept,
        counters.dropped,
        ept01.hole_accesses()
    ));
    crate::log::write_line(format_args!("{CHECKSUM_PREFIX}{:#018x}", checksum_of_constants()));
}
