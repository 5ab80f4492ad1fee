//! Linux KVM as guest hypervisor, with nested guests that do real work.

use anyhow::{Context as _, Result, ensure};
use tests_qemu::guest::{KvmEpt, Work};

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

/// Without l1hv: what fails here is the machine's or KVM's fault.
fn payload_on_the_bare_machine(context: &Context, name: &str) -> Result<()> {
    let guest = context.guest_hypervisor("6.1", Work::Payload, KvmEpt::On)?;
    context.run(&context.bochs(name, guest.on_bare_machine()))?.must_have_done(&["payload"])
}
