//! QEMU: its command line, and what its status and log say about the end of a run.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};

use super::{Emulator, Machine, Outcome, run};
use crate::command::tail;
use crate::protocol::{DEBUG_EXIT_PORT, DEBUG_PORT};

const LOG: &str = "qemu.log";

/// Whether KVM on this host gives its guests VMX.
pub fn host_has_nested_vmx() -> bool {
    let nested = fs::read_to_string("/sys/module/kvm_intel/parameters/nested").unwrap_or_default();
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    usable && matches!(nested.trim(), "Y" | "1")
}

/// The command that starts `machine` from `iso`.
pub fn command(machine: &Machine, qemu: &Path, iso: &Path, logs: &Path) -> Command {
    let mut command = run::supervised(qemu);
    let (accel, cpu) = match machine.emulator {
        Emulator::QemuTcg => ("tcg", "max"),
        Emulator::QemuKvm | Emulator::Bochs => ("kvm", "host"),
    };
    command
        .args(["-machine", "pc", "-accel", accel, "-cpu", machine.cpu_model.unwrap_or(cpu)])
        .args(["-smp", &machine.cpus.to_string(), "-m", &machine.memory_mib.to_string()])
        .args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none"])
        .arg("-serial")
        .arg(format!("file:{}", logs.join(run::CONSOLE).display()))
        .arg("-debugcon")
        .arg(format!("file:{}", logs.join(run::DEBUG).display()))
        .args(["-global", &format!("isa-debugcon.iobase={DEBUG_PORT:#x}")])
        .args(["-device", &format!("isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4")])
        .args(["-d", "cpu_reset", "-D"])
        .arg(logs.join(LOG))
        .arg("-cdrom")
        .arg(iso);
    command
}

/// What a QEMU that has ended with `status` says.
pub fn outcome(logs: &Path, status: ExitStatus) -> Outcome {
    let log = fs::read_to_string(logs.join(LOG)).unwrap_or_default();
    if log.contains("Triple fault") {
        Outcome::TripleFault
    } else if status.success() {
        Outcome::GuestShutdown
    } else {
        let errors = fs::read_to_string(logs.join(run::ERRORS)).unwrap_or_default();
        match exit_code(status, &errors) {
            Some(code) => Outcome::of_exit_code(code),
            None => Outcome::MachineError(format!("{status}\n{}", tail(&errors, 8))),
        }
    }
}

/// What the guest wrote to [`DEBUG_EXIT_PORT`]: the status is twice that plus 1. QEMU's own failures have status 1 too, and a message.
fn exit_code(status: ExitStatus, errors: &str) -> Option<u32> {
    let status = u32::try_from(status.code()?).ok()?;
    (status % 2 == 1 && (status > 1 || errors.is_empty())).then_some(status / 2)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn an_odd_status_is_the_guests_verdict_unless_qemu_complains() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        assert_eq!(exit_code(exited(1), ""), Some(0));
        assert_eq!(exit_code(exited(7), "a warning"), Some(3));
        assert_eq!(exit_code(exited(1), "no such device"), None);
        assert_eq!(exit_code(exited(2), ""), None);
    }
}
