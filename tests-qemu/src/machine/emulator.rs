//! What emulates a machine: one trait, an implementation each.

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
    /// When an image cannot be made, or the machine asks for what this emulator does not have.
    fn command(&self, machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Command>;

    /// Who loads a machine's image unless it says otherwise.
    fn loader(&self) -> Loader {
        Loader::Grub
    }

    /// The log file that the command's standard output goes to.
    fn stdout(&self) -> &'static str;

    /// Where the machine's lines come from.
    fn streams(&self) -> &'static [Stream] {
        &[Stream::CONSOLE, Stream::DEBUG]
    }

    /// How a machine ended whose emulator has exited by itself, with `status`.
    fn outcome(&self, logs: &Path, status: ExitStatus) -> Outcome;

    /// The hypervisor whose virtual machine it is, which makes the processor what it is.
    fn hypervisor(&self) -> Option<&'static str> {
        None
    }

    /// Whether the processor takes a VMX structure or operand in no memory for one of ones. KVM stops the virtual
    /// machine there ("emulation failure").
    fn reads_ones_beyond_memory(&self) -> bool {
        self.hypervisor().is_none()
    }

    /// Whether a machine takes minutes for what takes others seconds.
    fn is_slow(&self) -> bool {
        false
    }

    /// Whether the TSC counts instructions, so that machines side by side do not change what they measure.
    fn counts_instructions(&self) -> bool {
        self.tsc_khz(1000).is_some()
    }

    /// The frequency of the processors' TSC where it follows from the machine: a kernel that is told so need not
    /// calibrate.
    fn tsc_khz(&self, ips: u64) -> Option<u64>;
}

/// A log file that the machine's lines come from.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    /// Its name.
    pub file: &'static str,
    /// What its lines are.
    pub source: Source,
    /// Lines at its beginning that are the emulator's own.
    pub banner_lines: usize,
}

impl Stream {
    /// The guest's console.
    pub const CONSOLE: Self = Self { file: CONSOLE, source: Source::Console, banner_lines: 0 };
    /// The debug port.
    pub const DEBUG: Self = Self { file: DEBUG, source: Source::Debug, banner_lines: 0 };
}

/// An emulator, chosen.
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
