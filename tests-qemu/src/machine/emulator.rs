//! The emulators of machines: a trait, and the implementations.

use std::fmt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::Result;

use super::bochs::Bochs;
use super::files::{CONSOLE, DEBUG};
use super::qemu::{self, Accelerator, Qemu};
use super::qemu_in_bochs::QemuInBochs;
use super::{Loader, Machine, Outcome, Source};
use crate::provision::Provisioned;

/// An emulator.
pub trait Emulator: fmt::Debug + fmt::Display + Sync {
    /// The command that starts `machine`, whose logs and images go below `logs`. It writes the guest's console to
    /// `console.log` and the debug port to `debug.log`.
    ///
    /// # Errors
    /// When an image cannot be made, or the machine needs a feature that this emulator does not have.
    fn command(&self, machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Command>;

    /// The default loader of a machine's image.
    fn loader(&self) -> Loader {
        Loader::Grub
    }

    /// The log file that the command's standard output goes to.
    fn stdout(&self) -> &'static str;

    /// The streams of the machine's lines.
    fn streams(&self) -> &'static [Stream] {
        &[Stream::CONSOLE, Stream::DEBUG]
    }

    /// The outcome of a machine whose emulator has exited by itself, with `status`.
    fn outcome(&self, logs: &Path, status: ExitStatus) -> Outcome;

    /// The hypervisor that provides this machine's processor, if any.
    fn hypervisor(&self) -> Option<&'static str> {
        None
    }

    /// Whether a VMX structure or operand that is not in memory reads as ones. KVM stops the virtual machine instead
    /// ("emulation failure").
    fn reads_ones_beyond_memory(&self) -> bool {
        self.hypervisor().is_none()
    }

    /// Whether a machine takes minutes where others take seconds.
    fn is_slow(&self) -> bool {
        false
    }

    /// Whether the TSC counts instructions, so that machines that run side by side do not affect each other's
    /// measurements.
    fn counts_instructions(&self) -> bool {
        self.tsc_khz(1000).is_some()
    }

    /// The frequency of the processors' TSC, if the machine determines it. Then the kernel gets it as an argument and
    /// need not calibrate.
    fn tsc_khz(&self, ips: u64) -> Option<u64>;
}

/// A log file that the machine's lines come from.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// Its name.
    pub file: &'static str,
    /// The source of its lines.
    pub source: Source,
    /// Lines at its beginning that the emulator itself prints.
    pub banner_lines: usize,
}

impl Stream {
    /// The guest's console.
    pub const CONSOLE: Self = Self { file: CONSOLE, source: Source::Console, banner_lines: 0 };
    /// The debug port.
    pub const DEBUG: Self = Self { file: DEBUG, source: Source::Debug, banner_lines: 0 };
}

/// A chosen emulator.
pub type ChosenEmulator = &'static dyn Emulator;

/// Bochs: VMX in software, deterministic.
pub const BOCHS: ChosenEmulator = &Bochs;

/// QEMU with KVM, on a host that has nested VMX.
pub const QEMU_KVM: ChosenEmulator = &Qemu(Accelerator::Kvm);

/// QEMU's own translation: a machine without VMX.
pub const QEMU_TCG: ChosenEmulator = &Qemu(Accelerator::Tcg);

/// QEMU with KVM on a Linux that Bochs runs: KVM's nested VMX is the processor.
pub const QEMU_IN_BOCHS: ChosenEmulator = &QemuInBochs;

/// QEMU where this host offers nested VMX, else Bochs.
pub fn with_nested_vmx() -> ChosenEmulator {
    if qemu::host_has_nested_vmx() { QEMU_KVM } else { BOCHS }
}
