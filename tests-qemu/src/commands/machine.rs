//! The options for the machine of a command.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use super::BadArgument;
use crate::layout::Layout;
use crate::machine::{
    self, BOCHS, Boot, ChosenEmulator, DEFAULT_IPS, DEFAULT_MEMORY_MIB, Drive, Firmware, Line, Loader, Machine,
    MachineOptions, QEMU_IN_BOCHS, QEMU_KVM, QEMU_TCG, Source,
};
use crate::models::{self, Model};
use crate::provision::{KERNEL_SERIES, Provisioned};

/// Which machine.
#[derive(Debug, Clone, clap::Args)]
pub struct MachineArgs {
    /// The machine; auto takes QEMU where this host has nested VMX, else Bochs.
    #[arg(long, value_enum, default_value_t = MachineChoice::Auto)]
    machine: MachineChoice,
    /// Processors.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: u32,
    /// Memory [default: 1024; for benchmarks 2048].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(32..=65536))]
    memory: Option<u32>,
    /// Ticks to a second of emulated time (bochs, qemu-in-bochs).
    #[arg(long, value_name = "N", default_value_t = DEFAULT_IPS, value_parser = clap::value_parser!(u64).range(1_000_000..=4_000_000_000))]
    pub ips: u64,
    /// The processor: a model of Bochs (bochs).
    #[arg(long, value_name = "NAME", value_parser = models::parser())]
    model: Option<&'static Model>,
    /// Turns of random lengths for several processors, the same ones for the same number (bochs).
    #[arg(long, value_name = "N")]
    turns_seed: Option<u64>,
    /// Note in this directory which of l1hv's instructions execute, in addition to those of earlier runs (bochs).
    #[arg(long, value_name = "DIR")]
    coverage: Option<PathBuf>,
    /// More arguments of QEMU, separated by spaces (qemu, qemu-in-bochs).
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    qemu_args: String,
    /// EFI firmware (OVMF) instead of a BIOS.
    #[arg(long)]
    uefi: bool,
    /// Who loads the image (qemu, qemu-in-bochs) [default: grub, from an ISO; on qemu-in-bochs qemu, by its -kernel].
    #[arg(long, value_enum)]
    loader: Option<LoaderChoice>,
    /// Debian kernel series of the Linux below QEMU [default: the oldest] (qemu-in-bochs).
    #[arg(long, value_name = "SERIES", value_parser = KERNEL_SERIES)]
    outer_series: Option<String>,
    /// A parameter of the kvm-intel module below QEMU; repeatable (qemu-in-bochs).
    #[arg(long, value_name = "NAME=VALUE")]
    outer_kvm: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MachineChoice {
    /// VMX emulated in software; the same result every time.
    Bochs,
    /// With KVM where this host has nested VMX, else without VMX.
    Qemu,
    /// QEMU with KVM on a Linux on Bochs: KVM's nested VMX is the processor.
    QemuInBochs,
    /// QEMU where this host has nested VMX, else Bochs.
    Auto,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LoaderChoice {
    Grub,
    Qemu,
}

impl MachineArgs {
    /// The emulator to use on this host.
    pub fn emulator(&self) -> Result<ChosenEmulator> {
        self.emulator_or(machine::with_nested_vmx())
    }

    /// As [`Self::emulator`], with `auto` in place of "auto".
    pub fn emulator_or(&self, auto: ChosenEmulator) -> Result<ChosenEmulator> {
        Ok(match (self.machine, self.option_of_bochs()) {
            (MachineChoice::Bochs, _) | (MachineChoice::Auto, Some(_)) => BOCHS,
            (_, Some(option)) => return Err(BadArgument(format!("{option}: only the machine bochs has it")).into()),
            (MachineChoice::Auto, None) => auto,
            (MachineChoice::Qemu, None) if machine::host_has_nested_vmx() => QEMU_KVM,
            (MachineChoice::Qemu, None) => QEMU_TCG,
            (MachineChoice::QemuInBochs, None) => QEMU_IN_BOCHS,
        })
    }

    /// An option that only Bochs has, if there is one.
    fn option_of_bochs(&self) -> Option<String> {
        let model = self.model.map(|model| format!("--model {}", model.name));
        let turns_seed = self.turns_seed.map(|seed| format!("--turns-seed {seed}"));
        let coverage = self.coverage.as_ref().map(|dir| format!("--coverage {}", dir.display()));
        model.or(turns_seed).or(coverage)
    }

    /// The other options of the machine.
    pub fn options(&self) -> MachineOptions {
        self.options_with(DEFAULT_MEMORY_MIB)
    }

    /// As [`Self::options`], with this memory as the default.
    pub fn options_with(&self, memory_mib: u32) -> MachineOptions {
        MachineOptions {
            cpus: self.cpus,
            memory_mib: self.memory.unwrap_or(memory_mib),
            ips: self.ips,
            model: self.model,
            turns_seed: self.turns_seed,
            coverage: self.coverage.clone(),
            firmware: if self.uefi { Firmware::Uefi } else { Firmware::Bios },
            loader: self.loader.map(|choice| match choice {
                LoaderChoice::Grub => Loader::Grub,
                LoaderChoice::Qemu => Loader::Qemu,
            }),
            qemu_args: self.qemu_args.split_whitespace().map(str::to_owned).collect(),
            outer_series: self.outer_series.clone(),
            kvm_parameters: self.outer_kvm.clone(),
        }
    }

    /// Runs a machine that boots `boot`, with its logs under `name`: the console goes to standard output, l1hv's log
    /// and the outcome to standard error. Returns the exit status.
    pub fn run(
        &self,
        name: &str,
        boot: Boot,
        drives: Vec<Drive>,
        timeout: Duration,
        layout: &Layout,
        provisioned: &Provisioned,
    ) -> Result<u8> {
        let machine = Machine { drives, timeout, silence: timeout, ..Machine::new(name, self.emulator()?, boot) };
        let outcome = self.options().apply(machine).run(layout, provisioned, print)?;
        eprintln!("{outcome}");
        Ok(outcome.status())
    }
}

fn print(line: Line<'_>) {
    match line.source {
        Source::Console => println!("{}", line.text),
        Source::Debug => eprintln!("{}", line.text),
    }
}
