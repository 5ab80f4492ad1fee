//! The list of differences that are not defects of l1hv.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::glob::matches;
use crate::layout::Layout;

/// The list, from the workspace's top directory.
const FILE: &str = "tests-qemu/guests/conformance/explained.toml";

/// KVM's name as the hypervisor below.
pub const KVM: &str = "kvm";

/// All entries.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Explained {
    /// The entries, in the order of the file.
    #[serde(default)]
    pub entry: Vec<Entry>,
}

/// A reason and the cases that differ because of it.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A feature that l1hv hides, or a defect of the machine with the SDM's section.
    pub reason: String,
    /// The option of l1hv without which there is no difference.
    pub only: Option<String>,
    /// Whether the entry is about the groups for several processors.
    #[serde(default)]
    pub several: bool,
    /// The hypervisor below without which there is no difference: [`KVM`].
    pub below: Option<String>,
    /// The bit without which there is no difference: the processor lacks what the entry is about.
    pub needs: Option<ProcessorBit>,
    /// The bit with which there is no difference: the entry is about processors without it.
    pub lacks: Option<ProcessorBit>,
    /// Only words of the results that begin with this may differ.
    pub word: Option<String>,
    /// Patterns of case names.
    pub cases: Vec<String>,
}

impl Entry {
    /// Whether the entry covers the difference between two results.
    fn covers(&self, bare: Option<&str>, l1hv: Option<&str>) -> bool {
        let Some(word) = &self.word else { return true };
        let rest = |result: Option<&str>| -> Option<Vec<String>> {
            Some(result?.split(' ').filter(|part| !part.starts_with(word)).map(str::to_owned).collect())
        };
        rest(bare) == rest(l1hv)
    }
}

/// A bit that describes a processor: of a VMX capability MSR, as in `0x48b[23]`, or of a register after CPUID with
/// subleaf 0, as in `0x6.eax[19]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ProcessorBit {
    /// MSR or leaf.
    number: u32,
    register: Option<String>,
    bit: u32,
}

impl TryFrom<String> for ProcessorBit {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parse = || {
            let (place, bit) = text.strip_prefix("0x")?.strip_suffix(']')?.split_once('[')?;
            let (number, register) = match place.split_once('.') {
                Some((leaf, register)) if ["eax", "ebx", "ecx", "edx"].contains(&register) => (leaf, Some(register)),
                Some(_) => return None,
                None => (place, None),
            };
            let (number, bit) = (u32::from_str_radix(number, 16).ok()?, bit.parse().ok()?);
            (bit < u64::BITS).then(|| Self { number, register: register.map(str::to_owned), bit })
        };
        parse().ok_or_else(|| format!("{text} is no bit of a processor: write 0xMSR[BIT] or 0xLEAF.REGISTER[BIT]"))
    }
}

impl ProcessorBit {
    /// Whether the bit is 1 in the results of a run. An MSR that faulted has no bits.
    fn is_set(&self, cases: &[(String, String)]) -> bool {
        let (name, before) = match &self.register {
            None => (format!("caps/read-{:#x}", self.number), "0x".to_owned()),
            Some(register) => (format!("caps/cpuid-{:#x}-0", self.number), format!("{register}=0x")),
        };
        let words = cases.iter().find(|(case, _)| *case == name).into_iter().flat_map(|(_, value)| value.split(' '));
        let mut values = words.filter_map(|word| u64::from_str_radix(word.strip_prefix(&before)?, 16).ok());
        values.next().is_some_and(|value| value >> self.bit & 1 != 0)
    }
}

impl Explained {
    /// The list of this workspace.
    pub fn find(layout: &Layout) -> Result<Self> {
        Self::read(&layout.workspace().join(FILE))
    }

    /// Reads the file.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let list: Self = toml::from_str(&text).with_context(|| format!("{} is not as it should be", file.display()))?;
        for entry in &list.entry {
            ensure!(!entry.reason.trim().is_empty(), "{}: an entry has no reason", file.display());
        }
        Ok(list)
    }

    /// The entries that apply under l1hv with the command line `host`, on a machine with `cpus` processors and the
    /// results `bare` without l1hv. The machine may be the virtual machine of a hypervisor `below`.
    #[must_use]
    pub fn under(&self, host: &str, cpus: u32, below: Option<&str>, bare: &[(String, String)]) -> Self {
        let has = |option: &String| host.split_whitespace().any(|word| word == option);
        let counts = |entry: &&Entry| {
            entry.only.as_ref().is_none_or(has)
                && entry.several == (cpus > 1)
                && entry.below.as_deref().is_none_or(|name| below == Some(name))
                && entry.needs.as_ref().is_none_or(|bit| bit.is_set(bare))
                && entry.lacks.as_ref().is_none_or(|bit| !bit.is_set(bare))
        };
        Self { entry: self.entry.iter().filter(counts).cloned().collect() }
    }

    /// The entry and the pattern that explain this case with its results.
    pub fn of(&self, case: &str, bare: Option<&str>, l1hv: Option<&str>) -> Option<(&Entry, &str)> {
        self.entry.iter().filter(|entry| entry.covers(bare, l1hv)).find_map(|entry| {
            let pattern = entry.cases.iter().find(|pattern| matches(pattern, case))?;
            Some((entry, pattern.as_str()))
        })
    }

    /// All patterns.
    pub fn patterns(&self) -> impl Iterator<Item = &str> {
        self.entry.iter().flat_map(|entry| entry.cases.iter().map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_for_an_option_counts_only_with_it() {
        let entry = Entry { only: Some("feature=off".into()), cases: vec!["a/*".into()], ..Entry::default() };
        let list = Explained { entry: vec![entry] };
        assert!(list.under("log=debug feature=off", 1, None, &[]).of("a/1", None, None).is_some());
        assert!(list.under("feature=offline", 1, None, &[]).of("a/1", None, None).is_none());
    }

    #[test]
    fn an_entry_for_a_word_explains_no_other_difference() {
        let entry = Entry { word: Some("q=".into()), cases: vec!["a".into()], ..Entry::default() };
        let list = Explained { entry: vec![entry] };
        let explains = |bare, l1hv| list.of("a", Some(bare), Some(l1hv)).is_some();
        assert!(explains("exit=0x31 q=0x81 rip=+0x2", "exit=0x31 rip=+0x2"));
        assert!(!explains("exit=0x31 q=0x81 rip=+0x2", "exit=0x30 rip=+0x2"));
        assert!(list.of("a", Some("exit=0x31"), None).is_none());
    }

    #[test]
    fn an_entry_counts_on_the_machine_that_it_is_for() {
        let entry = |several, case: &str| Entry { several, cases: vec![case.into()], ..Entry::default() };
        let list = Explained { entry: vec![entry(false, "one"), entry(true, "several")] };
        let explains =
            |cpus| ["one", "several"].map(|case| list.under("", cpus, None, &[]).of(case, None, None).is_some());
        assert_eq!(explains(1), [true, false]);
        assert_eq!([2, 4].map(explains), [[false, true]; 2]);
    }

    #[test]
    fn an_entry_counts_on_a_processor_that_has_what_it_needs_or_has_not_what_it_lacks() {
        let needs = ProcessorBit::try_from("0x48b[33]".to_owned()).unwrap();
        let entry = Entry { needs: Some(needs), cases: vec!["a".into()], ..Entry::default() };
        let opposite = Entry { needs: None, lacks: entry.needs.clone(), cases: vec!["b".into()], ..Entry::default() };
        let list = Explained { entry: vec![entry, opposite] };
        let on = |value: &str| {
            let list = list.under("", 1, None, &[("caps/read-0x48b".into(), value.into())]);
            ["a", "b"].map(|case| list.of(case, None, None).is_some())
        };
        let [has, has_not] = [[true, false], [false, true]];
        assert_eq!(["0x200000000", "0x100000000", "#GP(0x0)"].map(on), [has, has_not, has_not]);
        let leaf = ProcessorBit::try_from("0x6.edx[1]".to_owned()).unwrap();
        let with = |edx| leaf.is_set(&[("caps/cpuid-0x6-0".into(), format!("eax=0x2 ebx=0x2 ecx=0x2 edx={edx}"))]);
        assert_eq!(["0x3", "0x1"].map(with), [true, false]);
        for wrong in ["0x48b", "48b[1]", "0x48b[64]", "0x48b[x]", "0x6.ax[1]"] {
            assert!(ProcessorBit::try_from(wrong.to_owned()).is_err(), "{wrong}");
        }
    }
}
