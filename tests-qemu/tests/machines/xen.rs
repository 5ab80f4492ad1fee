//! Debian's Xen as guest hypervisor. It asks the BIOS for its memory, in real mode.

use anyhow::{Result, ensure};
use tests_qemu::guests;
use tests_qemu::progress::Progress;

use crate::context::{Context, Test};

pub fn tests() -> Vec<Test> {
    vec![Test { name: "xen_finds_its_memory_and_runs_pvh_and_hvm_guests", run }]
}

fn run(context: &Context, name: &str) -> Result<()> {
    let Context { layout, provisioned, programs, .. } = context;
    let progress = &Progress::stderr();
    let context_of_guests = guests::Context { layout, progress, provisioned, programs, l1hv: context.host("") };
    let finished = context.run(&guests::xen_machine(&context_of_guests, name)?)?;
    finished.must_have_done(&[])?;
    guests::xen_guests_have_run(&finished.console)?;
    let touched = finished.debug.iter().any(|line| line.contains("which is the host's"));
    ensure!(!touched, "Xen has come to the host's memory");
    Ok(())
}
