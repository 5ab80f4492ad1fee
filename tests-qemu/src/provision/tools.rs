//! Programs of the system that the runner calls.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Incomplete;
use crate::command::{self, is_root, which};
use crate::progress::Progress;

/// A program or file, and the Debian package that brings it.
struct Tool {
    name: &'static str,
    package: &'static str,
}

const fn tool(name: &'static str, package: &'static str) -> Tool {
    Tool { name, package }
}

const TOOLS: &[Tool] = &[
    tool("dpkg-deb", "dpkg"),
    tool("tar", "tar"),
    tool("xz", "xz-utils"),
    tool("patch", "patch"),
    tool("make", "make"),
    tool("g++", "g++"),
    tool("grub-mkrescue", "grub-common"),
    tool("/usr/lib/grub/i386-pc/multiboot.mod", "grub-pc-bin"),
    tool("/usr/lib/grub/x86_64-efi/multiboot2.mod", "grub-efi-amd64-bin"),
    tool("xorriso", "xorriso"),
    tool("mformat", "mtools"),
    tool("qemu-system-x86_64", "qemu-system-x86"),
];

/// Target of l1hv itself and of the bare-metal guests.
pub const BARE_TARGET: &str = "x86_64-unknown-none";

fn missing() -> Vec<&'static Tool> {
    TOOLS
        .iter()
        .filter(|tool| which(tool.name).is_none())
        // An explicit QEMU makes the packaged one unnecessary.
        .filter(|tool| tool.package != "qemu-system-x86" || std::env::var_os("L1HV_QEMU").is_none())
        .collect()
}

/// Installs missing tools, if this process may.
pub fn ensure(progress: &Progress) -> Result<()> {
    let wanted = missing();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = wanted.iter().map(|tool| tool.package).collect();
    packages.dedup();
    if is_root() && which("apt-get").is_some() {
        let step = progress.step(format!("installing {}", packages.join(" ")));
        install(&packages)
            .map_err(|error| Incomplete { missing: vec![format!("packages {} ({error:#})", packages.join(" "))] })?;
        step.done();
    }
    let missing: Vec<String> =
        missing().iter().map(|tool| format!("{} (Debian package {})", tool.name, tool.package)).collect();
    if missing.is_empty() { Ok(()) } else { Err(Incomplete { missing }.into()) }
}

/// Installs what makes a disk with Debian, unless it is here.
pub fn ensure_mmdebstrap(progress: &Progress) -> Result<()> {
    const NEEDED: [(&str, &str); 2] = [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs")];
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(name, _)| which(name).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let step = progress.step(format!("installing {}", missing.join(" ")));
    install(&missing)?;
    step.done();
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let install = || {
        command::output(
            Command::new("apt-get")
                .args(["install", "--yes", "--no-install-recommends"])
                .args(packages)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    // The first try may fail because package lists are absent or out of date.
    if install().is_err() {
        command::output(Command::new("apt-get").arg("update"))?;
        install()?;
    }
    Ok(())
}

/// The path of the program `name`.
pub fn path_of(name: &str) -> Result<PathBuf> {
    which(name).with_context(|| format!("{name} has vanished from PATH"))
}

/// Makes the bare-metal target's core library available to cargo.
pub fn ensure_rust_target(progress: &Progress) -> Result<()> {
    if has_rust_target() {
        return Ok(());
    }
    let step = progress.step(format!("adding the Rust target {BARE_TARGET}"));
    command::output(Command::new("rustup").args(["target", "add", BARE_TARGET]))
        .with_context(|| format!("the Rust target {BARE_TARGET} is not installed"))?;
    step.done();
    Ok(())
}

fn has_rust_target() -> bool {
    let query = ["--print", "target-libdir", "--target", BARE_TARGET];
    command::output(Command::new("rustc").args(query)).is_ok_and(|dir| Path::new(dir.trim()).is_dir())
}
