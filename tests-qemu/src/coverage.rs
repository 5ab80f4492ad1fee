//! Which lines of l1hv have executed: the emulator notes each instruction in a file, the program's line table says which
//! lines it is of.
//!
//! A directory of coverage holds the program itself, too, so that it tells its lines when the tree has changed. A line
//! counts if the compiler has made instructions of it, and is executed if any of them is, in any copy that inlining has
//! made.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use addr2line::Loader;
use anyhow::{Context, Result, anyhow, bail, ensure};
use object::{Object as _, ObjectSection as _};
use table::Table;

use crate::layout::Layout;

const PROGRAM: &str = "l1hv";
const EXECUTED: &str = "executed";

/// What the emulator gets: where the program's code is, and the file with a byte for each of its addresses.
#[derive(Debug)]
pub struct Notes {
    /// The first linear address.
    pub base: u64,
    /// The file.
    pub file: PathBuf,
}

impl Notes {
    /// The notes of `dir` about `program`, which are empty at first, and are added to in later runs.
    ///
    /// # Errors
    /// When they are about another program, or cannot be written.
    pub fn open(dir: &Path, program: &Path) -> Result<Self> {
        let elf = fs::read(program).with_context(|| program.display().to_string())?;
        let (base, bytes) = code(&elf)?;
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let (kept, file) = (dir.join(PROGRAM), dir.join(EXECUTED));
        create_whole(&kept, &elf)?;
        if fs::read(&kept)? != elf {
            bail!("{} is about another build of l1hv: name another directory", dir.display());
        }
        create_whole(&file, &vec![0; bytes])?;
        // The emulator runs in a directory of its own.
        Ok(Self { base, file: fs::canonicalize(file)? })
    }
}

/// Makes a file, unless it exists, so that another process sees all of it or nothing.
fn create_whole(file: &Path, content: &[u8]) -> Result<()> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    if file.exists() {
        return Ok(());
    }
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let own = file.with_extension(format!("{}-{number}", process::id()));
    let made = fs::write(&own, content).and_then(|()| fs::hard_link(&own, file));
    let _ = fs::remove_file(&own);
    match made {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Address and size of a program's code.
fn code(elf: &[u8]) -> Result<(u64, usize)> {
    let file = object::File::parse(elf)?;
    let text = file.section_by_name(".text").context("the program has no section .text")?;
    Ok((text.address(), usize::try_from(text.size())?))
}

/// The lines of the files, and whether they have executed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    files: BTreeMap<String, Lines>,
}

type Lines = BTreeMap<u32, bool>;

impl Coverage {
    /// What the notes of `dir` say about the files of the workspace.
    ///
    /// # Errors
    /// When there are none, or the program has no line table.
    pub fn read(dir: &Path, layout: &Layout) -> Result<Self> {
        let program = dir.join(PROGRAM);
        let elf = fs::read(&program)
            .with_context(|| format!("{} has no coverage: let a run write it, with --coverage", dir.display()))?;
        let executed = fs::read(dir.join(EXECUTED)).with_context(|| dir.display().to_string())?;
        let (base, bytes) = code(&elf)?;
        let loader = Loader::new(&program).map_err(|error| anyhow!("{}: {error}", program.display()))?;
        let rows = loader
            .find_location_range(base, base + bytes as u64)
            .map_err(|error| anyhow!("{}: {error}", program.display()))?;
        let mut coverage = Self::default();
        for (address, length, location) in rows {
            let (Some(file), Some(line)) = (location.file, location.line) else { continue };
            let Ok(file) = Path::new(file).strip_prefix(layout.workspace()) else { continue };
            let from = usize::try_from(address - base)?;
            let has_executed = executed.iter().skip(from).take(usize::try_from(length)?).any(|&byte| byte != 0);
            coverage.add(&file.to_string_lossy(), line, has_executed);
        }
        ensure!(!coverage.files.is_empty(), "{} is about an l1hv that was built in another directory", dir.display());
        Ok(coverage)
    }

    fn add(&mut self, file: &str, line: u32, has_executed: bool) {
        *self.files.entry(file.to_owned()).or_default().entry(line).or_default() |= has_executed;
    }

    /// The files whose paths contain `filter`.
    pub fn only(mut self, filter: &str) -> Self {
        self.files.retain(|file, _| file.contains(filter));
        self
    }

    /// A row for each directory, and one for all.
    pub fn by_directory(&self) -> String {
        let mut directories: BTreeMap<&str, Sum> = BTreeMap::new();
        for (file, lines) in &self.files {
            let directory = file.rsplit_once('/').map_or("", |(directory, _)| directory);
            directories.entry(directory).or_default().add(lines);
        }
        table("directory", directories)
    }

    /// A row for each file, one for all, and the lines that have not executed.
    pub fn by_file(&self) -> String {
        let sums = self.files.iter().map(|(file, lines)| {
            let mut sum = Sum::default();
            sum.add(lines);
            (file.as_str(), sum)
        });
        let mut text = table("file", sums);
        for (file, lines) in &self.files {
            let missed = missed(lines);
            if !missed.is_empty() {
                // Formatting into a string cannot fail.
                let _ = writeln!(text, "{file}: {}", missed.join(", "));
            }
        }
        text
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Sum {
    lines: u64,
    executed: u64,
}

impl Sum {
    fn add(&mut self, lines: &Lines) {
        self.lines += lines.len() as u64;
        self.executed += lines.values().filter(|&&executed| executed).count() as u64;
    }

    fn columns(self) -> [Option<u64>; 3] {
        [Some(self.lines), Some(self.executed), (self.executed * 100).checked_div(self.lines)]
    }
}

fn table<'a>(heading: &str, rows: impl IntoIterator<Item = (&'a str, Sum)>) -> String {
    let mut table = Table::new(&[heading, "lines with code", "executed", "%"]);
    let mut all = Sum::default();
    for (name, sum) in rows {
        all.lines += sum.lines;
        all.executed += sum.executed;
        table.row(name, sum.columns());
    }
    table.row("all", all.columns());
    table.render()
}

/// The lines that have not executed. Those that only lines without code separate make one range.
fn missed(lines: &Lines) -> Vec<String> {
    let lines: Vec<(&u32, &bool)> = lines.iter().collect();
    let ranges = lines.chunk_by(|one, next| one.1 == next.1).filter(|range| !range[0].1);
    ranges
        .map(|range| match range {
            [(only, _)] => only.to_string(),
            [(first, _), .., (last, _)] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_executed_if_one_of_its_copies_has() {
        let mut coverage = Coverage::default();
        for (line, executed) in [(1, false), (1, true), (2, false), (4, false), (5, true), (9, false)] {
            coverage.add("shadow/src/sync.rs", line, executed);
        }
        coverage.add("ept/src/lib.rs", 1, true);
        assert_eq!(missed(&coverage.files["shadow/src/sync.rs"]), ["2-4", "9"]);
        let text = coverage.only("shadow").by_file();
        assert!(text.contains("shadow/src/sync.rs") && !text.contains("ept/"), "{text}");
        assert!(text.contains(" 40\n"), "2 of 5 lines\n{text}");
    }

    #[test]
    fn notes_are_about_one_program() {
        let dir = std::env::temp_dir().join(format!("l1hv-coverage-{}", process::id()));
        let this = std::env::current_exe().unwrap();
        let notes = Notes::open(&dir, &this).unwrap();
        assert!(fs::metadata(&notes.file).unwrap().len() > 0);
        Notes::open(&dir, &this).unwrap();
        fs::write(dir.join(PROGRAM), "another").unwrap();
        assert!(Notes::open(&dir, &this).unwrap_err().to_string().contains("another build"));
        fs::remove_dir_all(dir).unwrap();
    }
}
