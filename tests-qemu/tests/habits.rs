//! Checks of the code by formatter, linter and documentation tool, for this host and for the bare machine. A warning is
//! an error. And checks of the crates that the code depends on, by cargo's metadata.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use tests_qemu::build::{self, BARE_TARGET};
use tests_qemu::command;
use tests_qemu::layout::Layout;
use tests_qemu::panics;
use tests_qemu::progress::Progress;
use tests_qemu::provision;

/// The crates that run without an operating system, or have parts that exist only there.
const BARE: [&str; 6] = ["l1hv", "boot", "payload", "multiboot-guest", "conformance-guest", "sector-guest"];

fn layout() -> Layout {
    Layout::find().expect("the workspace is where it was built")
}

/// Runs cargo in a target directory that no other test builds in; returns its output.
fn cargo(args: &[&str]) -> Vec<u8> {
    let layout = layout();
    let output = command::cargo()
        .args(args)
        .current_dir(layout.workspace())
        .env("CARGO_TARGET_DIR", layout.root().join("habits"))
        .env("RUSTDOCFLAGS", "-Dwarnings")
        .output()
        .expect("cargo starts");
    assert!(
        output.status.success(),
        "cargo {}\n{}{}",
        args.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Runs cargo with the arguments `first`, the bare crates, and `last`.
fn cargo_bare(first: &str, last: &[&str]) {
    let layout = layout();
    provision::provision(&layout, &Progress::silent()).expect("the target is there");
    let packages = BARE.iter().flat_map(|package| ["--package", package]);
    let args: Vec<&str> =
        [first, "--quiet", "--target", BARE_TARGET].into_iter().chain(packages).chain(last.iter().copied()).collect();
    cargo(&args);
}

#[test]
fn the_code_is_formatted() {
    cargo(&["fmt", "--all", "--check"]);
}

#[test]
fn no_lint_warns() {
    cargo(&["clippy", "--quiet", "--all-targets", "--", "-Dwarnings"]);
    cargo_bare("clippy", &["--", "-Dwarnings"]);
}

#[test]
fn the_documentation_has_no_dead_link() {
    cargo(&["doc", "--quiet", "--no-deps"]);
    cargo_bare("doc", &["--no-deps"]);
}

/// The list says why no guest gets there.
#[test]
fn every_place_where_l1hv_can_panic_is_argued_about() {
    let layout = layout();
    provision::provision(&layout, &Progress::silent()).expect("the target is there");
    let program = build::l1hv(&layout, &Progress::silent()).expect("l1hv is built");
    let found = panics::found(&program, layout.workspace()).expect("the program is there");
    let argued = panics::argued(&layout).expect("the list is there");
    let new: Vec<&String> = found.difference(&argued).collect();
    let gone: Vec<&String> = argued.difference(&found).collect();
    assert!(new.is_empty() && gone.is_empty(), "without an argument: {new:#?}\nargued about and gone: {gone:#?}");
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    metadata: WorkspaceMetadata,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a crate of this workspace.
    source: Option<String>,
    rust_version: Option<String>,
}

/// The workspace's own metadata in Cargo.toml.
#[derive(Deserialize)]
struct WorkspaceMetadata {
    dependencies: Policy,
}

#[derive(Deserialize)]
struct Policy {
    licences: Vec<String>,
    duplicates: Vec<String>,
}

impl Policy {
    /// Whether an expression offers a listed licence. AND is read as the operator that binds last. If it binds earlier,
    /// an expression may be refused wrongly, but none is permitted wrongly.
    fn permits(&self, expression: &str) -> bool {
        let is_listed = |name: &str| self.licences.iter().any(|licence| licence == name.trim_matches(['(', ')', ' ']));
        expression.split(" AND ").all(|part| part.split(" OR ").flat_map(|choice| choice.split('/')).any(is_listed))
    }
}

fn metadata() -> Metadata {
    let platform = "x86_64-unknown-linux-gnu";
    let json = cargo(&["metadata", "--locked", "--format-version", "1", "--filter-platform", platform]);
    serde_json::from_slice(&json).expect("cargo describes the workspace")
}

#[test]
fn dependencies_are_from_one_registry_under_listed_licences_in_one_version_each() {
    let Metadata { packages, metadata: WorkspaceMetadata { dependencies: policy } } = metadata();
    let foreign: Vec<&Package> = packages.iter().filter(|package| package.source.is_some()).collect();
    let sources: BTreeSet<&str> = foreign.iter().filter_map(|package| package.source.as_deref()).collect();
    assert!(sources.len() == 1 && sources.iter().all(|source| source.starts_with("registry+")), "{sources:?}");
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for Package { name, version, license, .. } in foreign {
        let licence = license.as_deref().unwrap_or("none");
        assert!(policy.permits(licence), "{name} {version}: {licence} is not listed in Cargo.toml");
        versions.entry(name).or_default().push(version);
    }
    let duplicates: Vec<&str> =
        versions.iter().filter(|(_, versions)| versions.len() > 1).map(|(name, _)| *name).collect();
    assert_eq!(
        duplicates, policy.duplicates,
        "crates in several versions, and those that Cargo.toml lists: {versions:?}"
    );
}

#[test]
fn a_licence_is_permitted_if_every_part_offers_a_listed_one() {
    let policy = Policy { licences: vec!["MIT".into(), "Unicode-3.0".into()], duplicates: Vec::new() };
    for permitted in ["MIT", "GPL-3.0 OR MIT", "Apache-2.0/MIT", "(MIT OR Apache-2.0) AND Unicode-3.0"] {
        assert!(policy.permits(permitted), "{permitted}");
    }
    for refused in ["none", "MITX", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND GPL-3.0"] {
        assert!(!policy.permits(refused), "{refused}");
    }
}

#[test]
fn the_oldest_rust_that_the_crates_name_is_the_one_they_are_tested_with() {
    let toolchain = std::fs::read_to_string(layout().workspace().join("rust-toolchain.toml")).expect("it is there");
    let toolchain: toml::Table = toolchain.parse().expect("it is TOML");
    let channel = toolchain["toolchain"]["channel"].as_str().expect("the toolchain has a number");
    for Package { name, source, rust_version, .. } in metadata().packages {
        if source.is_none() {
            let version = rust_version.unwrap_or_default();
            assert!(channel == format!("{version}.0"), "{name} names Rust {version}, the toolchain is {channel}");
        }
    }
}
