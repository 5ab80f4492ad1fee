//! Guest hypervisors with nested guests that do real work: Linux KVM, and l1hv itself.

use anyhow::{Context as _, Result, bail, ensure};
use tests_qemu::bench::measure;
use tests_qemu::guest::{KvmEpt, Work};
use tests_qemu::machine::{Boot, Machine, Module};

use crate::context::{Context, Test};

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "kvm_of_linux_6_1_runs_payload_and_linux", run: |c, n| nests(c, n, "6.1", KvmEpt::On) },
        Test {
            name: "kvm_of_linux_6_1_without_ept_runs_payload_and_linux",
            run: |c, n| nests(c, n, "6.1", KvmEpt::Off),
        },
        Test { name: "kvm_of_linux_6_12_runs_payload_and_linux", run: |c, n| nests(c, n, "6.12", KvmEpt::On) },
        Test {
            name: "kvm_of_linux_6_12_without_ept_runs_payload_and_linux",
            run: |c, n| nests(c, n, "6.12", KvmEpt::Off),
        },
        Test { name: "kvm_on_the_bare_machine_runs_payload", run: payload_on_the_bare_machine },
        Test { name: "l1hv_under_l1hv_has_vmcs_shadowing_for_its_own_guest_hypervisor", run: under_itself },
        Test { name: "l1hv_under_l1hv_gives_linux_all_four_processors", run: linux_under_both },
        Test { name: "l1hv_under_l1hv_loses_no_posted_interrupt", run: posted_under_itself },
    ]
}

fn nests(context: &Context, name: &str, series: &str, ept: KvmEpt) -> Result<()> {
    let guest = context.guest_hypervisor(series, Work::Demo, ept)?;
    let finished = context.run(&context.bochs(name, guest.under(context.host("stats"))))?;
    finished.must_have_done(&["payload", "linux"])?;
    finished.console_must_say("L1HV-NESTED-INIT Linux")?;
    for operation in finished.transcript.operations() {
        ensure!(operation.right == operation.repeats, "{}: {} right answers", operation.name, operation.right);
    }
    let total = finished.transcript.host_total.as_ref().context("l1hv printed no statistics")?;
    ensure!(total.reflected > 0, "nothing was nested: no exit reached the guest hypervisor");
    Ok(())
}

/// A run without l1hv: a failure here is the machine's or KVM's.
fn payload_on_the_bare_machine(context: &Context, name: &str) -> Result<()> {
    let guest = context.guest_hypervisor("6.1", Work::Payload, KvmEpt::On)?;
    context.run(&context.bochs(name, guest.on_bare_machine()))?.must_have_done(&["payload"])
}

/// Three levels of nesting: the minimal guest hypervisor and its nested guest, under l1hv, under l1hv.
fn under_itself(context: &Context, name: &str) -> Result<()> {
    let exits = |run: &str, option: &str| -> Result<u64> {
        let image = Module::with_args(&context.programs.conformance, "minimal");
        let boot = Boot::L1hv { host: context.host(option), guest: vec![context.host(""), image] };
        let finished = context.run(&context.bochs(&format!("{name}-{run}"), boot))?;
        finished.must_shut_down()?;
        let measured = measure::operations("l1hv", &measure::MINIMAL, &finished.transcript)?;
        let cpuid = measured.into_iter().find(|measurement| measurement.operation == "CPUID");
        Ok(cpuid.context("CPUID was not measured")?.hardware_exits)
    };
    let (shadowed, exiting) = (exits("on", "")?, exits("off", "vmcs-shadowing=off")?);
    ensure!(4 * shadowed < exiting, "CPUID: {shadowed} exits with VMCS shadowing, {exiting} without");
    Ok(())
}

/// The inner l1hv starts its processors by INIT and SIPI, which the outer one delivers, and its processors wait for
/// SIPI in nested guests.
fn linux_under_both(context: &Context, name: &str) -> Result<()> {
    let linux = context.guest_hypervisor("6.1", Work::BootOnly, KvmEpt::On)?;
    let Boot::L1hv { host, mut guest } = linux.under(context.host("")) else { bail!("not under l1hv") };
    guest.insert(0, context.host(""));
    let machine = Machine { cpus: 4, ..context.bochs(name, Boot::L1hv { host, guest }) };
    let finished = context.run(&machine)?;
    finished.must_have_done(&[])?;
    finished.console_must_say("init: 4 cpu")
}

/// The inner l1hv's nested guests get posted interrupts from another processor. KVM in the outer one's place loses some.
fn posted_under_itself(context: &Context, name: &str) -> Result<()> {
    let image = Module::with_args(&context.programs.conformance, "only=smp-posted");
    let boot = Boot::L1hv { host: context.host(""), guest: vec![context.host(""), image] };
    let finished = context.run(&Machine { cpus: 2, ..context.bochs(name, boot) })?;
    finished.must_shut_down()?;
    for case in ["posted", "posted-halted", "posted-host-takes", "posted-host-takes-halted"] {
        finished.debug_must_say(&format!("C smp-posted/{case} 6400 posted, 6400 counted"))?;
    }
    Ok(())
}
