//! Other programs, with errors that say which one failed and how.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Lines of a failed program's output that an error message keeps.
const ERROR_LINES: usize = 12;

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When the command cannot be started or fails. The message ends with the last lines of its output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        bail!("{name} failed ({}):\n{}", output.status, tail(&String::from_utf8_lossy(&text), ERROR_LINES));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The cargo that runs this program, or else the one on `PATH`.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The last `count` lines of `text`, indented.
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let kept = &lines[lines.len().saturating_sub(count)..];
    kept.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// `word` quoted for a shell and for GRUB's script language: in single quotes only the quote itself is special.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Finds `program` on `PATH`, or in the directories of administrators' programs.
pub fn which(program: impl AsRef<Path>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(&program))
        .find(|file| file.is_file())
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0")
}

/// The program that the environment variable `variable` names, if the variable is set.
pub fn from_env(variable: &str) -> Result<Option<PathBuf>> {
    match std::env::var_os(variable).filter(|value| value != OsStr::new("")) {
        None => Ok(None),
        Some(value) => match which(&value) {
            Some(path) => Ok(Some(path)),
            None => bail!("{variable} names {}, which is not a file", value.display()),
        },
    }
}
