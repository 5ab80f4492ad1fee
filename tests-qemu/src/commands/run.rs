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
use crate::machine::{Boot, Module};
use crate::progress::Progress;
use crate::provision;

/// Longest run without `--timeout`.
const DEFAULT_TIMEOUT_SECONDS: u64 = 600;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The guest: a Linux bzImage or a multiboot 1 image.
    #[arg(long, value_name = "IMAGE")]
    kernel: PathBuf,
    /// An initrd, or for a multiboot image a module with its arguments ("FILE ARGS"); repeatable.
    #[arg(long, value_name = "FILE")]
    initrd: Vec<String>,
    /// The guest's command line [default for Linux: a serial console and what makes it quick].
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    append: Option<String>,
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
    let format = format_of(&args.kernel)?;
    let modules: Vec<Module> = args.initrd.iter().map(|text| module(text)).collect::<Result<_>>()?;
    let provisioned = provision::provision(layout, progress)?;
    let emulator = args.options.emulator()?;
    let append = args.append.clone().unwrap_or_else(|| match format {
        Some(ImageFormat::BzImage) => linux::default_args(emulator, args.options.ips),
        Some(ImageFormat::Multiboot(_)) | None => String::new(),
    });
    let kernel = Module::with_args(&args.kernel, append);
    let (kernel, modules) = match format {
        Some(ImageFormat::Multiboot(_)) => (kernel.named(), modules.into_iter().map(Module::named).collect()),
        Some(ImageFormat::BzImage) | None => (kernel, modules),
    };
    let boot = if args.bare {
        bare(format, kernel, modules)?
    } else {
        Boot::L1hv {
            host: Module::with_args(build::l1hv(layout, progress)?, &args.hv_append),
            guest: std::iter::once(kernel).chain(modules).collect(),
        }
    };
    args.options.run(&args.name, boot, Duration::from_secs(args.timeout), layout, &provisioned)
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

fn bare(format: Option<ImageFormat>, kernel: Module, modules: Vec<Module>) -> Result<Boot> {
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
