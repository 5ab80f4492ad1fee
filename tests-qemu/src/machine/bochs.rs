//! Bochs: its configuration, and the outcome of a run by its log.

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Result, bail};

use super::drives::{DiskFormat, DriveKind};
use super::emulator::{Emulator, Stream};
use super::files::{BOOT_ISO, CONSOLE, DEBUG, supervised};
use super::{Boot, Firmware, FirmwareVmx, Machine, Outcome, TripleFault, UnknownMsrs, iso};
use crate::command::tail;
use crate::coverage::Notes;
use crate::provision::Provisioned;

/// Icelake and Tiger Lake models hang Linux 6.1 early; this is the newest that does not.
const CPU_MODEL: &str = "corei7_skylake_x";

/// Bochs allocates this much at once; the rest of a large guest memory on demand.
const HOST_MEMORY_MIB: u32 = 2048;

/// Instructions of one processor before the next one runs: few enough that locks are soon free, many enough for speed.
const QUANTUM: u32 = 128;

/// 2026-01-01: every run sees the same clock.
const START_OF_TIME: u64 = 1_767_225_600;

/// The environment variable with the firmware's value of IA32_FEATURE_CONTROL, instead of 5; see the patch of Bochs.
const FIRMWARE_FEATURE_CONTROL: &str = "BOCHS_FIRMWARE_FEATURE_CONTROL";

/// The width of physical addresses; see the patch of Bochs.
const PHYSICAL_ADDRESS_BITS: &str = "BOCHS_PHYSICAL_ADDRESS_BITS";

/// A seed for turns of random lengths; see the patch of Bochs.
const TURNS_SEED: &str = "BOCHS_TURNS_SEED";

/// The output of the interval timer's counter 2, if it is stuck; see the patch of Bochs.
const TIMER_2_OUTPUT: &str = "BOCHS_TIMER_2_OUTPUT";

/// Where l1hv's instructions are, and the file for notes about them; see the patch of Bochs.
const COVERAGE: &str = "BOCHS_COVERAGE";

/// Bochs greets on standard output, which is where port 0xe9 goes too.
pub const DEBUG_STREAM: Stream = Stream { banner_lines: 5, ..Stream::DEBUG };

const LOG: &str = "bochs.log";

/// Bochs.
#[derive(Debug)]
pub struct Bochs;

impl fmt::Display for Bochs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bochs")
    }
}

impl Emulator for Bochs {
    fn command(&self, machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Command> {
        command(machine, provisioned, logs, &[logs.join(CONSOLE)])
    }

    fn stdout(&self) -> &'static str {
        DEBUG
    }

    fn streams(&self) -> &'static [Stream] {
        const STREAMS: [Stream; 2] = [Stream::CONSOLE, DEBUG_STREAM];
        &STREAMS
    }

    fn outcome(&self, logs: &Path, _: ExitStatus) -> Outcome {
        outcome(logs)
    }

    /// One tick is one instruction and one cycle of the TSC.
    fn tsc_khz(&self, ips: u64) -> Option<u64> {
        Some(ips / 1000)
    }
}

/// The command that starts `machine` with a serial port for each of the files `serial`.
pub fn command(machine: &Machine, provisioned: &Provisioned, logs: &Path, serial: &[PathBuf]) -> Result<Command> {
    if !matches!(machine.boot, Boot::Disk) {
        iso::make(machine, logs, &provisioned.grub_mkrescue)?;
    }
    let config = logs.join("bochsrc");
    fs::write(&config, configuration(machine, provisioned, logs, serial)?)?;
    let mut command = supervised(&provisioned.bochs.binary);
    match machine.firmware_vmx {
        FirmwareVmx::Enabled => {}
        FirmwareVmx::LockedOff => _ = command.env(FIRMWARE_FEATURE_CONTROL, "1"),
        FirmwareVmx::Unlocked => _ = command.env(FIRMWARE_FEATURE_CONTROL, "0"),
    }
    if let Some(bits) = machine.physical_bits {
        command.env(PHYSICAL_ADDRESS_BITS, bits.to_string());
    }
    if let Some(output) = machine.timer_stuck_at {
        command.env(TIMER_2_OUTPUT, u8::from(output).to_string());
    }
    if let Some(seed) = machine.turns_seed {
        command.env(TURNS_SEED, seed.to_string());
    }
    if let (Some(dir), Boot::L1hv { host, .. }) = (&machine.coverage, &machine.boot) {
        let Notes { base, file } = Notes::open(dir, &host.file)?;
        command.env(COVERAGE, format!("{base:#x}:{}", file.display()));
    }
    command.arg("-q").arg("-f").arg(config).current_dir(logs);
    Ok(command)
}

/// The lines for the machine's drives, with the CD that it boots as the first.
fn drives(machine: &Machine, logs: &Path) -> Result<String> {
    const SLOTS: [&str; 4] = ["ata0-master", "ata0-slave", "ata1-master", "ata1-slave"];
    let iso = logs.join(BOOT_ISO);
    let boot = (!matches!(machine.boot, Boot::Disk)).then_some((DriveKind::Cdrom, &iso));
    let others = machine.checked_drives()?.iter().map(|drive| (drive.kind, &drive.file));
    let mut lines = String::new();
    for (slot, (kind, file)) in SLOTS.iter().zip(boot.into_iter().chain(others)) {
        let file = std::path::absolute(file)?;
        let kind = match kind {
            DriveKind::Cdrom => "type=cdrom, status=inserted",
            DriveKind::Disk if DiskFormat::of(&file)? == DiskFormat::Qcow2 => {
                let file = file.display();
                bail!("{file} is a qcow2 image, and Bochs reads raw ones: convert it (qemu-img convert -O raw)")
            }
            DriveKind::Disk => "type=disk, mode=flat",
        };
        writeln!(lines, "{slot}: {kind}, path=\"{}\"", file.display())?;
    }
    Ok(lines)
}

fn configuration(machine: &Machine, provisioned: &Provisioned, logs: &Path, serial: &[PathBuf]) -> Result<String> {
    let Machine { cpus, memory_mib, ips, .. } = machine;
    let mut ports = String::new();
    for (number, file) in (1..).zip(serial) {
        // Formatting into a string cannot fail.
        let _ = writeln!(ports, "com{number}: enabled=1, mode=file, dev={}", file.display());
    }
    Ok(format!(
        "config_interface: textconfig
display_library: nogui
cpu: model={cpu_model}, count={cpus}, quantum={quantum}, ips={ips}, reset_on_triple_fault={resets}, ignore_bad_msrs={ignored}
memory: guest={memory_mib}, host={host_mib}
romimage: file={bios}
vgaromimage: file={vga_bios}
pci: enabled=1, chipset=i440fx{screen}
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
{drives}boot: {boot}
clock: sync=none, time0={START_OF_TIME}
{ports}port_e9_hack: enabled={debug_console}
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
",
        // Turns of random lengths end in the middle of what would be a trace.
        quantum = if machine.turns_seed.is_some() { 1 } else { QUANTUM },
        ignored = u8::from(machine.unknown_msrs == UnknownMsrs::ReadAsZero),
        debug_console = u8::from(machine.debug_console),
        resets = u8::from(machine.triple_fault == TripleFault::Resets),
        cpu_model = machine.cpu_model.unwrap_or(CPU_MODEL),
        host_mib = HOST_MEMORY_MIB.min(*memory_mib),
        bios = match machine.firmware {
            Firmware::Bios => provisioned.bochs.bios.display(),
            Firmware::Uefi => provisioned.ovmf.display(),
        },
        vga_bios = provisioned.bochs.vga_bios.display(),
        // OVMF knows no other screen.
        screen = if machine.firmware == Firmware::Uefi { ", slot1=pcivga" } else { "" },
        drives = drives(machine, logs)?,
        boot = if matches!(machine.boot, Boot::Disk) { "disk" } else { "cdrom" },
        log = logs.join(LOG).display(),
    ))
}

/// The outcome of a run of Bochs, by its log.
pub fn outcome(logs: &Path) -> Outcome {
    judge(&fs::read_to_string(logs.join(LOG)).unwrap_or_default())
}

fn judge(log: &str) -> Outcome {
    if log.contains("exception with no resolution") {
        Outcome::TripleFault
    } else if log.contains("ACPI control: soft power off") || log.contains("Shutdown port: shutdown requested") {
        Outcome::GuestShutdown
    } else if let Some(code) = exit_code(log) {
        Outcome::of_exit_code(code)
    } else {
        Outcome::MachineError(tail(log, 8))
    }
}

/// The value that the guest wrote to [`EXIT_PORT`](protocol::EXIT_PORT), by the line of the patch of Bochs.
fn exit_code(log: &str) -> Option<u32> {
    let (_, rest) = log.split_once("Exit port: code ")?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_tells_a_triple_fault_a_shutdown_and_a_verdict_apart() {
        let fault = "1e[CPU0  ] >>PANIC<< exception(): 3rd (13) exception with no resolution";
        assert_eq!(judge(fault), Outcome::TripleFault);
        assert_eq!(judge(">>PANIC<< ACPI control: soft power off"), Outcome::GuestShutdown);
        assert_eq!(judge(">>PANIC<< Exit port: code 0\nCS.mode"), Outcome::GuestShutdown);
        assert_eq!(judge(">>PANIC<< Exit port: code 3\nCS.mode"), Outcome::GuestFailure(3));
        assert!(matches!(judge(">>PANIC<< no bootable device"), Outcome::MachineError(_)));
    }
}
