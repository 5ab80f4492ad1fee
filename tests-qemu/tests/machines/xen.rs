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
    vec![Test { name: "xen_finds_its_memory_and_runs_pvh_and_hvm_guests", run: guests }]
}

fn prepare(context: &Context) -> Result<XenHypervisor> {
    let Context { layout, provisioned, programs, .. } = context;
    let xen = provision::xen(layout, &Progress::stderr())?;
    XenHypervisor::prepare(layout, provisioned, (&xen, provisioned.kernel("6.1")?), programs, GUESTS)
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
    let says = |text: &str| finished.console.iter().filter(|line| line.contains(text)).count();
    for XenGuest { name, kind, cpus } in GUESTS {
        finished.console_must_say(&format!("xen: {name} runs"))?;
        match kind {
            XenGuestKind::Pvh => finished.console_must_say(&format!(", {cpus} cpu"))?,
            // Xen prints what a guest writes to port E9H.
            XenGuestKind::Hvm => {
                ensure!(says("sector: map:") > 4 && says("sector: base:") == 1, "the HVM guest says nothing")
            }
        }
    }
    let linuxes = GUESTS.iter().filter(|guest| guest.kind == XenGuestKind::Pvh).count();
    ensure!(says("L1HV-NESTED-INIT") == linuxes, "not each Linux greets");
    Ok(())
}
