//! `cargo l1hv run`: any image, under l1hv or on the bare machine.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use boot::guest::ImageFormat;

use super::BadArgument;
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
    /// The guest: a Linux bzImage or a multiboot 1 image [default: what the first disk's boot sector starts].
    #[arg(long, value_name = "IMAGE", required_unless_present = "disk")]
    kernel: Option<PathBuf>,
    /// An initrd, or for a multiboot image a module with its arguments ("FILE ARGS"); repeatable.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Vec<String>,
    /// The guest's command line [default for Linux: a serial console and what makes it quick].
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, requires = "kernel")]
    append: Option<String>,
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
    let image = args.kernel.as_deref().map(|kernel| Image::open(kernel, args)).transpose()?;
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

/// An image and what is loaded with it.
struct Image {
    format: Option<ImageFormat>,
    kernel: Module,
    modules: Vec<Module>,
}

impl Image {
    fn open(kernel: &Path, args: &Args) -> Result<Self> {
        let format = format_of(kernel)?;
        let modules: Vec<Module> = args.initrd.iter().map(|text| module(text)).collect::<Result<_>>()?;
        let emulator = args.options.emulator()?;
        let append = args.append.clone().unwrap_or_else(|| match format {
            Some(ImageFormat::BzImage) => linux::default_args(emulator, args.options.ips),
            Some(ImageFormat::Multiboot(_)) | None => String::new(),
        });
        let kernel = Module::with_args(kernel, append);
        Ok(match format {
            Some(ImageFormat::Multiboot(_)) => {
                Self { format, kernel: kernel.named(), modules: modules.into_iter().map(Module::named).collect() }
            }
            Some(ImageFormat::BzImage) | None => Self { format, kernel, modules },
        })
    }

    /// All files for l1hv, the image first.
    fn modules(self) -> Vec<Module> {
        std::iter::once(self.kernel).chain(self.modules).collect()
    }

    fn bare(self) -> Result<Boot> {
        let Self { format, kernel, modules } = self;
        match format {
            Some(ImageFormat::BzImage) => {
                Ok(Boot::Linux { kernel, initrds: modules.into_iter().map(|module| module.file).collect() })
            }
            Some(ImageFormat::Multiboot(_)) => Ok(Boot::Multiboot { kernel, modules }),
            None => {
                let file = kernel.file.display();
                Err(BadArgument(format!("{file} is neither a bzImage nor a multiboot 1 image")).into())
            }
        }
    }
}

/// The format of the image in `file`; `None` for one that l1hv will refuse.
fn format_of(file: &Path) -> Result<Option<ImageFormat>> {
    let mut head = Vec::new();
    File::open(file)
        .and_then(|image| image.take(ImageFormat::HEAD_BYTES as u64).read_to_end(&mut head))
        .map_err(|error| BadArgument(format!("cannot read {}: {error}", file.display())))?;
    Ok(ImageFormat::of(&head))
}

/// `FILE` or `FILE ARGS`.
fn module(text: &str) -> Result<Module> {
    let (file, args) = text.split_once(' ').unwrap_or((text, ""));
    if !Path::new(file).is_file() {
        return Err(BadArgument(format!("--initrd {file}: no such file")).into());
    }
    Ok(Module::with_args(file, args))
}
