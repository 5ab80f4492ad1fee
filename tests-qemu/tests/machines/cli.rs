//! The command line: each end of a run has its documented exit status.

use std::process::{Command, Output};

use anyhow::{Result, ensure};
use tests_qemu::linux;
use tests_qemu::machine::{BOCHS, DEFAULT_IPS};

use crate::context::{Context, Test};

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "a_bad_argument_is_status_2", run: bad_argument },
        Test { name: "a_guest_that_shuts_down_is_status_0_and_its_console_is_standard_output", run: shutdown },
        Test { name: "a_host_stop_is_status_3_and_standard_error_says_why", run: host_stop },
        Test { name: "a_triple_fault_on_the_bare_machine_is_status_4", run: triple_fault },
        Test { name: "a_timeout_is_status_5", run: timeout },
    ]
}

/// Runs `cargo l1hv run` on Bochs with these arguments.
fn run(name: &str, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tests-qemu"));
    Ok(command.args(["run", "--machine", "bochs", "--name", name]).args(arguments).output()?)
}

fn must_end_with(output: &Output, status: i32) -> Result<()> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(status), "{}, expected {status}:\n{stderr}", output.status);
    Ok(())
}

fn bad_argument(_: &Context, name: &str) -> Result<()> {
    for arguments in [
        &["--kernel", "/nonexistent"][..],
        &["--kernel", "/proc/self/cmdline", "--bare"],
        &["--kernel", "/proc/self/cmdline", "--cpus", "0"],
        &["--kernel", "/proc/self/cmdline", "--initrd", "/nonexistent"],
        &["--no-such-option"],
    ] {
        must_end_with(&run(name, arguments)?, 2)?;
    }
    Ok(())
}

fn shutdown(context: &Context, name: &str) -> Result<()> {
    let guest = context.programs.multiboot_guest.display().to_string();
    let output = run(name, &["--bare", "--kernel", &guest, "--append", "colour=green"])?;
    must_end_with(&output, 0)?;
    let console = String::from_utf8_lossy(&output.stdout);
    ensure!(console == format!("multiboot guest: command line: {guest} colour=green\n"), "{console}");
    Ok(())
}

fn host_stop(context: &Context, name: &str) -> Result<()> {
    let guest = context.programs.multiboot_guest.display().to_string();
    let output = run(name, &["--kernel", &guest, "--hv-append", "colour=green"])?;
    must_end_with(&output, 3)?;
    let log = String::from_utf8_lossy(&output.stderr);
    ensure!(log.contains("l1hv: stop: bad-option: "), "{log}");
    Ok(())
}

/// A Linux without a root file system panics, and `reboot=t` turns the panic into a triple fault.
fn triple_fault(context: &Context, name: &str) -> Result<()> {
    let kernel = context.provisioned.kernel("6.1")?.image.display().to_string();
    let append = linux::default_args(BOCHS, DEFAULT_IPS);
    must_end_with(&run(name, &["--bare", "--kernel", &kernel, "--append", &append])?, 4)
}

fn timeout(context: &Context, name: &str) -> Result<()> {
    let kernel = context.provisioned.kernel("6.1")?.image.display().to_string();
    must_end_with(&run(name, &["--bare", "--kernel", &kernel, "--timeout", "1"])?, 5)
}
