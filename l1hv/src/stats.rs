//! What is counted: exits by reason at each level, and where those of nested guests went.

use ept::nested::NestedPaging;
use shadow::exit::ExitReason;

use crate::hw::TablePool;
use crate::vcpu::Level;

/// Reasons counted apart: a power of two, so that counting needs no check; the SDM's are fewer.
const REASONS: usize = 128;
const _: () = assert!(ExitReason::BASIC_COUNT <= REASONS);

/// The counters. Plain words: one processor owns them.
#[derive(Clone, Debug)]
pub struct Stats {
    guest_hypervisor: [u64; REASONS],
    nested: [u64; REASONS],
    reflected: [u64; REASONS],
}

#[inline(always)]
fn slot(reason: ExitReason) -> usize {
    usize::from(reason.basic()) % REASONS
}

impl Stats {
    /// All zero.
    pub const fn new() -> Self {
        Self { guest_hypervisor: [0; REASONS], nested: [0; REASONS], reflected: [0; REASONS] }
    }

    /// Counts an exit.
    #[inline]
    pub fn exit(&mut self, level: Level, reason: ExitReason) {
        let counters = match level {
            Level::GuestHypervisor => &mut self.guest_hypervisor,
            Level::Nested => &mut self.nested,
        };
        counters[slot(reason)] += 1;
    }

    /// Counts an exit that the guest hypervisor got.
    #[inline]
    pub fn reflect(&mut self, reason: ExitReason) {
        self.reflected[slot(reason)] += 1;
    }

    /// Writes the counters to the log, a line for each reason that occurred. The runner reads these lines.
    pub fn print(&self, tables: &TablePool, paging: &NestedPaging) {
        crate::log::write_line(format_args!("[l1hv STATS] reason guest-hypervisor nested reflected"));
        for number in 0..REASONS {
            let counts = (self.guest_hypervisor[number], self.nested[number], self.reflected[number]);
            if counts != (0, 0, 0) {
                let name = ExitReason(number as u32).name().unwrap_or("unknown");
                crate::log::write_line(format_args!("[l1hv STATS] {name} {} {} {}", counts.0, counts.1, counts.2));
            }
        }
        let total = |counters: &[u64]| counters.iter().sum::<u64>();
        crate::log::write_line(format_args!(
            "[l1hv STATS] total {} {} {}",
            total(&self.guest_hypervisor),
            total(&self.nested),
            total(&self.reflected)
        ));
        let counters = paging.counters();
        crate::log::write_line(format_args!(
            "[l1hv STATS] ept-tables budget={} in-use={} most-in-use={} reclaims={} kept={} dropped={}",
            tables.budget(),
            tables.in_use(),
            tables.most_in_use(),
            counters.reclaims,
            counters.kept,
            counters.dropped
        ));
    }
}
