//! Brings the files that the machines need into the build directory.
//!
//! Each piece is checked by hash or by apt's package signatures when it arrives, carries a stamp of the inputs that it
//! was made from, and is reused while the stamp matches: a second run needs no network.

mod apt;
mod bochs;
mod packages;
mod stamp;
pub mod tools;

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command;
use crate::layout::Layout;
use crate::progress::Progress;

pub use packages::{KERNEL_SERIES, Kernel, Xen};

/// Everything that machines and guests are made from.
#[derive(Debug, Clone)]
pub struct Provisioned {
    /// The emulator with full VMX.
    pub bochs: Bochs,
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// Makes bootable ISO images.
    pub grub_mkrescue: PathBuf,
    /// Makes EFI applications.
    pub grub_mkstandalone: PathBuf,
    /// EFI firmware.
    pub ovmf: PathBuf,
    /// A static busybox.
    pub busybox: PathBuf,
    /// Debian kernels, oldest series first.
    pub kernels: Vec<Kernel>,
}

/// Bochs and its ROM images.
#[derive(Debug, Clone)]
pub struct Bochs {
    /// The program.
    pub binary: PathBuf,
    /// System BIOS image.
    pub bios: PathBuf,
    /// VGA BIOS image.
    pub vga_bios: PathBuf,
}

impl Provisioned {
    /// The kernel of `series`, such as `6.1`.
    pub fn kernel(&self, series: &str) -> Result<&Kernel> {
        self.kernels
            .iter()
            .find(|kernel| kernel.series == series)
            .with_context(|| format!("no Debian kernel {series} is provisioned"))
    }
}

/// Missing files and programs that this run cannot or must not fetch.
#[derive(Debug)]
pub struct Incomplete {
    missing: Vec<String>,
}

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "provisioning is incomplete, missing: {}", self.missing.join("; "))
    }
}

impl std::error::Error for Incomplete {}

/// Brings all files. Returns their places.
///
/// # Errors
/// [`Incomplete`] (to be found by downcasting) lists all that is missing at once.
pub fn provision(layout: &Layout, progress: &Progress) -> Result<Provisioned> {
    let root = layout.root();
    let _lock = lock(&root)?;
    tools::ensure(progress)?;
    let mut missing = Vec::new();
    let apt = apt::Archive::new(root.join("apt"));
    let packages = packages::fetch(&apt, &root.join("packages"), progress);
    let packages = packages.map_err(|error| missing.push(format!("{error:#}"))).ok();
    let binary = match command::from_env("L1HV_BOCHS")? {
        Some(binary) => Some(binary),
        None => bochs::build(&apt, layout, progress).map_err(|error| missing.push(format!("{error:#}"))).ok(),
    };
    if let Err(error) = tools::ensure_rust_target(progress) {
        missing.push(format!("{error:#}"));
    }
    let (Some(packages), Some(binary), true) = (packages, binary, missing.is_empty()) else {
        return Err(Incomplete { missing }.into());
    };
    Ok(Provisioned {
        bochs: Bochs { binary, bios: packages.bios, vga_bios: packages.vga_bios },
        qemu: match command::from_env("L1HV_QEMU")? {
            Some(qemu) => qemu,
            None => tools::path_of("qemu-system-x86_64")?,
        },
        grub_mkrescue: tools::path_of("grub-mkrescue")?,
        grub_mkstandalone: tools::path_of("grub-mkstandalone")?,
        ovmf: packages.ovmf,
        busybox: packages.busybox,
        kernels: packages.kernels,
    })
}

/// Brings Xen, which few runs need.
///
/// # Errors
/// When a package cannot be fetched.
pub fn xen(layout: &Layout, progress: &Progress) -> Result<Xen> {
    let root = layout.root();
    let _lock = lock(&root)?;
    Xen::fetch(&apt::Archive::new(root.join("apt")), &root.join("packages"), progress)
}

/// Installs Debian into a directory, with systemd, a kernel and QEMU. Needs root.
///
/// # Errors
/// When the packages cannot be fetched or installed.
pub fn debian(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    const PACKAGES: &str = "linux-image-cloud-amd64,systemd-sysv,udev,kmod,qemu-system-x86";
    let root = layout.root();
    let _lock = lock(&root)?;
    tools::ensure_mmdebstrap(progress)?;
    let dir = root.join("debian");
    let tree = dir.join("root");
    if stamp::is_fresh(&dir, PACKAGES) {
        return Ok(tree);
    }
    let archive = apt::Archive::new(root.join("apt"));
    archive.refresh()?;
    let step = progress.step("installing Debian");
    stamp::make(&dir, PACKAGES, |staging| {
        command::output(
            std::process::Command::new("mmdebstrap")
                .args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"])
                .arg("--aptopt=APT::Install-Recommends \"false\"")
                .arg(format!("--include={PACKAGES}"))
                .arg(apt::RELEASE)
                .arg(staging.join("root"))
                .arg(archive.sources_file()),
        )
        .map(|_| ())
    })?;
    step.done();
    Ok(tree)
}

/// Tests run side by side: the first one provisions, the others wait for it.
fn lock(root: &Path) -> Result<File> {
    fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    let lock = File::create(root.join("provision.lock"))?;
    lock.lock().context("cannot lock the provisioning directory")?;
    Ok(lock)
}
