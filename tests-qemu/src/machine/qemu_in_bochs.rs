//! QEMU with KVM on a small Linux on Bochs: a second processor with VMX, which is KVM's and none of ours.
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

use anyhow::{Context as _, Result, ensure};

use super::emulator::{BOCHS, Emulator, Stream};
use super::files::{BOOT_ISO, CONSOLE, DEBUG};
use super::qemu::{self, Accelerator, Streams};
use super::{Boot, Loader, Machine, Module, Outcome, bochs, iso};
use crate::command::{self, tail};
use crate::guest::{self, KVM_MODULE};
use crate::initrd::Initrd;
use crate::linux;
use crate::provision::Provisioned;

const INIT: &str = include_str!("../../guests/outer-init.sh");

/// Applets of busybox that the init calls.
const APPLETS: &[&str] = &["sh", "mount", "mkdir", "cat", "grep", "insmod", "stty", "kill", "sleep", "poweroff"];

/// What the init prints before QEMU's status.
const STATUS_PREFIX: &str = "L1HV-OUTER: QEMU's status ";

/// Log of the outer Linux and of QEMU's own words.
const OUTER: &str = "outer.log";

/// What Bochs itself prints: its greeting, and its counters at a mark.
const COUNTS: &str = "counts.log";

/// Memory of the outer Linux beside that of the machine under test.
const OUTER_MEMORY_MIB: u32 = 512;

/// Files that a QEMU without graphics and network needs beside the program, where its version has them.
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
        let outer = outer(machine, provisioned, logs)?;
        bochs::command(&outer, provisioned, logs, &[logs.join(CONSOLE), logs.join(DEBUG), logs.join(OUTER)])
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

    /// Each exit of a nested guest is dozens of the processor's.
    fn is_slow(&self) -> bool {
        true
    }

    fn tsc_khz(&self, ips: u64) -> Option<u64> {
        BOCHS.tsc_khz(ips)
    }
}

fn judge(log: &str) -> Option<Outcome> {
    let (words, rest) = log.split_once(STATUS_PREFIX)?;
    let status = rest.lines().next()?.trim().parse().ok()?;
    let errors: Vec<&str> = words.lines().filter(|line| line.starts_with("qemu")).collect();
    Some(qemu::judge(status, words, &errors.join("\n")))
}

/// The machine that Bochs emulates.
fn outer(machine: &Machine, provisioned: &Provisioned, logs: &Path) -> Result<Machine> {
    let kernel = provisioned.kernel("6.1")?;
    let initrd = logs.join("outer-initrd");
    fs::write(&initrd, file_system(machine, provisioned, kernel, logs)?)?;
    // COM3 shares its interrupt with COM1: good for a console, which polls.
    let arguments = linux::default_args(BOCHS, machine.ips).replace("ttyS0", "ttyS2") + " quiet 8250.nr_uarts=4";
    let boot = Boot::Linux { kernel: Module::with_args(&kernel.image, arguments), initrds: vec![initrd] };
    Ok(Machine {
        cpus: machine.cpus,
        memory_mib: machine.memory_mib + OUTER_MEMORY_MIB,
        ips: machine.ips,
        ..Machine::new(machine.name.as_str(), BOCHS, boot)
    })
}

/// The outer Linux' root file system, with QEMU and all that it loads.
fn file_system(
    machine: &Machine,
    provisioned: &Provisioned,
    kernel: &crate::provision::Kernel,
    logs: &Path,
) -> Result<Vec<u8>> {
    let mut initrd = guest::base(&provisioned.busybox, INIT, APPLETS)?;
    for directory in ["sys", "tmp"] {
        initrd.directory(directory);
    }
    guest::add_modules(&mut initrd, kernel, KVM_MODULE)?;
    initrd.file("parameters", 0o644, machine.kvm_parameters.join(" ").as_bytes());
    initrd.file("events.ask", 0o644, qemu::ASK_FOR_EVENTS.as_bytes());
    add_qemu(&mut initrd, &provisioned.qemu)?;
    let boot = match machine.loader {
        Loader::Qemu => {
            let mut files = Vec::new();
            let boot = qemu::load(machine, &mut |file| {
                files.push(file.to_owned());
                Ok(format!("/files/{}", files.len()))
            })?;
            for (number, file) in (1..).zip(files) {
                initrd.copy(&format!("files/{number}"), 0o644, &file)?;
            }
            boot
        }
        Loader::Grub => {
            iso::make(machine, logs, &provisioned.grub_mkrescue)?;
            initrd.copy("files/iso", 0o644, &logs.join(BOOT_ISO))?;
            vec!["-cdrom".to_owned(), "/files/iso".to_owned()]
        }
    };
    let streams = Streams { console: "/dev/ttyS0".into(), debug: "/dev/ttyS1".into() };
    let mut words = vec![absolute(&provisioned.qemu)?.display().to_string(), "-L".to_owned(), DATA_DIR.to_owned()];
    words.extend(qemu::arguments(machine, Accelerator::Kvm, &streams));
    words.extend(boot);
    words.extend(machine.qemu_args.iter().cloned());
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    initrd.file("qemu", 0o644, format!("exec {}\n", words.join(" ")).as_bytes());
    Ok(initrd.finish())
}

/// The program, its libraries at their own places, and its data.
fn add_qemu(initrd: &mut Initrd, qemu: &Path) -> Result<()> {
    let qemu = absolute(qemu)?;
    let libraries = command::output(Command::new("ldd").arg(&qemu))?;
    for file in libraries.lines().filter_map(library).chain([qemu.clone()]) {
        initrd.copy(&file.display().to_string()[1..], 0o755, &file)?;
    }
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

/// The file in a line of ldd's: `NAME => FILE (ADDRESS)` or `FILE (ADDRESS)`.
fn library(line: &str) -> Option<PathBuf> {
    let line = line.split_once("=> ").map_or(line, |(_, file)| file).trim();
    let file = line.split_whitespace().next()?;
    file.starts_with('/').then(|| file.into())
}

fn absolute(file: &Path) -> Result<PathBuf> {
    std::path::absolute(file).with_context(|| format!("cannot name {}", file.display()))
}

/// `word` for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
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

    #[test]
    fn libraries_are_found_in_both_kinds_of_lines() {
        assert_eq!(library("\tlinux-vdso.so.1 (0x7ffc)"), None);
        assert_eq!(library("\tlibc.so.6 => /lib/libc.so.6 (0x7f)"), Some("/lib/libc.so.6".into()));
        assert_eq!(library("\t/lib64/ld-linux-x86-64.so.2 (0x7f)"), Some("/lib64/ld-linux-x86-64.so.2".into()));
    }
}
