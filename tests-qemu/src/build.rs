//! Builds the programs that run inside machines.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use object::{Object, ObjectSection};

use crate::command;
use crate::layout::Layout;
use crate::progress::Progress;

pub use crate::provision::tools::BARE_TARGET;

/// Target of the programs that run on the guests' Linux.
const LINUX_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds l1hv; returns its ELF file.
pub fn l1hv(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    let step = progress.step("building l1hv");
    let elf = l1hv_in(layout.workspace(), &layout.bare_target())?;
    step.done();
    Ok(elf)
}

/// Builds the l1hv of a workspace in a target directory; returns its ELF file.
pub fn l1hv_in(workspace: &Path, target: &Path) -> Result<PathBuf> {
    cargo_build(workspace, target, &["--package", "l1hv", "--target", BARE_TARGET], "")?;
    Ok(target.join(BARE_TARGET).join("release/l1hv"))
}

/// Builds the image of the differential suite; returns its ELF file.
pub fn conformance(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    let step = progress.step("building the conformance image");
    cargo_build(
        layout.workspace(),
        &layout.bare_target(),
        &["--package", "conformance-guest", "--target", BARE_TARGET],
        "",
    )?;
    step.done();
    Ok(layout.bare_target().join(BARE_TARGET).join("release/conformance-guest"))
}

/// Programs for the root file system of the guest hypervisor.
#[derive(Debug, Clone)]
pub struct GuestPrograms {
    /// The static VMM.
    pub vmm: PathBuf,
    /// The parallel workload for several processors.
    pub parallel: PathBuf,
    /// The bare-metal payload.
    pub payload: PathBuf,
    /// A multiboot kernel that prints the loader's information.
    pub multiboot_guest: PathBuf,
    /// A multiboot kernel that starts as test images of other projects do.
    pub test_image: PathBuf,
    /// A disk whose boot sector prints what the BIOS tells of memory.
    pub sector_disk: PathBuf,
    /// The image of the differential suite, which is also the minimal guest hypervisor.
    pub conformance: PathBuf,
}

/// Builds the guest-side programs.
pub fn guest_programs(layout: &Layout, progress: &Progress) -> Result<GuestPrograms> {
    let step = progress.step("building the guests");
    let bare = [
        "--package",
        "payload",
        "--package",
        "multiboot-guest",
        "--package",
        "conformance-guest",
        "--package",
        "sector-guest",
    ];
    let (workspace, built) = (layout.workspace(), layout.bare_target());
    cargo_build(workspace, &built, &[&bare[..], &["--target", BARE_TARGET]].concat(), "")?;
    let is_static = "-C target-feature=+crt-static -C strip=symbols";
    let linux = ["--package", "vmm", "--package", "parallel", "--target", LINUX_TARGET];
    cargo_build(workspace, &built, &linux, is_static)?;
    step.done();
    Ok(GuestPrograms {
        vmm: built.join(LINUX_TARGET).join("release/vmm"),
        parallel: built.join(LINUX_TARGET).join("release/parallel"),
        payload: built.join(BARE_TARGET).join("release/payload"),
        multiboot_guest: built.join(BARE_TARGET).join("release/multiboot-guest"),
        test_image: built.join(BARE_TARGET).join("release/test-image"),
        sector_disk: disk_of(&built.join(BARE_TARGET).join("release/sector-guest"))?,
        conformance: built.join(BARE_TARGET).join("release/conformance-guest"),
    })
}

/// A disk with the boot sector that is a section of the ELF file.
fn disk_of(elf: &Path) -> Result<PathBuf> {
    const DISK_BYTES: usize = 10 << 20;
    let file = fs::read(elf).with_context(|| elf.display().to_string())?;
    let program = object::File::parse(&*file)?;
    let mut sectors =
        program.section_by_name(".sector").context("the program has no section .sector")?.data()?.to_vec();
    sectors.resize(DISK_BYTES, 0);
    let disk = elf.with_extension("img");
    fs::write(&disk, sectors)?;
    Ok(disk)
}

/// Runs a release build in a target directory of its own.
fn cargo_build(workspace: &Path, target: &Path, args: &[&str], rustflags: &str) -> Result<()> {
    let mut command = command::cargo();
    command.args(["build", "--release", "--quiet"]).args(args).current_dir(workspace).env("CARGO_TARGET_DIR", target);
    if !rustflags.is_empty() {
        command.env("RUSTFLAGS", rustflags);
    }
    command::output(&mut command).with_context(|| format!("cannot build {}", args.join(" ")))?;
    Ok(())
}
