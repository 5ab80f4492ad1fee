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
    pub busybox: PathBuf,
    pub kernels: Vec<Kernel>,
}

/// Unpacks all packages below `dir`.
pub fn fetch(archive: &Archive, dir: &Path, progress: &Progress) -> Result<Packages> {
    let package = |name: &str| unpack(archive, dir, name, |_| Ok(name.to_owned()), progress);
    Ok(Packages {
        bios: package("bochsbios")?.join("usr/share/bochs/BIOS-bochs-latest"),
        vga_bios: package("vgabios")?.join("usr/share/vgabios/vgabios.bin"),
        busybox: package("busybox-static")?.join("bin/busybox"),
        kernels: KERNEL_SERIES.iter().map(|series| kernel(archive, dir, series, progress)).collect::<Result<_>>()?,
    })
}

fn kernel(archive: &Archive, dir: &Path, series: &str, progress: &Progress) -> Result<Kernel> {
    let newest = |archive: &Archive| newest_kernel(&archive.names(&format!("linux-image-{series}."))?, series);
    let root = unpack(archive, dir, &format!("linux-{series}"), newest, progress)?;
    let modules = fs::read_dir(root.join("lib/modules"))
        .and_then(|mut entries| entries.next().transpose())
        .with_context(|| format!("no modules in {}", root.display()))?
        .with_context(|| format!("no modules in {}", root.display()))?
        .path();
    let release = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Kernel { series: series.to_owned(), image: root.join(format!("boot/vmlinuz-{release}")), release, modules })
}

/// Unpacks the package that `name_of` finds into `dir/key`, unless that exists.
fn unpack(
    archive: &Archive,
    dir: &Path,
    key: &str,
    name_of: impl Fn(&Archive) -> Result<String>,
    progress: &Progress,
) -> Result<PathBuf> {
    let root = dir.join(key);
    if !stamp::is_fresh(&root, key) {
        let step = progress.step(format!("fetching Debian package {key}"));
        archive.refresh()?;
        let name = name_of(archive)?;
        stamp::make(&root, key, |staging| {
            let file = archive.download(&name, staging)?;
            command::output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(staging))?;
            Ok(fs::remove_file(file)?)
        })?;
        step.done();
    }
    Ok(root)
}

/// The newest cloud kernel of `series` among `names`: signed, without debug symbols.
fn newest_kernel(names: &[String], series: &str) -> Result<String> {
    names
        .iter()
        .filter(|name| name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
        .cloned()
        .with_context(|| format!("Debian has no package linux-image-{series}.*-cloud-amd64"))
}

/// The runs of digits in `name`, for comparing versions.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|run| run.parse().ok()).collect()
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
        assert_eq!(newest_kernel(&names, "6.1").unwrap(), "linux-image-6.1.0-37-cloud-amd64");
        assert!(newest_kernel(&names[3..], "6.1").is_err());
    }
}
