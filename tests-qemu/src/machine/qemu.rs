//! QEMU: its command line, and the outcome of a run by its output.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result};
use protocol::{DEBUG_PORT, EXIT_PORT};

use super::drives::{DiskFormat, DriveKind, MOST_DRIVES};
use super::emulator::Emulator;
use super::files::{BOOT_ISO, CONSOLE, DEBUG, ERRORS, supervised};
use super::{Boot, Firmware, Loader, Machine, Module, Outcome, TripleFault, iso};
use crate::command::tail;
use crate::conformance::KVM;
use crate::provision::Provisioned;

/// The log of QEMU's control socket, which is standard output.
const EVENTS: &str = "events.log";

/// The input of QEMU's control socket: without it QEMU sends no events.
pub const ASK_FOR_EVENTS: &str = "{\"execute\":\"qmp_capabilities\"}\n";

/// Whether KVM on this host gives its guests VMX.
pub fn host_has_nested_vmx() -> bool {
    let nested = fs::read_to_string("/sys/module/kvm_intel/parameters/nested").unwrap_or_default();
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    usable && matches!(nested.trim(), "Y" | "1")
}

/// How QEMU executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// On the processor.
    Kvm,
    /// By translation.
    Tcg,
}

impl Accelerator {
    /// The accelerator's name, and the processor model with the most features.
    fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Kvm => ["kvm", "host"],
            Self::Tcg => ["tcg", "max"],
        }
    }
}

/// QEMU on this host.
#[derive(Debug)]
pub struct Qemu(pub Accelerator);

impl fmt::Display for Qemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Accelerator::Kvm => "QEMU with KVM",
            Accelerator::Tcg => "QEMU without VMX",
        })
    }
}

impl Emulator for Qemu {
    fn command(&self, machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Command> {
        let streams = Streams {
            console: logs.join(CONSOLE).display().to_string(),
            debug: logs.join(DEBUG).display().to_string(),
        };
        let boot = match machine.loader {
            Loader::Grub if !matches!(machine.boot, Boot::Disk) => {
                iso::make(machine, logs, &provisioned.grub_mkrescue)?;
                vec!["-cdrom".to_owned(), logs.join(BOOT_ISO).display().to_string()]
            }
            Loader::Grub | Loader::Qemu => load(machine, &mut |file| Ok(file.display().to_string()))?,
        };
        let drives = drives(machine, &mut |file| Ok(file.display().to_string()))?;
        let questions = logs.join("events.ask");
        fs::write(&questions, ASK_FOR_EVENTS)?;
        let mut command = supervised(&provisioned.qemu);
        if machine.firmware == Firmware::Uefi {
            command.arg("-bios").arg(&provisioned.ovmf);
        }
        command.args(arguments(machine, self.0, &streams)).args(boot).args(drives).args(&machine.qemu_args);
        command.stdin(Stdio::from(File::open(questions)?));
        Ok(command)
    }

    fn stdout(&self) -> &'static str {
        EVENTS
    }

    fn outcome(&self, logs: &Path, status: ExitStatus) -> Outcome {
        let read = |file| fs::read_to_string(logs.join(file)).unwrap_or_default();
        match status.code() {
            Some(code) => judge(code, &read(EVENTS), &read(ERRORS)),
            None => Outcome::MachineError(format!("{status}\n{}", tail(&read(ERRORS), 8))),
        }
    }

    fn hypervisor(&self) -> Option<&'static str> {
        (self.0 == Accelerator::Kvm).then_some(KVM)
    }

    fn tsc_khz(&self, _: u64) -> Option<u64> {
        None
    }
}

/// The destinations of QEMU's streams.
pub struct Streams {
    /// The guest's console.
    pub console: String,
    /// The debug port.
    pub debug: String,
}

/// All arguments except those for the boot image and the user's.
pub fn arguments(machine: &Machine, accelerator: Accelerator, streams: &Streams) -> Vec<String> {
    let [accel, cpu] = accelerator.arguments();
    let cpu = machine.cpu_model.unwrap_or(cpu);
    let (cpus, memory) = (machine.cpus.to_string(), machine.memory_mib.to_string());
    let serial = format!("file:{}", streams.console);
    let debug = format!("file:{}", streams.debug);
    let debug_port = format!("isa-debugcon.iobase={DEBUG_PORT:#x}");
    let exit_port = format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4");
    let mut arguments: Vec<&str> = vec!["-machine", "pc", "-accel", accel, "-cpu", cpu, "-smp", &cpus, "-m", &memory];
    arguments.extend(["-display", "none", "-nodefaults", "-serial", &serial, "-debugcon", &debug]);
    arguments.extend(["-global", &debug_port, "-device", &exit_port]);
    arguments.extend(["-chardev", "stdio,id=events,signal=off", "-mon", "chardev=events,mode=control"]);
    if machine.triple_fault == TripleFault::Stops {
        // Guests do not reset the machine, they switch it off.
        arguments.push("-no-reboot");
    }
    arguments.into_iter().map(str::to_owned).collect()
}

/// The arguments for an image that QEMU itself loads. `place` gives QEMU's name of a file.
pub fn load(machine: &Machine, place: &mut dyn FnMut(&Path) -> Result<String>) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    let mut argument = |name: &str, value: String| {
        if !value.is_empty() {
            arguments.extend([name.to_owned(), value]);
        }
    };
    match &machine.boot {
        Boot::L1hv { host, guest } => {
            argument("-kernel", place(&host.file)?);
            argument("-append", machine.host_arguments(host));
            argument("-initrd", modules(guest, place)?);
        }
        Boot::Multiboot { kernel, modules: files } => {
            argument("-kernel", place(&kernel.file)?);
            argument("-append", kernel.args.clone());
            argument("-initrd", modules(files, place)?);
        }
        Boot::Linux { kernel, initrds } => {
            argument("-kernel", place(&kernel.file)?);
            argument("-append", kernel.args.clone());
            match &initrds[..] {
                [] => {}
                [initrd] => argument("-initrd", place(initrd)?),
                _ => anyhow::bail!("QEMU loads one initrd file: use a boot loader for {}", initrds.len()),
            }
        }
        Boot::Iso(file) => argument("-cdrom", place(file)?),
        Boot::Disk => argument("-boot", "c".to_owned()),
    }
    Ok(arguments)
}

/// The arguments for the machine's drives. The CD that it boots is the secondary master.
pub fn drives(machine: &Machine, place: &mut dyn FnMut(&Path) -> Result<String>) -> Result<Vec<String>> {
    const SLOTS: [u32; MOST_DRIVES] = [0, 1, 3];
    let mut arguments = Vec::new();
    for (slot, drive) in SLOTS.iter().zip(machine.checked_drives()?) {
        let what = match (drive.kind, DiskFormat::of(&drive.file)?) {
            (DriveKind::Cdrom, _) => "media=cdrom,format=raw",
            (DriveKind::Disk, DiskFormat::Raw) => "format=raw",
            (DriveKind::Disk, DiskFormat::Qcow2) => "format=qcow2",
        };
        let file = place(&drive.file)?.replace(',', ",,");
        arguments.extend(["-drive".to_owned(), format!("if=ide,index={slot},{what},file={file}")]);
    }
    if !arguments.is_empty() && !matches!(machine.boot, Boot::Disk) {
        arguments.extend(["-boot", "d"].map(str::to_owned));
    }
    Ok(arguments)
}

/// The modules of a multiboot image as an argument of `-initrd`: a comma ends a module, two commas stand for one.
fn modules(files: &[Module], place: &mut dyn FnMut(&Path) -> Result<String>) -> Result<String> {
    let line = |module: &Module| Ok(format!("{} {}", place(&module.file)?, module.args).trim_end().replace(',', ",,"));
    let lines: Vec<String> = files.iter().map(line).collect::<Result<_>>().context("cannot hand a file to QEMU")?;
    Ok(lines.join(","))
}

/// The outcome of a QEMU that has ended with status `code`.
pub fn judge(code: i32, events: &str, errors: &str) -> Outcome {
    if events.contains("\"guest-reset\"") {
        // No guest asks for a reset except by a triple fault. Any other reset is the firmware's, and l1hv reports it.
        return Outcome::TripleFault;
    }
    match exit_code(code, errors) {
        Some(verdict) => Outcome::of_exit_code(verdict),
        None if code == 0 => Outcome::GuestShutdown,
        None => Outcome::MachineError(format!("QEMU ended with status {code}\n{}", tail(errors, 8))),
    }
}

/// The value that the guest wrote to [`EXIT_PORT`]: the status is twice the value plus 1. QEMU's own failures have
/// status 1 too, but with a message that is no warning.
fn exit_code(status: i32, errors: &str) -> Option<u32> {
    let status = u32::try_from(status).ok()?;
    let is_warning = |line: &str| line.trim().is_empty() || line.contains("warning:");
    (status % 2 == 1 && (status > 1 || errors.lines().all(is_warning))).then_some(status / 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::QEMU_KVM;

    #[test]
    fn an_odd_status_is_the_guests_verdict_unless_qemu_complains() {
        assert_eq!(judge(1, "", ""), Outcome::GuestShutdown);
        assert_eq!(judge(7, "", "qemu: cannot"), Outcome::GuestFailure(3));
        assert_eq!(judge(1, "", "qemu: warning: deprecated\n"), Outcome::GuestShutdown);
        assert!(matches!(judge(1, "", "no such device"), Outcome::MachineError(_)));
        assert!(matches!(judge(2, "", ""), Outcome::MachineError(_)));
    }

    #[test]
    fn a_reset_and_a_shutdown_have_the_same_status_and_other_events() {
        let event =
            |reason: &str| format!(r#"{{"event": "SHUTDOWN", "data": {{"guest": true, "reason": "{reason}"}}}}"#);
        assert_eq!(judge(0, &event("guest-reset"), ""), Outcome::TripleFault);
        assert_eq!(judge(0, &event("guest-shutdown"), ""), Outcome::GuestShutdown);
    }

    #[test]
    fn commas_in_a_modules_arguments_do_not_end_it() {
        let guest = vec![Module::with_args("/bzImage", "console=ttyS0,115200 quiet"), Module::new("/initrd")];
        let boot = Boot::L1hv { host: Module::with_args("/l1hv", "stats"), guest };
        let machine = Machine::new("load", QEMU_KVM, boot);
        let arguments = load(&machine, &mut |file| Ok(file.display().to_string())).unwrap();
        let initrd = "/bzImage console=ttyS0,,115200 quiet,/initrd";
        assert_eq!(arguments, ["-kernel", "/l1hv", "-append", "triple-fault=stop stats", "-initrd", initrd]);
    }

    #[test]
    fn an_image_without_arguments_and_modules_has_no_options_for_them() {
        let boot = Boot::Multiboot { kernel: Module::new("/image"), modules: Vec::new() };
        let machine = Machine::new("load", QEMU_KVM, boot);
        assert_eq!(load(&machine, &mut |file| Ok(file.display().to_string())).unwrap(), ["-kernel", "/image"]);
    }
}
