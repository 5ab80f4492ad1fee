//! A second processor, made by others: KVM's nested VMX, in QEMU on a Linux on Bochs.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests_qemu::conformance::matrix;
use tests_qemu::machine::{Boot, Loader, Machine, Module, QEMU_IN_BOCHS};
use tests_qemu::progress::Progress;

use crate::context::{self, Context, Test};

/// Limit on one machine: each exit of a nested guest causes dozens of exits of the emulator.
const TIMEOUT: Duration = Duration::from_secs(900);

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "the_demo_runs_on_two_of_kvms_processors", run: |_, _| demo(2) },
        Test { name: "kvm_as_the_processor_boots_from_an_iso", run: boots_from_iso },
        Test { name: "kvm_as_the_processor_looks_under_l1hv_as_it_is", run: looks },
    ]
}

/// The minimal guest hypervisor and its nested guests on one processor, loaded by GRUB; in the other tests QEMU loads.
fn boots_from_iso(context: &Context, name: &str) -> Result<()> {
    let image = Module::with_args(&context.programs.conformance, "minimal");
    let boot = Boot::L1hv { host: context.host(""), guest: vec![image] };
    let machine =
        Machine { loader: Loader::Grub, timeout: TIMEOUT, silence: TIMEOUT, ..Machine::new(name, QEMU_IN_BOCHS, boot) };
    let finished = context.run(&machine)?;
    finished.must_shut_down()?;
    finished.debug_must_say("minimal: done")
}

/// Linux with KVM as guest hypervisor, with EPT and without: the payload, and Linux as nested guest.
fn demo(cpus: u32) -> Result<()> {
    let said = context::demo("qemu-in-bochs", cpus)?;
    let greeting = format!("{cpus} cpu");
    let greetings = said.lines().filter(|line| line.contains("init runs:") && line.ends_with(&greeting)).count();
    ensure!(greetings == 2, "nested Linux did not say twice \"{greeting}\":\n{said}");
    Ok(())
}

/// One row of the matrix: the quick groups of the suite, bare and under l1hv.
fn looks(context: &Context, name: &str) -> Result<()> {
    let Context { layout, provisioned, .. } = context;
    let verdicts = matrix::run(layout, &Progress::silent(), provisioned, name, "as it is")?;
    for verdict in &verdicts.0 {
        ensure!(verdict.is_right(), "{verdict}");
    }
    Ok(())
}
