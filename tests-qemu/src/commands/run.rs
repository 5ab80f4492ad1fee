//! `cargo l1hv run`: any image, under l1hv or on the bare machine.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::BadArgument;
use super::load::{GuestArgs, Image};
use super::machine::MachineArgs;
use crate::build;
use crate::layout::Layout;
use crate::linux;
use crate::machine::{Boot, Drive, DriveKind, Module};
use crate::progress::Progress;
use crate::provision;

/// Longest run without `--timeout`.
const DEFAULT_TIMEOUT_SECONDS: u64 = 600;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    guest: GuestArgs,
    /// A disk of the machine's, to which the guest may write: a raw image, on QEMU also a qcow2 one; repeatable.
    #[arg(long, value_name = "IMAGE")]
    disk: Vec<PathBuf>,
    /// A CD in a drive of the machine's; repeatable.
    #[arg(long, value_name = "ISO")]
    cdrom: Vec<PathBuf>,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "")]
    hv_append: String,
    /// Boot the image on the machine itself, without l1hv.
    #[arg(long)]
    bare: bool,
    #[command(flatten)]
    options: MachineArgs,
    /// Limit on the run, and on its silences, in wall-clock seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT_SECONDS)]
    timeout: u64,
    /// Directory of the run's logs, below the build directory's l1hv/logs.
    #[arg(long, value_name = "NAME", default_value = "run")]
    name: String,
}

/// Runs the machine; the guest's console goes to standard output, l1hv's log to standard error.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let linux_args = linux::default_args(args.options.emulator()?, args.options.ips);
    let image = args.guest.open(&linux_args)?;
    if image.is_none() && args.disk.is_empty() {
        return Err(BadArgument("there is nothing to boot: pass --kernel or --disk".to_owned()).into());
    }
    let drives = drives(args)?;
    let provisioned = provision::provision(layout, progress)?;
    let boot = match (image, args.bare) {
        (Some(image), true) => image.bare()?,
        (None, true) => Boot::Disk,
        (image, false) => {
            let disk = if image.is_none() { "boot=disk " } else { "" };
            let arguments = format!("{disk}{}", args.hv_append);
            Boot::L1hv {
                host: Module::with_args(build::l1hv(layout, progress)?, arguments),
                guest: image.map(Image::modules).unwrap_or_default(),
            }
        }
    };
    let limit = Duration::from_secs(args.timeout);
    args.options.run(&args.name, boot, drives, limit, layout, &provisioned)
}

/// The machine's disks and CDs.
fn drives(args: &Args) -> Result<Vec<Drive>> {
    let disks = args.disk.iter().map(|file| (file, DriveKind::Disk, "--disk"));
    let cds = args.cdrom.iter().map(|file| (file, DriveKind::Cdrom, "--cdrom"));
    disks
        .chain(cds)
        .map(|(file, kind, option)| {
            if !file.is_file() {
                return Err(BadArgument(format!("{option} {}: no such file", file.display())).into());
            }
            Ok(Drive { file: file.clone(), kind })
        })
        .collect()
}
