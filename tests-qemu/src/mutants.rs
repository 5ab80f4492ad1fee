//! l1hv with one thing left out, each built in a copy of the tree: the suite has to notice.
//!
//! What the suite does not notice is not tested. The list, `mutants.toml`, is about invalidation: each place that asks
//! the processor or the cache of EPT02s to forget something.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use table::Table;

use crate::build;
use crate::command;
use crate::conformance::{Place, Results, Suite};
use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision::Provisioned;

/// The list, from the workspace's top directory.
const FILE: &str = "tests-qemu/mutants.toml";

/// What the copy of the tree consists of.
const PARTS: [&str; 8] =
    ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "boot", "ept", "shadow", "l1hv", "tests-qemu"];

/// All of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// What is left out, and who should notice.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// What is left out.
    name: String,
    /// How.
    edits: Vec<Edit>,
    /// The groups of cases that should notice, separated by commas.
    groups: String,
    /// Processors of the machine.
    #[serde(default = "one")]
    cpus: u32,
    /// l1hv's command line.
    #[serde(default)]
    hv_append: String,
    /// Why no case can notice.
    survives: Option<String>,
}

fn one() -> u32 {
    1
}

/// A source edit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    /// The source file, from the workspace's top directory.
    file: PathBuf,
    /// What is replaced: a text that the file has once.
    from: String,
    /// What replaces it.
    to: String,
}

impl Edit {
    /// The file with the edit.
    fn apply(&self, workspace: &Path) -> Result<String> {
        let file = workspace.join(&self.file);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let count = text.matches(&self.from).count();
        ensure!(count == 1, "{} has {count} times {:?}", self.file.display(), self.from);
        Ok(text.replacen(&self.from, &self.to, 1))
    }
}

/// Reads the list; the mutants whose names contain `filter`.
fn list(workspace: &Path, filter: &str) -> Result<Vec<Mutant>> {
    let file = workspace.join(FILE);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let List { mutant } = toml::from_str(&text).with_context(|| format!("{} is no list", file.display()))?;
    Ok(mutant.into_iter().filter(|mutant| mutant.name.contains(filter)).collect())
}

/// What the suite says about a mutant.
#[derive(Debug)]
struct Found {
    mutant: Mutant,
    cases: usize,
    different: usize,
}

impl Found {
    fn is_right(&self) -> bool {
        (self.different > 0) == self.mutant.survives.is_none()
    }

    fn verdict(&self) -> &str {
        match (self.different > 0, &self.mutant.survives) {
            (true, None) => "caught",
            (true, Some(_)) => "CAUGHT, and listed as one that survives",
            (false, None) => "SURVIVES",
            (false, Some(reason)) => reason,
        }
    }
}

/// What became of all.
#[derive(Debug)]
pub struct Verdicts(Vec<Found>);

impl Verdicts {
    /// Whether the suite has noticed each that it can notice.
    pub fn are_right(&self) -> bool {
        self.0.iter().all(Found::is_right)
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["left out", "groups", "verdict", "cases", "different"]);
        for found in &self.0 {
            let Mutant { name, groups, .. } = &found.mutant;
            table.row_of(&[name, groups, found.verdict()], [found.cases, found.different].map(|n| Some(n as u64)));
        }
        f.write_str(&table.render())
    }
}

/// A copy of the workspace that edits are made in, with a build directory of its own.
struct Scratch {
    dir: PathBuf,
}

impl Scratch {
    fn make(layout: &Layout) -> Result<Self> {
        let dir = layout.root().join("mutants");
        let tree = dir.join("tree");
        if tree.exists() {
            fs::remove_dir_all(&tree)?;
        }
        fs::create_dir_all(&tree)?;
        for part in PARTS {
            let part = layout.workspace().join(part);
            command::output(
                std::process::Command::new("cp").args(["--archive", "--target-directory"]).arg(&tree).arg(part),
            )?;
        }
        Ok(Self { dir })
    }

    /// Builds l1hv with the edit, and without it again; returns its ELF file.
    fn build(&self, mutant: &Mutant, layout: &Layout, progress: &Progress) -> Result<PathBuf> {
        let step = progress.step(format!("building {}", mutant.name));
        let tree = self.dir.join("tree");
        for edit in &mutant.edits {
            fs::write(tree.join(&edit.file), edit.apply(&tree)?)?;
        }
        let built = build::l1hv_in(&tree, &self.dir.join("target"));
        for Edit { file, .. } in &mutant.edits {
            // Not with the old time, by which cargo would go.
            fs::write(tree.join(file), fs::read(layout.workspace().join(file))?)?;
        }
        step.done();
        built
    }
}

/// Runs the suite on each mutant whose name contains `filter`.
///
/// # Errors
/// When an edit does not fit or does not compile, when a machine cannot be started, or when l1hv as it is differs from
/// the bare machine.
pub fn run(layout: &Layout, progress: &Progress, provisioned: &Provisioned, filter: &str) -> Result<Verdicts> {
    let mutants = list(layout.workspace(), filter)?;
    let scratch = Scratch::make(layout)?;
    let mut suites: BTreeMap<(u32, String, String), (Suite<'_>, Results)> = BTreeMap::new();
    let mut found = Vec::new();
    for mutant in mutants {
        let host = scratch.build(&mutant, layout, progress).with_context(|| mutant.name.clone())?;
        let (suite, bare) = match suites.entry((mutant.cpus, mutant.groups.clone(), mutant.hv_append.clone())) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let place = Place { only: Some(mutant.groups.clone()), ..Place::usual(mutant.cpus) };
                let suite = Suite::build(layout, progress, provisioned, place)?;
                let bare = suite.reference(&mutant.hv_append)?;
                entry.insert((suite, bare))
            }
        };
        let report = suite.compare_host(&host, &mutant.hv_append, bare)?;
        let one = Found { mutant, cases: report.cases, different: report.different };
        eprintln!("{}: {}", one.mutant.name, one.verdict());
        found.push(one);
    }
    Ok(Verdicts(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edit_of_the_list_fits_the_source() {
        let layout = Layout::find().unwrap();
        let mutants = list(layout.workspace(), "").unwrap();
        assert!(mutants.len() > 20);
        for edit in mutants.iter().flat_map(|mutant| &mutant.edits) {
            assert_ne!(edit.from, edit.to);
            edit.apply(layout.workspace()).unwrap();
        }
    }
}
