//! Where a program can panic, as its ELF file tells: a panic passes a `core::panic::Location`, which the compiler puts
//! into constant data. A check that the optimizer has proved needless leaves none.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::{Object as _, ObjectSegment as _};
use serde::Deserialize;

use crate::layout::Layout;

/// The list of arguments, from the workspace's top directory.
const FILE: &str = "tests-qemu/panics.toml";

/// Why a guest cannot reach the places where l1hv can panic.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Arguments {
    argument: Vec<Argument>,
}

/// One reason.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    /// Why no guest gets there.
    why: String,
    /// File and line of code.
    places: Vec<String>,
}

/// The places that the list argues about.
///
/// # Errors
/// When the list cannot be read, or lacks a reason.
pub fn argued(layout: &Layout) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(layout.workspace().join(FILE)).context(FILE)?;
    let Arguments { argument } = toml::from_str(&text).context(FILE)?;
    if let Some(Argument { places, .. }) = argument.iter().find(|argument| argument.why.trim().is_empty()) {
        bail!("{FILE} has no reason for {}", places.join(", "));
    }
    Ok(argument.into_iter().flat_map(|argument| argument.places).collect())
}

/// The places where `program`, which is built from `workspace`, can panic, as the list writes them: the file and its
/// line of code.
///
/// # Errors
/// When a file cannot be read.
pub fn found(program: &Path, workspace: &Path) -> Result<BTreeSet<String>> {
    let elf = fs::read(program).with_context(|| program.display().to_string())?;
    let places = locations(&elf)?.into_iter().map(|location| location.place(workspace));
    // The macros of `log` pass locations, too.
    Ok(places.filter(|place| !place.contains("log::")).collect())
}

/// A `core::panic::Location`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Location<'a> {
    file: &'a str,
    line: usize,
}

impl Location<'_> {
    fn place(&self, workspace: &Path) -> String {
        let source = fs::read_to_string(workspace.join(self.file)).unwrap_or_default();
        let code = source.lines().nth(self.line - 1).unwrap_or("").trim();
        format!("{}: {code}", shortened(self.file))
    }
}

/// A file of another crate by the crate's name: `name/src/file.rs`.
fn shortened(file: &str) -> String {
    if let Some((_, library)) = file.split_once("/library/") {
        return library.to_owned();
    }
    let Some((_, below)) = file.split_once("/registry/src/") else { return file.to_owned() };
    let (_, package) = below.split_once('/').unwrap_or(("", below));
    let (name, rest) = package.split_once('/').unwrap_or((package, ""));
    let (name, _version) = name.rsplit_once('-').unwrap_or((name, ""));
    format!("{name}/{rest}")
}

/// All words of constant data that have the form of a `Location`: address and length of the file's name, line, column.
fn locations(elf: &[u8]) -> Result<BTreeSet<Location<'_>>> {
    const WORD: usize = size_of::<u64>();
    let file = object::File::parse(elf)?;
    let segments: Vec<(u64, &[u8])> =
        file.segments().map(|segment| Ok((segment.address(), segment.data()?))).collect::<Result<_>>()?;
    let text = |address: u64, length: u64| {
        segments.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(from..from.checked_add(usize::try_from(length).ok()?)?)
        })
    };
    let mut found = BTreeSet::new();
    for words in segments.iter().flat_map(|(_, bytes)| bytes.as_chunks::<WORD>().0.windows(3)) {
        let [address, length, line_and_column] = [0, 1, 2].map(|index| u64::from_le_bytes(words[index]));
        let (line, column) = (line_and_column & 0xffff_ffff, line_and_column >> 32);
        let file = text(address, length).and_then(|bytes| str::from_utf8(bytes).ok());
        if let Some(file) = file.filter(|file| file.ends_with(".rs"))
            && line > 0
            && column > 0
        {
            found.insert(Location { file, line: line as usize });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_crates_have_neither_version_nor_place() {
        assert_eq!(shortened("/home/x/registry/src/host-1/linked_list-0.1.0/src/hole.rs"), "linked_list/src/hole.rs");
        assert_eq!(shortened("/rustc/0123/library/alloc/src/alloc.rs"), "alloc/src/alloc.rs");
        assert_eq!(shortened("l1hv/src/tables.rs"), "l1hv/src/tables.rs");
    }
}
