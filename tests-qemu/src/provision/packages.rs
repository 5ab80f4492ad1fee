//! Debian packages that are unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::apt::Archive;
use super::stamp;
use crate::command;
use crate::progress::Progress;

/// Kernel series that serve as guest hypervisors, oldest first; Debian 12 has both.
pub const KERNEL_SERIES: [&str; 2] = ["6.1", "6.12"];

/// A Debian kernel with its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// First two numbers of the version, such as `6.1`.
    pub series: String,
    /// Kernel release, such as `6.1.0-37-cloud-amd64`.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Directory of the modules, `lib/modules/<release>`.
    pub modules: PathBuf,
}

/// The files of the packages.
#[derive(Debug)]
pub struct Packages {
    pub bios: PathBuf,
    pub vga_bios: PathBuf,
    pub ovmf: PathBuf,
    pub busybox: PathBuf,
    pub kernels: Vec<Kernel>,
}

/// Unpacks all packages below `dir`.
pub fn fetch(archive: &Archive, dir: &Path, progress: &Progress) -> Result<Packages> {
    let package = |name: &str| unpack(archive, dir, name, |_| Ok(vec![name.to_owned()]), progress);
    Ok(Packages {
        bios: package("bochsbios")?.join("usr/share/bochs/BIOS-bochs-latest"),
        vga_bios: package("vgabios")?.join("usr/share/vgabios/vgabios.bin"),
        ovmf: package("ovmf")?.join("usr/share/ovmf/OVMF.fd"),
        busybox: package("busybox-static")?.join("bin/busybox"),
        kernels: KERNEL_SERIES.iter().map(|series| kernel(archive, dir, series, progress)).collect::<Result<_>>()?,
    })
}

fn kernel(archive: &Archive, dir: &Path, series: &str, progress: &Progress) -> Result<Kernel> {
    kernel_of_flavour(archive, dir, &format!("linux-{series}"), (series, "-cloud-amd64"), progress)
}

/// The newest kernel of a series and a flavour, unpacked as `key`.
fn kernel_of_flavour(
    archive: &Archive,
    dir: &Path,
    key: &str,
    (series, flavour): (&str, &str),
    progress: &Progress,
) -> Result<Kernel> {
    let names = |archive: &Archive| archive.names(&format!("linux-image-{series}."));
    let newest = |archive: &Archive| Ok(vec![newest_kernel(&names(archive)?, series, flavour)?]);
    let root = unpack(archive, dir, key, newest, progress)?;
    let modules = fs::read_dir(root.join("lib/modules"))
        .and_then(|mut entries| entries.next().transpose())
        .with_context(|| format!("no modules in {}", root.display()))?
        .with_context(|| format!("no modules in {}", root.display()))?
        .path();
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Kernel { series: series.to_owned(), image: root.join(format!("boot/vmlinuz-{release}")), release, modules })
}

/// Unpacks the packages that `names_of` finds into `dir/key`, unless that exists.
fn unpack(
    archive: &Archive,
    dir: &Path,
    key: &str,
    names_of: impl Fn(&Archive) -> Result<Vec<String>>,
    progress: &Progress,
) -> Result<PathBuf> {
    let root = dir.join(key);
    if !stamp::is_fresh(&root, key) {
        let step = progress.step(format!("fetching Debian package {key}"));
        archive.refresh()?;
        let names = names_of(archive)?;
        stamp::make(&root, key, |staging| {
            for name in &names {
                let file = archive.download(name, staging)?;
                command::output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(staging))?;
                fs::remove_file(file)?;
            }
            Ok(())
        })?;
        step.done();
    }
    Ok(root)
}

/// The newest kernel of `series` and `flavour` among `names`: signed, without debug symbols.
fn newest_kernel(names: &[String], series: &str, flavour: &str) -> Result<String> {
    names
        .iter()
        .filter(|name| is_release(name.strip_prefix("linux-image-").and_then(|name| name.strip_suffix(flavour))))
        .max_by_key(|name| numbers(name))
        .cloned()
        .with_context(|| format!("Debian has no package linux-image-{series}.*{flavour}"))
}

/// Whether a name without its flavour is a version with nothing else.
fn is_release(version: Option<&str>) -> bool {
    version.is_some_and(|version| {
        let version = version.split_once("+deb").map_or(version, |(number, _)| number);
        version.chars().all(|c| c.is_ascii_digit() || c == '.' || c == '-')
    })
}

/// The runs of digits in `name`, for comparing versions.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|run| run.parse().ok()).collect()
}

/// Xen with a kernel for its first domain, and the programs that make others.
#[derive(Debug, Clone)]
pub struct Xen {
    /// The hypervisor, a multiboot 1 image.
    pub hypervisor: PathBuf,
    /// The kernel of the first domain.
    pub kernel: Kernel,
    /// The unpacked packages.
    pub root: PathBuf,
}

impl Xen {
    /// The packages besides the kernel. Libraries that every Debian system has are not among them.
    const PACKAGES: [&str; 22] = [
        "xen-hypervisor-4.17-amd64",
        "xen-utils-4.17",
        "xen-utils-common",
        "xenstore-utils",
        "libcom-err2",
        "libext2fs2",
        "libgcc-s1",
        "libncurses6",
        "libspice-server1",
        "libxencall1",
        "libxendevicemodel1",
        "libxenevtchn1",
        "libxenforeignmemory1",
        "libxengnttab1",
        "libxenhypfs1",
        "libxenmisc4.17",
        "libxenstore4",
        "libxentoolcore1",
        "libxentoollog1",
        "libyajl2",
        "qemu-system-xen",
        "seabios",
    ];

    /// Unpacks the packages below `dir`.
    pub fn fetch(archive: &Archive, dir: &Path, progress: &Progress) -> Result<Self> {
        let names = |_: &Archive| Ok(Self::PACKAGES.map(str::to_owned).to_vec());
        let root = unpack(archive, dir, "xen-4.17", names, progress)?;
        let hypervisor = root.join("boot/xen-4.17-amd64");
        if !hypervisor.is_file() {
            command::output(Command::new("gunzip").arg("--keep").arg(root.join("boot/xen-4.17-amd64.gz")))?;
        }
        let kernel = kernel_of_flavour(archive, dir, "linux-6.1-xen", (KERNEL_SERIES[0], "-amd64"), progress)?;
        Ok(Self { hypervisor, kernel, root })
    }

    /// The directories of its libraries.
    pub fn libraries(&self) -> [PathBuf; 2] {
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| self.root.join(dir))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_chosen_by_number_not_by_letter() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-37-cloud-amd64",
            "linux-image-6.1.0-38-cloud-amd64-unsigned",
            "linux-image-6.1.0-39-amd64",
        ]
        .map(str::to_owned);
        let newest = |names, flavour| newest_kernel(names, "6.1", flavour);
        assert_eq!(newest(&names, "-cloud-amd64").unwrap(), "linux-image-6.1.0-37-cloud-amd64");
        assert_eq!(newest(&names, "-amd64").unwrap(), "linux-image-6.1.0-39-amd64");
        assert!(newest(&names[3..], "-cloud-amd64").is_err());
    }
}
