//! A root file system in memory: the newc cpio archive that Linux unpacks.
//!
//! Format: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive under construction. Paths are relative to the root; missing directories are made.
#[derive(Debug, Default)]
pub struct Initrd {
    data: Vec<u8>,
    directories: BTreeSet<String>,
    programs: BTreeSet<String>,
    inodes: u32,
}

impl Initrd {
    /// Adds a regular file with permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, REGULAR | mode, (0, 0), content);
    }

    /// Adds a copy of `source`.
    pub fn copy(&mut self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.file(path, mode, &content);
        Ok(())
    }

    /// Adds a program of the directory tree `root` at its path there, and the libraries that it needs, unless they are
    /// there already. `libraries` are the tree's directories of libraries; the others are this machine's.
    ///
    /// # Errors
    /// When a file cannot be read, or a library is nowhere.
    pub fn program(&mut self, program: &Path, root: &Path, libraries: &[PathBuf]) -> Result<()> {
        let search = std::env::join_paths(libraries)?;
        let listed = command::output(Command::new("ldd").arg(program).env("LD_LIBRARY_PATH", search))?;
        ensure!(!listed.contains("not found"), "{} lacks libraries:\n{listed}", program.display());
        for file in listed.lines().filter_map(library).chain([program.to_owned()]) {
            let path = file.strip_prefix(root).or_else(|_| file.strip_prefix("/"))?.display().to_string();
            if self.programs.insert(path.clone()) {
                self.copy(&path, 0o755, &file)?;
            }
        }
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) {
        self.parents(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
        }
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.data
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            self.directory(&path[..end]);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inodes += 1;
        let header = [
            self.inodes,
            mode,
            0, // owner
            0, // group
            1, // links
            0, // time: the same input makes the same archive
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // no checksum in this format
        ];
        self.data.extend_from_slice(b"070701");
        for field in header {
            self.data.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.data.extend_from_slice(path.as_bytes());
        self.data.push(0);
        self.pad();
        self.data.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(4), 0);
    }
}

/// The file in a line of ldd's: `NAME => FILE (ADDRESS)` or `FILE (ADDRESS)`.
fn library(line: &str) -> Option<PathBuf> {
    let line = line.split_once("=> ").map_or(line, |(_, file)| file).trim();
    let file = line.split_whitespace().next()?;
    file.starts_with('/').then(|| file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: &[u8]) -> Vec<String> {
        let field = |at: usize| usize::from_str_radix(std::str::from_utf8(&archive[at..at + 8]).unwrap(), 16).unwrap();
        let mut names = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let (size, name_size) = (field(at + 54), field(at + 94));
            let name = &archive[at + 110..at + 110 + name_size - 1];
            names.push(String::from_utf8(name.to_vec()).unwrap());
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        names
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_only_once() {
        let mut initrd = Initrd::default();
        initrd.file("bin/sh", 0o755, b"12345");
        initrd.symlink("bin/ls", "sh");
        initrd.character_device("dev/console", 5, 1);
        let names = names(&initrd.finish());
        assert_eq!(names, ["bin", "bin/sh", "bin/ls", "dev", "dev/console", "TRAILER!!!"]);
    }

    #[test]
    fn libraries_are_found_in_both_kinds_of_lines() {
        assert_eq!(library("\tlinux-vdso.so.1 (0x7ffc)"), None);
        assert_eq!(library("\tlibc.so.6 => /lib/libc.so.6 (0x7f)"), Some("/lib/libc.so.6".into()));
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x7f)"), Some("/lib64/ld-linux-x86-64.so.2".into()));
    }
}
