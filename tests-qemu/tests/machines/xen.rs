//! Debian's Xen as guest hypervisor. It asks the BIOS for its memory, in real mode.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests_qemu::machine::Machine;
use tests_qemu::progress::Progress;
use tests_qemu::provision;
use tests_qemu::xen::{XenGuest, XenGuestKind, XenHypervisor};

use crate::context::{Context, Finished, Test};

/// Ticks to a second: Xen and its first domain wait in seconds for what is not there.
const IPS: u64 = 100_000_000;

const GUESTS: &[XenGuest] = &[
    XenGuest { name: "hvm", kind: XenGuestKind::Hvm, cpus: 1 },
    XenGuest { name: "pvh", kind: XenGuestKind::Pvh, cpus: 1 },
    XenGuest { name: "pvh-2", kind: XenGuestKind::Pvh, cpus: 2 },
];

pub fn tests() -> Vec<Test> {
    vec![Test { name: "xen_finds_its_memory_and_runs_linux_in_its_guests", run: guests }]
}

fn prepare(context: &Context) -> Result<XenHypervisor> {
    let Context { layout, provisioned, .. } = context;
    let xen = provision::xen(layout, &Progress::stderr())?;
    XenHypervisor::prepare(layout, provisioned, &xen, provisioned.kernel("6.1")?, GUESTS)
}

fn guests(context: &Context, name: &str) -> Result<()> {
    let boot = prepare(context)?.under(context.host(""));
    let timeout = Duration::from_secs(600);
    let machine = Machine { memory_mib: 2048, ips: IPS, timeout, silence: timeout, ..context.bochs(name, boot) };
    let finished = context.run(&machine)?;
    must_have_run(&finished)?;
    let touched = finished.debug.iter().any(|line| line.contains("which is the host's"));
    ensure!(!touched, "Xen has come to the host's memory");
    Ok(())
}

/// Each guest has come to its init with all of its processors.
fn must_have_run(finished: &Finished) -> Result<()> {
    finished.must_have_done(&[])?;
    for XenGuest { name, cpus, .. } in GUESTS {
        finished.console_must_say(&format!("xen: {name} runs"))?;
        finished.console_must_say(&format!(", {cpus} cpu"))?;
    }
    let greetings = finished.console.iter().filter(|line| line.contains("L1HV-NESTED-INIT")).count();
    ensure!(greetings == GUESTS.len(), "{greetings} guests greet");
    Ok(())
}
