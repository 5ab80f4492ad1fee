//! Registers of the guest hypervisor that seldom change: while the instructions that change them exit, an exit of its
//! nested guest need not load them again.
//!
//! Some guest hypervisors change such a register between any two exits of a nested guest, as KVM does with GDTR on its
//! way to user space. Each change then costs an exit, which is more than the loads that the trap saves. So a trap is
//! set again later and later:
//!
//! ```text
//!             set: loads are left out
//!   wait = 0 ┌───────┐ sprung: wait = patience, which doubles unless the trap was worth it
//!            │       ▼
//!          not set: each load counts the wait down
//! ```

/// A trap on the instructions that write some registers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WriteTrap {
    /// The registers have the values loaded last, and cannot change unnoticed.
    holds: bool,
    /// Writes to the registers exit.
    is_set: bool,
    /// Loads until the trap is set again.
    wait: u32,
    /// Loads to wait for after the trap is sprung.
    patience: u32,
    /// Loads that were left out since the trap was set.
    saved: u32,
}

impl WriteTrap {
    /// Left-out loads that pay for one exit and for setting the trap again: a load is seven or more writes to the VMCS,
    /// an exit costs as much as a dozen writes.
    const WORTH: u32 = 4;
    /// The longest wait.
    const MOST_PATIENT: u32 = 1 << 12;

    /// A trap that is not set.
    pub const fn new() -> Self {
        Self { holds: false, is_set: false, wait: 1, patience: 1, saved: 0 }
    }

    /// A trap that is never set, for a processor that cannot make the instructions exit.
    pub const fn impossible() -> Self {
        Self { wait: u32::MAX, ..Self::new() }
    }

    /// Whether a load can be left out.
    #[inline(always)]
    pub fn holds(&mut self) -> bool {
        self.saved = self.saved.wrapping_add(1);
        self.holds
    }

    /// Whether writes exit.
    pub const fn is_set(&self) -> bool {
        self.is_set
    }

    /// Notes that the registers were loaded. Returns whether the trap is to be set now.
    #[must_use = "the writes have to exit from now on"]
    pub fn loaded(&mut self) -> bool {
        let set_now = !self.is_set && self.wait != u32::MAX && {
            self.wait -= 1;
            self.wait == 0
        };
        if set_now {
            self.is_set = true;
            self.saved = 0;
        }
        self.holds = self.is_set;
        set_now
    }

    /// Notes that the registers have, or must get, other values than those loaded last.
    pub fn forget(&mut self) {
        self.holds = false;
    }

    /// Notes that the guest hypervisor is about to write one of the registers: writes need no longer exit.
    pub fn sprung(&mut self) {
        self.is_set = false;
        self.holds = false;
        self.patience = if self.saved >= Self::WORTH { 1 } else { (self.patience * 2).min(Self::MOST_PATIENT) };
        self.wait = self.patience;
    }
}

impl Default for WriteTrap {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the loads, and the exits of writes, in `rounds` rounds. The guest hypervisor writes in those for which
    /// `writes` is true.
    fn run(rounds: u32, writes: impl Fn(u32) -> bool) -> (u32, u32) {
        let mut trap = WriteTrap::new();
        let (mut loads, mut exits) = (0, 0);
        for round in 0..rounds {
            if !trap.holds() {
                loads += 1;
                let _ = trap.loaded();
            }
            if writes(round) && trap.is_set() {
                trap.sprung();
                exits += 1;
            }
        }
        (loads, exits)
    }

    #[test]
    fn registers_that_never_change_are_loaded_once() {
        assert_eq!(run(1000, |_| false), (1, 0));
    }

    #[test]
    fn registers_that_change_every_time_cost_hardly_an_exit() {
        let (loads, exits) = run(100_000, |_| true);
        assert_eq!(loads, 100_000);
        assert!(exits < 40, "{exits} exits");
    }

    #[test]
    fn a_change_now_and_then_costs_one_exit_and_one_load() {
        assert_eq!(run(1000, |round| round % 10 == 9), (100, 100));
    }

    #[test]
    fn a_wild_beginning_is_forgotten() {
        let (loads, exits) = run(100_000, |round| round < 1000);
        assert!(loads < 2100 && exits < 20, "{loads} loads, {exits} exits");
    }

    #[test]
    fn other_values_are_loaded_without_another_trap() {
        let mut trap = WriteTrap::new();
        assert!(trap.loaded() && trap.holds());
        trap.forget();
        assert!(!trap.holds() && trap.is_set());
        assert!(!trap.loaded() && trap.holds());
    }

    #[test]
    fn an_impossible_trap_is_never_set() {
        let mut trap = WriteTrap::impossible();
        assert!((0..10_000).all(|_| !trap.loaded() && !trap.holds()));
    }
}
