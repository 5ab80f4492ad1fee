//! `cargo l1hv profile`: shows which VMCS fields a guest hypervisor accesses, which of them are worth granting, and the
//! effect.
//!
//! The workload is the payload under Debian's KVM. It runs three times: with every access counted (l1hv's option
//! `profile`), with nothing granted (`shadow=*:none`), and with the proposed list.

use std::cmp::Ordering;

use anyhow::{Context as _, Result, ensure};
use protocol::statistics::PROFILE_PREFIX;
use table::Table;

use crate::bench::Bench;
use crate::bench::measure::{self, Measurement};
use crate::guest::KvmEpt;

/// Nothing granted.
const NONE: &str = "shadow=*:none";

/// The least share of all accesses that makes a field worth a place in the list.
const LEAST_SHARE: f64 = 0.001;

/// Accesses of the guest hypervisor to a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accesses {
    /// The field's name in the table.
    pub field: String,
    /// VMREADs.
    pub reads: u64,
    /// VMWRITEs.
    pub writes: u64,
    /// The access that l1hv grants by default: `none`, `r`, `w` or `rw`.
    pub granted: String,
    /// The most that can be granted.
    pub most: String,
}

impl Accesses {
    /// Parses l1hv's line.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix(PROFILE_PREFIX)?.split(' ').map(str::to_owned);
        let field = words.next()?;
        let (reads, writes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { field, reads, writes, granted: words.next()?, most: words.next()? })
    }

    /// Accesses that exit with the present grants.
    pub fn exits(&self) -> u64 {
        let exiting = |count, access| if self.granted.contains(access) { 0 } else { count };
        exiting(self.reads, 'r') + exiting(self.writes, 'w')
    }

    /// The proposed grant: the accesses that are used and can be granted.
    fn proposed(&self) -> Option<String> {
        let wanted = [(self.reads, 'r'), (self.writes, 'w')];
        let access: String = wanted
            .iter()
            .filter(|(count, letter)| *count > 0 && self.most.contains(*letter))
            .map(|pair| pair.1)
            .collect();
        (!access.is_empty() && self.most != "none").then(|| format!("{}:{access}", self.field))
    }

    fn most_used_first(&self, other: &Self) -> Ordering {
        other.all().cmp(&self.all()).then_with(|| self.field.cmp(&other.field))
    }

    fn all(&self) -> u64 {
        self.reads + self.writes
    }
}

/// The list for l1hv's option `shadow` that grants the worthwhile accesses, the most used fields first.
pub fn proposal(accesses: &[Accesses]) -> String {
    let total: u64 = accesses.iter().map(Accesses::all).sum();
    let mut worth: Vec<&Accesses> =
        accesses.iter().filter(|field| field.all() as f64 >= total as f64 * LEAST_SHARE).collect();
    worth.sort_by(|a, b| a.most_used_first(b));
    let granted = worth.iter().filter_map(|field| field.proposed());
    std::iter::once("*:none".to_owned()).chain(granted).collect::<Vec<_>>().join(",")
}

/// Profile, proposal, and its effect.
#[derive(Debug)]
pub struct Profile {
    /// Accesses by field, the most accessed first.
    pub accesses: Vec<Accesses>,
    /// The proposed value of l1hv's option `shadow`.
    pub proposal: String,
    /// The payload's operations with nothing granted.
    pub before: Vec<Measurement>,
    /// The payload's operations with the proposal.
    pub after: Vec<Measurement>,
}

/// Profiles the payload under the `bench`'s guest hypervisor, and measures it before and after.
///
/// # Errors
/// When a machine could not be started or did not do all its work.
pub fn run(bench: &Bench<'_>, ept: KvmEpt) -> Result<Profile> {
    let mut accesses = Vec::new();
    bench.payload_under_l1hv("profile", "stats profile", ept, |line| accesses.extend(Accesses::parse(line)))?;
    ensure!(!accesses.is_empty(), "l1hv printed no profile");
    accesses.sort_by(Accesses::most_used_first);
    let proposal = proposal(&accesses);
    let measured = |name, options: &str| {
        let transcript = bench.payload_under_l1hv(name, options, ept, |_| ())?;
        measure::operations("l1hv", &measure::PAYLOAD, &transcript)
    };
    let before = measured("profile-before", NONE)?;
    let after = measured("profile-after", &format!("shadow={proposal}"))?;
    Ok(Profile { accesses, proposal, before, after })
}

impl Profile {
    /// The fields as a table for people.
    pub fn fields(&self) -> String {
        let mut table = Table::new(&["field", "granted", "can be", "VMREAD", "VMWRITE", "of these exit"]);
        for field in &self.accesses {
            let numbers = [field.reads, field.writes, field.exits()].map(Some);
            table.row_of(&[&field.field, &field.granted, &field.most], numbers);
        }
        table.render()
    }

    /// The operations' cost before and after, as a table.
    pub fn worth(&self) -> Result<String> {
        let headings = ["operation", "exits before", "after", "host instructions before", "after"];
        let mut table = Table::new(&headings);
        for before in &self.before {
            let after = self.after.iter().find(|after| after.operation == before.operation);
            let after = after.with_context(|| format!("{} was not measured again", before.operation))?;
            let numbers =
                [before.hardware_exits, after.hardware_exits, before.host_instructions, after.host_instructions];
            table.row(&before.operation, numbers.map(Some));
        }
        Ok(table.render())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accesses(line: &str) -> Accesses {
        Accesses::parse(&format!("{PROFILE_PREFIX}{line}")).unwrap()
    }

    #[test]
    fn what_is_used_and_can_be_granted_is_proposed_the_most_used_first() {
        let fields = [
            accesses("GUEST_RIP 1000 900 rw rw"),
            accesses("EXIT_REASON 2000 0 r rw"),
            accesses("HOST_FS_BASE 0 500 none none"),
            accesses("GUEST_CR3 1 0 rw rw"),
            accesses("EXIT_QUALIFICATION 300 1 r r"),
        ];
        assert_eq!(proposal(&fields), "*:none,EXIT_REASON:r,GUEST_RIP:rw,EXIT_QUALIFICATION:r");
        assert_eq!(fields.each_ref().map(Accesses::exits), [0, 0, 500, 0, 1]);
    }

    #[test]
    fn other_lines_are_no_profile() {
        assert_eq!(Accesses::parse("[l1hv STATS] CPUID 1 2 3"), None);
        assert_eq!(Accesses::parse("[l1hv PROFILE] GUEST_RIP 1 x rw rw"), None);
    }
}
