//! Bochs, built from Debian's source with the patches of `machines/bochs`.
//!
//! A build takes a minute or two and happens again when the source, a patch or an option changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::apt::Archive;
use super::stamp;
use crate::command;
use crate::layout::Layout;
use crate::progress::Progress;

const SOURCE: &str = "bochs_3.0+dfsg.orig.tar.xz";
const SOURCE_SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";

const OPTIONS: &[&str] = &[
    "--with-nogui",
    "--without-x11",
    "--without-x",
    "--enable-cpu-level=6",
    "--enable-x86-64",
    "--enable-vmx=2",
    "--disable-svm",
    "--enable-smp",
    "--enable-avx",
    "--enable-evex",
    "--enable-amx",
    "--enable-protection-keys",
    "--enable-cet",
    "--enable-uintr",
    "--enable-all-optimizations",
    "--enable-pci",
    "--enable-long-phy-address",
    "--disable-docbook",
    "--disable-plugins",
];

const CXXFLAGS: &str = "-O3";

/// A patch file: its name and text.
struct Patch {
    name: String,
    text: String,
}

/// Builds Bochs, unless the same build exists. Returns the program.
pub fn build(archive: &Archive, layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    let patches = patches(&layout.workspace().join("tests-qemu/machines/bochs"))?;
    let key = key(&patches);
    let dir = layout.root().join("bochs");
    let binary = dir.join("bochs");
    if stamp::is_fresh(&dir, &key) && binary.is_file() {
        return Ok(binary);
    }
    let source = layout.root().join("downloads").join(SOURCE);
    fetch(archive, &source, progress)?;
    let step = progress.step(format!("building Bochs with {} patches", patches.len()));
    stamp::make(&dir, &key, |dir| {
        let tree = dir.join("tree");
        fs::create_dir(&tree)?;
        let unpack = ["--strip-components=1", "-xf"];
        command::output(Command::new("tar").args(unpack).arg(&source).current_dir(&tree))?;
        for patch in &patches {
            apply(&tree, patch)?;
        }
        compile(&tree)?;
        fs::rename(tree.join("bochs"), dir.join("bochs"))?;
        Ok(fs::remove_dir_all(tree)?)
    })
    .context("cannot build Bochs")?;
    step.done();
    Ok(binary)
}

fn fetch(archive: &Archive, source: &Path, progress: &Progress) -> Result<()> {
    if source.is_file() && stamp::file_digest(source)? == SOURCE_SHA256 {
        return Ok(());
    }
    let step = progress.step(format!("fetching {SOURCE}"));
    if let Some(dir) = source.parent() {
        fs::create_dir_all(dir)?;
    }
    archive.refresh()?;
    archive.download_source("bochs", SOURCE, SOURCE_SHA256, source)?;
    step.done();
    Ok(())
}

fn patches(dir: &Path) -> Result<Vec<Patch>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("cannot list {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "patch"))
        .collect();
    files.sort();
    files
        .iter()
        .map(|path| {
            Ok(Patch {
                name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                text: fs::read_to_string(path)?,
            })
        })
        .collect()
}

fn key(patches: &[Patch]) -> String {
    let fixed = [SOURCE_SHA256, CXXFLAGS];
    let texts = patches.iter().map(|patch| patch.text.as_str());
    stamp::digest(fixed.into_iter().chain(OPTIONS.iter().copied()).chain(texts).map(str::as_bytes))
}

fn apply(tree: &Path, patch: &Patch) -> Result<()> {
    let file = tree.join(&patch.name);
    fs::write(&file, &patch.text)?;
    let options = ["--strip=1", "--forward", "--fuzz=0", "--input"];
    command::output(Command::new("patch").args(options).arg(&file).current_dir(tree))
        .with_context(|| format!("patch {} does not apply", patch.name))?;
    Ok(())
}

fn compile(tree: &Path) -> Result<()> {
    let configure = tree.join("configure");
    command::output(
        Command::new(configure)
            .args(OPTIONS)
            .env("CXXFLAGS", CXXFLAGS)
            .env("CFLAGS", CXXFLAGS)
            .current_dir(tree)
            .stdin(Stdio::null()),
    )?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    command::output(Command::new("make").arg(format!("-j{jobs}")).arg("bochs").current_dir(tree))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_patch_asks_for_another_build() {
        let patch = |text: &str| Patch { name: "0001.patch".into(), text: text.into() };
        assert_ne!(key(&[patch("a")]), key(&[patch("b")]));
        assert_ne!(key(&[patch("a")]), key(&[]));
    }

    #[test]
    fn every_patch_says_what_it_restores() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("machines/bochs");
        for patch in patches(&dir).unwrap() {
            let header = patch.text.split("\n--- ").next().unwrap();
            let explains = header.contains("Restores: Intel SDM")
                || header.starts_with("Speed, not correctness")
                || header.starts_with("Testing, not correctness");
            assert!(explains, "{} has no header", patch.name);
        }
    }
}
