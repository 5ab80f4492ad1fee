//! The list of differences that are no defects of l1hv.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::glob::matches;

/// The list, from the workspace's top directory.
pub const FILE: &str = "tests-qemu/guests/conformance/explained.toml";

/// All entries.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Explained {
    /// In the order of the file.
    #[serde(default)]
    pub entry: Vec<Entry>,
}

/// A reason and the cases that differ because of it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// A feature that l1hv hides, or a defect of the machine with the SDM's section.
    pub reason: String,
    /// Patterns of case names.
    pub cases: Vec<String>,
}

impl Explained {
    /// Reads the file.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let list: Self = toml::from_str(&text).with_context(|| format!("{} is not as it should be", file.display()))?;
        for entry in &list.entry {
            ensure!(!entry.reason.trim().is_empty(), "{}: an entry has no reason", file.display());
        }
        Ok(list)
    }

    /// The entry and the pattern that explain this case.
    pub fn of(&self, case: &str) -> Option<(&Entry, &str)> {
        self.entry.iter().find_map(|entry| {
            let pattern = entry.cases.iter().find(|pattern| matches(pattern, case))?;
            Some((entry, pattern.as_str()))
        })
    }

    /// All patterns.
    pub fn patterns(&self) -> impl Iterator<Item = &str> {
        self.entry.iter().flat_map(|entry| entry.cases.iter().map(String::as_str))
    }
}
