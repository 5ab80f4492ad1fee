//! `cargo l1hv run`: any image, under l1hv or on the bare machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use super::BadArgument;
use crate::build;
use crate::layout::Layout;
use crate::linux::{self, ImageKind};
use crate::machine::{
    self, BOCHS, Boot, ChosenEmulator, DEFAULT_IPS, Line, Loader, Machine, Module, QEMU_IN_BOCHS, QEMU_KVM, QEMU_TCG,
    Source,
};
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
    /// The machine; auto takes QEMU where this host has nested VMX, else Bochs.
    #[arg(long, value_enum, default_value_t = MachineChoice::Auto)]
    machine: MachineChoice,
    /// Processors.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Memory.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(32..=65536))]
    memory: u32,
    /// Ticks to a second of emulated time (Bochs).
    #[arg(long, value_name = "N", default_value_t = DEFAULT_IPS, value_parser = clap::value_parser!(u64).range(1_000_000..=4_000_000_000))]
    ips: u64,
    #[command(flatten)]
    qemu: QemuArgs,
    /// Limit on the run, and on its silences, in wall-clock seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT_SECONDS)]
    timeout: u64,
    /// Directory of the run's logs, below the build directory's l1hv/logs.
    #[arg(long, value_name = "NAME", default_value = "run")]
    name: String,
}

/// Options of machines that are QEMU.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct QemuArgs {
    /// More arguments of QEMU, separated by spaces (machines qemu and qemu-in-bochs).
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    qemu_args: String,
    /// Who loads the image (machines qemu and qemu-in-bochs) [default: grub, from an ISO; on qemu-in-bochs qemu, by its -kernel].
    #[arg(long, value_enum)]
    loader: Option<LoaderChoice>,
    /// A parameter of the kvm-intel module below QEMU; repeatable (qemu-in-bochs).
    #[arg(long, value_name = "NAME=VALUE")]
    outer_kvm: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LoaderChoice {
    Grub,
    Qemu,
}

impl QemuArgs {
    /// `machine` with these options.
    pub fn apply(&self, machine: Machine) -> Machine {
        let loader = self.loader.map(|choice| match choice {
            LoaderChoice::Grub => Loader::Grub,
            LoaderChoice::Qemu => Loader::Qemu,
        });
        Machine {
            loader: loader.unwrap_or(machine.loader),
            qemu_args: self.qemu_args.split_whitespace().map(str::to_owned).collect(),
            kvm_parameters: self.outer_kvm.clone(),
            ..machine
        }
    }
}

/// The `--machine` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MachineChoice {
    /// VMX emulated in software; the same result every time.
    Bochs,
    /// With KVM where this host has nested VMX, else without VMX.
    Qemu,
    /// QEMU with KVM on a Linux on Bochs: KVM's nested VMX is the processor.
    QemuInBochs,
    /// QEMU where this host has nested VMX, else Bochs.
    Auto,
}

impl MachineChoice {
    /// The emulator to use on this host.
    pub fn emulator(self) -> ChosenEmulator {
        match self {
            Self::Bochs => BOCHS,
            Self::Auto => machine::with_nested_vmx(),
            Self::Qemu if machine::host_has_nested_vmx() => QEMU_KVM,
            Self::Qemu => QEMU_TCG,
            Self::QemuInBochs => QEMU_IN_BOCHS,
        }
    }
}

/// Runs the machine; the guest's console goes to standard output, l1hv's log to standard error.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let kind = kind_of(&args.kernel)?;
    let modules: Vec<Module> = args.initrd.iter().map(|text| module(text)).collect::<Result<_>>()?;
    let provisioned = provision::provision(layout, progress)?;
    let emulator = args.machine.emulator();
    let append = args.append.clone().unwrap_or_else(|| match kind {
        ImageKind::BzImage => linux::default_args(emulator, args.ips),
        ImageKind::Multiboot | ImageKind::Unknown => String::new(),
    });
    let kernel = Module::with_args(&args.kernel, append);
    let (kernel, modules) = match kind {
        ImageKind::Multiboot => (kernel.named(), modules.into_iter().map(Module::named).collect()),
        ImageKind::BzImage | ImageKind::Unknown => (kernel, modules),
    };
    let boot = if args.bare {
        bare(kind, kernel, modules)?
    } else {
        Boot::L1hv {
            host: Module::with_args(build::l1hv(layout, progress)?, &args.hv_append),
            guest: std::iter::once(kernel).chain(modules).collect(),
        }
    };
    let timeout = Duration::from_secs(args.timeout);
    let machine = Machine {
        cpus: args.cpus,
        memory_mib: args.memory,
        ips: args.ips,
        timeout,
        silence: timeout,
        ..args.qemu.apply(Machine::new(args.name.as_str(), emulator, boot))
    };
    let outcome = machine.run(layout, &provisioned, print)?;
    eprintln!("{outcome}");
    Ok(outcome.status())
}

/// Writes a line to where the user expects it.
pub fn print(line: Line<'_>) {
    match line.source {
        Source::Console => println!("{}", line.text),
        Source::Debug => eprintln!("{}", line.text),
    }
}

fn kind_of(file: &Path) -> Result<ImageKind> {
    ImageKind::of(file).map_err(|error| BadArgument(format!("{error:#}")).into())
}

/// `FILE` or `FILE ARGS`.
fn module(text: &str) -> Result<Module> {
    let (file, args) = text.split_once(' ').unwrap_or((text, ""));
    if !Path::new(file).is_file() {
        return Err(BadArgument(format!("--initrd {file}: no such file")).into());
    }
    Ok(Module::with_args(file, args))
}

fn bare(kind: ImageKind, kernel: Module, modules: Vec<Module>) -> Result<Boot> {
    match kind {
        ImageKind::BzImage => {
            Ok(Boot::Linux { kernel, initrds: modules.into_iter().map(|module| module.file).collect() })
        }
        ImageKind::Multiboot => Ok(Boot::Multiboot { kernel, modules }),
        ImageKind::Unknown => {
            let file = kernel.file.display();
            Err(BadArgument(format!("{file} is neither a bzImage nor a multiboot 1 image")).into())
        }
    }
}
