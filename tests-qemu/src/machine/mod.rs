//! A machine: boots an image, streams its lines, and gives an outcome.
//!
//! ```text
//!   Machine ── Emulator: bochs | qemu | qemu_in_bochs ──> child process
//!                (iso: what GRUB boots)                    │ console.log (COM1)   │ debug.log (port 0xe9)
//!                                                          └── run: lines, limits ┴──> Outcome
//! ```

mod bochs;
mod drives;
mod emulator;
mod files;
mod iso;
mod outcome;
mod qemu;
mod qemu_in_bochs;
mod run;
mod streams;

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::layout::Layout;
use crate::models::Model;
use crate::provision::Provisioned;

pub use drives::{Drive, DriveKind};
pub use emulator::{BOCHS, ChosenEmulator, Emulator, QEMU_IN_BOCHS, QEMU_KVM, QEMU_TCG, with_nested_vmx};
pub use iso::{Entry, Menu};
pub use outcome::Outcome;
pub use qemu::host_has_nested_vmx;
pub use qemu_in_bochs::run_all as run_all_in_bochs;
pub use run::{Line, Source};

use run::HostStops;

/// Ticks that make one second of emulated time on Bochs. One tick is one instruction and one TSC cycle.
///
/// Firmware and boot loader wait in emulated time, so that a larger number makes each boot slower by
/// seconds; a smaller one brings more timer interrupts per instruction.
pub const DEFAULT_IPS: u64 = 1_000_000_000;

/// Default memory of a machine.
pub const DEFAULT_MEMORY_MIB: u32 = 1024;

/// The loader of a machine's image on QEMU. On Bochs it is GRUB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loader {
    /// GRUB, from an ISO.
    Grub,
    /// QEMU itself (`-kernel`).
    Qemu,
}

/// The firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// A PC's BIOS: Bochs' own or SeaBIOS.
    Bios,
    /// EFI: OVMF.
    Uefi,
}

/// The firmware's value of IA32_FEATURE_CONTROL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirmwareVmx {
    /// VMX enabled, register locked.
    Enabled,
    /// VMX disabled, register locked.
    LockedOff,
    /// Register unlocked.
    Unlocked,
}

/// The environment variable that names [`Machine::coverage`] for every machine, those of tests among them.
const COVERAGE: &str = "L1HV_COVERAGE";

/// What an MSR that the emulator does not know does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownMsrs {
    /// RDMSR reads 0, WRMSR has no effect: Linux expects MSRs of its processor's model.
    ReadAsZero,
    /// Both fault, as an MSR does that a processor lacks.
    Fault,
}

/// The effect of a triple fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TripleFault {
    /// Ends the run: [`Outcome::TripleFault`].
    Stops,
    /// Resets the machine (Bochs), as the chipset of a PC does.
    Resets,
}

/// A file that the boot loader loads, and its arguments.
#[derive(Debug, Clone)]
pub struct Module {
    /// The file, on the host.
    pub file: PathBuf,
    /// The arguments after its name on the loader's line.
    pub args: String,
    /// Whether the loader passes the file's name before the arguments, as QEMU does. GRUB leaves it out.
    pub named: bool,
}

impl Module {
    /// A module without arguments.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self::with_args(file, "")
    }

    /// A module with arguments.
    pub fn with_args(file: impl Into<PathBuf>, args: impl Into<String>) -> Self {
        Self { file: file.into(), args: args.into(), named: false }
    }

    /// This module with the file's name before the arguments.
    pub fn named(self) -> Self {
        Self { named: true, ..self }
    }
}

/// The image that a machine boots.
#[derive(Debug, Clone)]
pub enum Boot {
    /// l1hv with the guest hypervisor's image as its first module.
    L1hv {
        /// l1hv's ELF file and arguments.
        host: Module,
        /// The guest's kernel, then its initrd files or modules. It is empty in tests of l1hv's error.
        guest: Vec<Module>,
    },
    /// A bzImage on the bare machine, with its initrd files.
    Linux {
        /// The kernel and its command line.
        kernel: Module,
        /// Initrd files, loaded one after the other.
        initrds: Vec<PathBuf>,
    },
    /// A multiboot 1 image on the bare machine.
    Multiboot {
        /// The image and its command line.
        kernel: Module,
        /// Its modules.
        modules: Vec<Module>,
    },
    /// An ISO with its own boot loader.
    Iso(PathBuf),
    /// The first of the machine's disks.
    Disk,
}

/// A machine that can be run.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The name of the log directory.
    pub name: String,
    /// Its emulator.
    pub emulator: ChosenEmulator,
    /// The loader of its image.
    pub loader: Loader,
    /// Processors.
    pub cpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Ticks to a second of emulated time (Bochs).
    pub ips: u64,
    /// Processor model, by the emulator's name; if `None`, the best one that works.
    pub cpu_model: Option<&'static str>,
    /// Its firmware.
    pub firmware: Firmware,
    /// The image that it boots.
    pub boot: Boot,
    /// Disks and CDs, besides the CD that the image may be on.
    pub drives: Vec<Drive>,
    /// An ACPI table in place of the firmware's list of processors (Bochs).
    pub madt: Option<PathBuf>,
    /// The firmware's setting of VMX (Bochs).
    pub firmware_vmx: FirmwareVmx,
    /// Bits of physical addresses, if more than 40 (Bochs).
    pub physical_bits: Option<u32>,
    /// The output of the interval timer's counter 2, if the timer's clock is stopped (Bochs).
    pub timer_stuck_at: Option<bool>,
    /// Unknown MSRs (Bochs).
    pub unknown_msrs: UnknownMsrs,
    /// A number that stands for turns of random lengths of several processors (Bochs).
    pub turns_seed: Option<u64>,
    /// A directory for the emulator's notes about l1hv's instructions (Bochs).
    pub coverage: Option<PathBuf>,
    /// Whether the machine has a debug console at port E9H (Bochs).
    pub debug_console: bool,
    /// What a triple fault does.
    pub triple_fault: TripleFault,
    /// More arguments of QEMU.
    pub qemu_args: Vec<String>,
    /// Debian kernel series of the Linux below QEMU; if `None`, the oldest (QEMU in Bochs).
    pub outer_series: Option<String>,
    /// l1hv below that Linux, if it is to be there (QEMU in Bochs).
    pub below: Option<Module>,
    /// Parameters of the kvm-intel module below QEMU, `NAME=VALUE` (QEMU in Bochs).
    pub kvm_parameters: Vec<String>,
    /// Limit on the whole run, wall-clock.
    pub timeout: Duration,
    /// Limit on the time without any output, wall-clock.
    pub silence: Duration,
}

/// A user's options of a machine, for any image.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    /// See [`Machine::cpus`].
    pub cpus: u32,
    /// See [`Machine::memory_mib`].
    pub memory_mib: u32,
    /// See [`Machine::ips`].
    pub ips: u64,
    /// The processor; see [`Machine::cpu_model`].
    pub model: Option<&'static Model>,
    /// See [`Machine::turns_seed`].
    pub turns_seed: Option<u64>,
    /// See [`Machine::coverage`].
    pub coverage: Option<PathBuf>,
    /// See [`Machine::firmware`].
    pub firmware: Firmware,
    /// See [`Machine::loader`]; the emulator's own choice if `None`.
    pub loader: Option<Loader>,
    /// See [`Machine::qemu_args`].
    pub qemu_args: Vec<String>,
    /// See [`Machine::outer_series`].
    pub outer_series: Option<String>,
    /// See [`Machine::kvm_parameters`].
    pub kvm_parameters: Vec<String>,
}

impl Default for MachineOptions {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: DEFAULT_MEMORY_MIB,
            ips: DEFAULT_IPS,
            model: None,
            turns_seed: None,
            coverage: None,
            firmware: Firmware::Bios,
            loader: None,
            qemu_args: Vec::new(),
            outer_series: None,
            kvm_parameters: Vec::new(),
        }
    }
}

impl MachineOptions {
    /// `machine` with these options.
    pub fn apply(&self, machine: Machine) -> Machine {
        let Self {
            cpus,
            memory_mib,
            ips,
            model,
            turns_seed,
            coverage,
            firmware,
            loader,
            qemu_args,
            outer_series,
            kvm_parameters,
        } = self.clone();
        let loader = loader.unwrap_or(machine.loader);
        let coverage = coverage.or(machine.coverage);
        let cpu_model = model.map(|model| model.name).or(machine.cpu_model);
        Machine {
            cpus,
            memory_mib,
            ips,
            cpu_model,
            turns_seed,
            coverage,
            firmware,
            loader,
            qemu_args,
            outer_series,
            kvm_parameters,
            ..machine
        }
    }
}

impl Machine {
    /// A machine with one processor, 1 GiB and generous limits.
    pub fn new(name: impl Into<String>, emulator: ChosenEmulator, boot: Boot) -> Self {
        Self {
            name: name.into(),
            emulator,
            loader: emulator.loader(),
            cpus: 1,
            memory_mib: DEFAULT_MEMORY_MIB,
            ips: DEFAULT_IPS,
            cpu_model: None,
            firmware: Firmware::Bios,
            boot,
            drives: Vec::new(),
            madt: None,
            physical_bits: None,
            timer_stuck_at: None,
            unknown_msrs: UnknownMsrs::ReadAsZero,
            turns_seed: None,
            coverage: env::var_os(COVERAGE).map(PathBuf::from),
            firmware_vmx: FirmwareVmx::Enabled,
            debug_console: true,
            triple_fault: TripleFault::Stops,
            qemu_args: Vec::new(),
            outer_series: None,
            below: None,
            kvm_parameters: Vec::new(),
            timeout: Duration::from_secs(300),
            silence: Duration::from_secs(120),
        }
    }

    /// Runs the machine to its end, and passes each line to `on_line` as it appears. The emulator has ended when this
    /// returns; its logs stay.
    ///
    /// # Errors
    /// When the machine could not be started. What happens to a started machine is an [`Outcome`].
    pub fn run(&self, layout: &Layout, provisioned: &Provisioned, on_line: impl FnMut(Line<'_>)) -> Result<Outcome> {
        let logs = layout.fresh_log_dir(&self.name)?;
        let command = self.emulator.command(self, provisioned, &logs)?;
        let outcome = run::run(self, HostStops::EndTheRun, command, &logs, on_line)?;
        let iso = logs.join(files::BOOT_ISO);
        let is_expected = matches!(outcome, Outcome::GuestShutdown | Outcome::GuestFailure(_) | Outcome::HostStop(_));
        if is_expected && iso.is_file() {
            // The image is only of use after an unexpected end, to boot it by hand.
            fs::remove_file(iso)?;
        }
        Ok(outcome)
    }

    /// l1hv's command line, with the same effect of a triple fault as on the machine itself.
    fn host_arguments(&self, host: &Module) -> String {
        let triple_fault = match self.triple_fault {
            TripleFault::Stops => "stop",
            TripleFault::Resets => "reset",
        };
        format!("triple-fault={triple_fault} {}", host.args)
    }
}
