//! The counters of our build of Bochs, for any hypervisor (`machines/bochs/0103-counters.patch`).
//!
//! A mark prints all counters since power-on. The difference of two marks counts the events between them.

use std::collections::BTreeMap;
use std::ops::Sub;

use crate::protocol::COUNT_PREFIX;

/// Counters at one point, or the difference of two.
///
/// "Root" and "nonroot" are VMX operation of the machine itself: with one hypervisor below another, only the lowest one
/// is in root operation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// By name: `outside`, `root`, `nonroot` (instructions), `entries`, `vmread`, and so on.
    values: BTreeMap<String, u64>,
    /// VM exits by basic exit reason.
    pub exits: BTreeMap<u16, u64>,
    /// Instructions in VMX root operation, by the basic reason of the exit that they followed.
    pub spent: BTreeMap<u16, u64>,
}

impl Counters {
    /// The counter called `name` in Bochs's line.
    pub fn get(&self, name: &str) -> u64 {
        self.values.get(name).copied().unwrap_or(0)
    }

    /// Instructions of all levels. Halted time does not count.
    pub fn instructions(&self) -> u64 {
        ["outside", "root", "nonroot"].map(|mode| self.get(mode)).iter().sum()
    }

    /// Instructions of the hypervisor on the machine itself.
    pub fn host_instructions(&self) -> u64 {
        self.get("root")
    }

    /// VM exits of the processor.
    pub fn hardware_exits(&self) -> u64 {
        self.exits.values().sum()
    }
}

impl Sub for &Counters {
    type Output = Counters;

    /// The counts from `earlier` to `self`.
    fn sub(self, earlier: &Counters) -> Counters {
        let values = self.values.iter().map(|(name, count)| (name.clone(), count - earlier.get(name)));
        let by_reason = |now: &BTreeMap<u16, u64>, earlier: &BTreeMap<u16, u64>| {
            now.iter().map(|(reason, count)| (*reason, count - earlier.get(reason).copied().unwrap_or(0))).collect()
        };
        Counters {
            values: values.collect(),
            exits: by_reason(&self.exits, &earlier.exits),
            spent: by_reason(&self.spent, &earlier.spent),
        }
    }
}

/// A mark that software set, with the counters at that point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountMark {
    /// Its name, at most 16 characters.
    pub name: String,
    /// All counters since power-on.
    pub counters: Counters,
}

impl CountMark {
    /// Parses Bochs's line.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix(COUNT_PREFIX)?.split(' ');
        let name = words.next()?.to_owned();
        let mut counters = Counters::default();
        for word in words {
            match word.split_once('=')? {
                ("exits", list) => counters.exits = by_reason(list)?,
                ("spent", list) => counters.spent = by_reason(list)?,
                (name, count) => _ = counters.values.insert(name.to_owned(), count.parse().ok()?),
            }
        }
        Some(Self { name, counters })
    }
}

/// `REASON:COUNT,REASON:COUNT`
fn by_reason(list: &str) -> Option<BTreeMap<u16, u64>> {
    list.split(',')
        .filter(|item| !item.is_empty())
        .map(|item| {
            let (reason, count) = item.split_once(':')?;
            Some((reason.parse().ok()?, count.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_between_two_marks_is_their_difference() {
        let mark = |text: &str| CountMark::parse(&format!("{COUNT_PREFIX}{text}")).unwrap();
        let before = mark("a outside=5 root=10 nonroot=1 vmread=2 exits=10:3 spent=10:9");
        let after = mark("b outside=5 root=110 nonroot=8 vmread=9 exits=10:4,18:2 spent=10:69,18:40");
        assert_eq!(after.name, "b");
        let between = &after.counters - &before.counters;
        assert_eq!(between.instructions(), 107);
        assert_eq!(between.host_instructions(), 100);
        assert_eq!(between.get("vmread"), 7);
        assert_eq!(between.exits, BTreeMap::from([(10, 1), (18, 2)]));
        assert_eq!(between.spent, BTreeMap::from([(10, 60), (18, 40)]));
        assert_eq!(between.hardware_exits(), 3);
    }

    #[test]
    fn a_machine_without_exits_prints_an_empty_list() {
        let mark = CountMark::parse("L1HV-COUNT mark=init outside=7 exits=").unwrap();
        assert_eq!(mark.counters.hardware_exits(), 0);
        assert_eq!(CountMark::parse("L1HV-MARK init tsc=1"), None);
    }
}
