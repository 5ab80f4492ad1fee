//! QEMU with KVM on a small Linux on Bochs: a second processor with VMX, made by KVM and not by this project. With l1hv
//! below that Linux, QEMU is what a user of it runs: a VMM whose virtual machines are nested guests.
//!
//! ```text
//!   Bochs            COM1 ──> console.log     COM2 ──> debug.log     COM3 ──> outer.log
//!     Debian's Linux, KVM      │                       │                    │ its console
//!       QEMU                   │ COM1                  │ port 0xe9          │ QEMU's status
//!         the machine under test
//! ```

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::emulator::{BOCHS, Emulator, Stream};
use super::files::{BOOT_ISO, CONSOLE, DEBUG};
use super::qemu::{self, Accelerator, Streams};
use super::run::{self, HostStops};
use super::{Boot, DEFAULT_IPS, Firmware, Line, Loader, Machine, Module, Outcome, Source, bochs, iso};
use crate::command::{self, quoted, tail};
use crate::conformance::KVM;
use crate::guest::{self, KVM_MODULE};
use crate::initrd::Initrd;
use crate::layout::Layout;
use crate::linux;
use crate::protocol::HostStop;
use crate::provision::{KERNEL_SERIES, Kernel, Provisioned};

const INIT: &str = include_str!("../../guests/outer-init.sh");

/// Applets of busybox that the init calls.
const APPLETS: &[&str] =
    &["sh", "mount", "mkdir", "cat", "grep", "insmod", "rmmod", "stty", "kill", "sleep", "poweroff"];

/// The line that the init prints on each stream before one of several runs: the run's number follows.
const RUN_PREFIX: &str = "L1HV-OUTER: run ";

/// How often the init checks whether a run has reached its limit.
const STEPS_PER_SECOND: u64 = 5;

/// The text that the init prints before QEMU's status.
const STATUS_PREFIX: &str = "L1HV-OUTER: QEMU's status ";

/// Log of the outer Linux and of QEMU's messages.
const OUTER: &str = "outer.log";

/// Log of Bochs itself: its banner, and its counters at a mark.
const COUNTS: &str = "counts.log";

/// Memory of the outer Linux besides that of the machine under test.
const OUTER_MEMORY_MIB: u32 = 512;

/// Files that a QEMU without graphics and network needs besides the program. Some versions lack some of them.
const QEMU_DATA: &[&str] = &[
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot.bin",
    "multiboot_dma.bin",
    "pvh.bin",
];

/// Directory of [`QEMU_DATA`] in the outer Linux.
const DATA_DIR: &str = "/data";

/// QEMU in Bochs.
#[derive(Debug)]
pub struct QemuInBochs;

impl fmt::Display for QemuInBochs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QEMU with KVM in Bochs")
    }
}

impl Emulator for QemuInBochs {
    fn command(&self, machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Command> {
        command_for(&[machine], None, provisioned, logs)
    }

    fn loader(&self) -> Loader {
        Loader::Qemu
    }

    fn stdout(&self) -> &'static str {
        COUNTS
    }

    fn streams(&self) -> &'static [Stream] {
        const STREAMS: [Stream; 3] = [Stream::CONSOLE, Stream::DEBUG, Stream { file: COUNTS, ..bochs::DEBUG_STREAM }];
        &STREAMS
    }

    fn outcome(&self, logs: &Path, _: ExitStatus) -> Outcome {
        let log = fs::read_to_string(logs.join(OUTER)).unwrap_or_default();
        judge(&log).unwrap_or_else(|| match bochs::outcome(logs) {
            Outcome::GuestShutdown => Outcome::MachineError(tail(&log, 8)),
            outcome => outcome,
        })
    }

    fn hypervisor(&self) -> Option<&'static str> {
        Some(KVM)
    }

    /// Each exit of a nested guest causes dozens of exits of the processor.
    fn is_slow(&self) -> bool {
        true
    }

    fn tsc_khz(&self, ips: u64) -> Option<u64> {
        BOCHS.tsc_khz(ips)
    }
}

fn judge(log: &str) -> Option<Outcome> {
    let (words, rest) = log.split_once(STATUS_PREFIX)?;
    if words.contains("L1HV-OUTER: the limit is reached") {
        return Some(Outcome::Timeout);
    }
    let status = rest.lines().next()?.trim().parse().ok()?;
    let errors: Vec<&str> = words.lines().filter(|line| line.starts_with("qemu")).collect();
    Some(qemu::judge(status, words, &errors.join("\n")))
}

/// Boots the outer Linux once and runs `machines` in it, one after the other; `on_line` gets a line with its machine's
/// number. A machine that takes longer than `limit`, in emulated time, ends with [`Outcome::Timeout`]. A machine that
/// the outer Linux does not start ends with [`Outcome::MachineError`].
///
/// # Errors
/// When the outer machine could not be started.
pub fn run_all(
    name: &str,
    machines: &[Machine],
    limit: Duration,
    layout: &Layout,
    provisioned: &Provisioned,
    mut on_line: impl FnMut(usize, Line<'_>),
) -> Result<Vec<Outcome>> {
    let [first, ..] = machines else { return Ok(Vec::new()) };
    let logs = layout.fresh_log_dir(name)?;
    let all: Vec<&Machine> = machines.iter().collect();
    let command = command_for(&all, Some(limit), provisioned, &logs)?;
    // Lines of a stream belong to the run that the stream announced last.
    let mut current = [None; 2];
    let mut stops: Vec<Option<HostStop>> = vec![None; machines.len()];
    let outcome = run::run(first, HostStops::AreLines, command, &logs, |line| {
        let current = &mut current[usize::from(line.source == Source::Debug)];
        if let Some(number) = line.text.strip_prefix(RUN_PREFIX) {
            *current = number.trim().parse::<usize>().ok().filter(|number| *number < machines.len());
        } else if let Some(number) = *current {
            if line.source == Source::Debug && stops[number].is_none() {
                stops[number] = HostStop::parse(line.text);
            }
            on_line(number, line);
        }
    })?;
    let log = fs::read_to_string(logs.join(OUTER)).unwrap_or_default();
    let runs: Vec<&str> = log.split(RUN_PREFIX).skip(1).collect();
    let judge = |(number, stop): (usize, Option<HostStop>)| match (runs.get(number), stop) {
        (_, Some(stop)) => Outcome::HostStop(stop),
        (Some(log), None) => judge(log).unwrap_or_else(|| Outcome::MachineError(tail(log, 8))),
        (None, None) => Outcome::MachineError(format!("{name}: {outcome} after {} machines", runs.len())),
    };
    Ok(stops.into_iter().enumerate().map(judge).collect())
}

/// Starts Bochs with an outer Linux that runs these machines.
fn command_for(
    machines: &[&Machine],
    limit: Option<Duration>,
    provisioned: &Provisioned,
    logs: &Path,
) -> Result<Command> {
    let series = machines.iter().find_map(|machine| machine.outer_series.as_deref());
    let kernel = provisioned.kernel(series.unwrap_or(KERNEL_SERIES[0]))?;
    let initrd = logs.join("outer-initrd");
    fs::write(&initrd, file_system(machines, limit, provisioned, kernel, logs)?)?;
    let most = |of: fn(&Machine) -> u32| machines.iter().map(|machine| of(machine)).max().unwrap_or_default();
    let ips = machines.first().map_or(DEFAULT_IPS, |machine| machine.ips);
    // COM3 shares its interrupt with COM1, which does not matter for a console that polls.
    let arguments = linux::default_args(BOCHS, ips).replace("ttyS0", "ttyS2") + " quiet 8250.nr_uarts=4";
    let linux = Module::with_args(&kernel.image, arguments);
    let boot = match machines.iter().find_map(|machine| machine.below.clone()) {
        Some(host) => Boot::L1hv { host, guest: vec![linux, Module::new(initrd)] },
        None => Boot::Linux { kernel: linux, initrds: vec![initrd] },
    };
    // The outer Linux has a processor for each of the machine's. Two that share one would lose a time slice at each
    // contended spin lock, and the nested guest's timers would overload them.
    let outer = Machine {
        cpus: most(|machine| machine.cpus),
        memory_mib: most(|machine| machine.memory_mib) + OUTER_MEMORY_MIB,
        ips,
        ..Machine::new("outer", BOCHS, boot)
    };
    bochs::command(&outer, provisioned, logs, &[logs.join(CONSOLE), logs.join(DEBUG), logs.join(OUTER)])
}

/// The outer Linux' root file system, with QEMU and all files that it loads.
fn file_system(
    machines: &[&Machine],
    limit: Option<Duration>,
    provisioned: &Provisioned,
    kernel: &Kernel,
    logs: &Path,
) -> Result<Vec<u8>> {
    let mut initrd = guest::base(&provisioned.busybox, INIT, APPLETS)?;
    for directory in ["sys", "tmp"] {
        initrd.directory(directory);
    }
    guest::add_modules(&mut initrd, kernel, &[KVM_MODULE])?;
    initrd.file("events.ask", 0o644, qemu::ASK_FOR_EVENTS.as_bytes());
    add_qemu(&mut initrd, &provisioned.qemu)?;
    let mut files: Vec<PathBuf> = Vec::new();
    for (number, machine) in machines.iter().enumerate() {
        let dir = format!("runs/{number:03}");
        let command = qemu_command(machine, provisioned, logs, &mut files)?;
        initrd.file(&format!("{dir}/qemu"), 0o644, command.as_bytes());
        initrd.file(&format!("{dir}/parameters"), 0o644, machine.kvm_parameters.join(" ").as_bytes());
        if let Some(limit) = limit {
            let steps = limit.as_secs() * STEPS_PER_SECOND;
            initrd.file(&format!("{dir}/limit"), 0o644, steps.to_string().as_bytes());
        }
    }
    for (number, file) in files.iter().enumerate() {
        initrd.copy(&format!("files/{number}"), 0o644, file)?;
    }
    Ok(initrd.finish())
}

/// The line for the shell that starts a machine's QEMU. The files that QEMU loads are added to `files`; their indices
/// are their names.
fn qemu_command(machine: &Machine, provisioned: &Provisioned, logs: &Path, files: &mut Vec<PathBuf>) -> Result<String> {
    let mut place = |file: &Path| {
        let known = files.iter().position(|known| known == file);
        let number = known.unwrap_or_else(|| {
            files.push(file.to_owned());
            files.len() - 1
        });
        Ok(format!("/files/{number}"))
    };
    let boot = match machine.loader {
        Loader::Grub if !matches!(machine.boot, Boot::Disk) => {
            let dir = logs.join(&machine.name);
            fs::create_dir_all(&dir)?;
            iso::make(machine, &dir, &provisioned.grub_mkrescue)?;
            vec!["-cdrom".to_owned(), place(&dir.join(BOOT_ISO))?]
        }
        Loader::Grub | Loader::Qemu => qemu::load(machine, &mut place)?,
    };
    let drives = qemu::drives(machine, &mut place)?;
    let firmware = match machine.firmware {
        Firmware::Bios => Vec::new(),
        Firmware::Uefi => vec!["-bios".to_owned(), place(&provisioned.ovmf)?],
    };
    let streams = Streams { console: "/dev/ttyS0".into(), debug: "/dev/ttyS1".into() };
    let mut words = vec![absolute(&provisioned.qemu)?.display().to_string(), "-L".to_owned(), DATA_DIR.to_owned()];
    words.extend(qemu::arguments(machine, Accelerator::Kvm, &streams));
    words.extend(firmware);
    words.extend(boot);
    words.extend(drives);
    words.extend(machine.qemu_args.iter().cloned());
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    Ok(format!("exec {}\n", words.join(" ")))
}

/// Adds the program and its data.
fn add_qemu(initrd: &mut Initrd, qemu: &Path) -> Result<()> {
    let qemu = absolute(qemu)?;
    initrd.program(&qemu, Path::new("/"), &[])?;
    let listed = command::output(Command::new(&qemu).args(["-L", "help"]))?;
    let dirs: Vec<&Path> = listed.lines().map(Path::new).collect();
    let mut found = 0;
    for name in QEMU_DATA {
        if let Some(file) = dirs.iter().map(|dir| dir.join(name)).find(|file| file.is_file()) {
            initrd.copy(&format!("{}/{name}", &DATA_DIR[1..]), 0o644, &file)?;
            found += 1;
        }
    }
    ensure!(found > 0, "{} has no firmware in {}", qemu.display(), listed.trim().replace('\n', ", "));
    Ok(())
}

fn absolute(file: &Path) -> Result<PathBuf> {
    std::path::absolute(file).with_context(|| format!("cannot name {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inner_machines_end_is_told_from_the_outer_ones() {
        let log =
            |status: &str, words: &str| format!("{words}\r\n{STATUS_PREFIX}{status}\r\n[  9.1] reboot: Power down\r\n");
        assert_eq!(judge(&log("0", "{}")), Some(Outcome::GuestShutdown));
        assert_eq!(judge(&log("7", "{}")), Some(Outcome::GuestFailure(3)));
        assert_eq!(judge(&log("0", r#"{"reason": "guest-reset"}"#)), Some(Outcome::TripleFault));
        assert!(matches!(judge(&log("1", "qemu-system-x86_64: bad")), Some(Outcome::MachineError(_))));
        assert_eq!(judge("[    0.1] Kernel panic"), None);
    }
}
