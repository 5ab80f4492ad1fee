//! Devices that move memory as the guest hypervisor tells them, behind QEMU's IOMMU.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests_qemu::machine::{self, Boot, DEFAULT_IPS, Line, Machine, Module, Outcome, QEMU_IN_BOCHS, Source};

use crate::context::{Context, Test};

/// Limit on a machine, in emulated time.
const LIMIT: Duration = Duration::from_secs(120);

/// A transfer takes a tenth of a second.
const IPS: u64 = DEFAULT_IPS / 4;

const CHIPSET: [&str; 2] = ["-machine", "q35"];
const IOMMU: [&str; 2] = ["-device", "intel-iommu"];
const DEVICE: [&str; 2] = ["-device", "edu,dma_mask=0xffffffff"];

pub fn tests() -> Vec<Test> {
    vec![Test { name: "no_device_reaches_the_host_or_the_iommu_that_keeps_it_from_there", run: no_device_reaches }]
}

/// Two machines in one outer Linux: with the IOMMU in use, and with it left alone.
fn no_device_reaches(context: &Context, name: &str) -> Result<()> {
    let machine = |options: &str| {
        let image = Module::with_args(&context.programs.conformance, "dma");
        // So few tables leave the end of the host's memory unused.
        let host = context.host(&format!("stats ept-tables=1024 {options}"));
        let boot = Boot::L1hv { host, guest: vec![image] };
        let qemu_args = [CHIPSET, IOMMU, DEVICE].concat().iter().map(|&word| word.to_owned()).collect();
        Machine { qemu_args, ips: IPS, ..Machine::new("dma", QEMU_IN_BOCHS, boot) }
    };
    let machines = [machine("iommu=on"), machine("iommu=off")];
    let mut said = [const { Vec::new() }; 2];
    let on_line = |number: usize, line: Line<'_>| {
        if line.source == Source::Debug {
            said[number].push(line.text.to_owned());
        }
    };
    let Context { layout, provisioned, .. } = context;
    let outcomes = machine::run_all_in_bochs(name, &machines, LIMIT, layout, provisioned, on_line)?;
    let must_say = |number: usize, texts: &[&str]| {
        let lines: &[String] = &said[number];
        for text in texts {
            ensure!(lines.iter().any(|line| line.contains(text)), "machine {number} never says \"{text}\": {lines:#?}");
        }
        Ok(())
    };
    // QEMU warns of each transfer that its IOMMU blocks, and its warnings count as errors: the first machine's outcome
    // says nothing.
    ensure!(outcomes[1] == Outcome::GuestShutdown, "{outcomes:?}: {said:#?}");
    must_say(
        0,
        &[
            "devices are kept from the memory of l1hv by IOMMUs: 1,",
            "one is the unit's: false, sum 0",
            "the unit's registers are hidden: true",
            "own memory moves: true",
            "VMPTRST to the unit: ok",
            "EPT12 at the unit: exit=0x31",
            "an IOMMU has blocked a write of device 00:01.0 at 0xfed90000",
            "an IOMMU has blocked a read of device 00:01.0 at 0x",
            "the host's first bytes are read: false",
            "the host's last bytes are written: false",
            "dma: done",
        ],
    )?;
    must_say(
        1,
        &[
            "devices can reach the memory of l1hv, as the guest hypervisor tells them: iommu=off",
            "one is the unit's: true, sum 0",
            "the unit's registers are hidden: false",
            "own memory moves: true",
            "the host's first bytes are read: true",
            "the host's last bytes are written: true",
            "dma: done",
        ],
    )
}
