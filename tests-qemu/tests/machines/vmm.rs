//! QEMU as a user of the guest hypervisor's KVM runs it: its virtual machines are nested guests.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests_qemu::machine::{
    Boot, DEFAULT_IPS, Drive, DriveKind, Firmware, Machine, Module, Outcome, QEMU_IN_BOCHS, Source, run_all_in_bochs,
};
use tests_qemu::{guest, linux};

use crate::context::{Context, Test};

/// Limit on a virtual machine, in emulated time.
const LIMIT: Duration = Duration::from_secs(120);
/// Limit on all of them, by the clock.
const TIMEOUT: Duration = Duration::from_secs(900);

pub fn tests() -> Vec<Test> {
    vec![Test { name: "qemu_with_each_of_kvms_features_off_runs_what_it_runs_on_the_bare_machine", run: qemu }]
}

/// A virtual machine, without what it boots.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    boots: Boots,
    /// More arguments of QEMU.
    arguments: &'static str,
    /// A parameter of kvm-intel.
    parameter: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Boots {
    /// A disk whose boot sector prints what SeaBIOS tells of memory.
    Sector,
    /// Linux on two processors, by QEMU's `-kernel` and SeaBIOS.
    Linux,
    /// The same by OVMF.
    LinuxByEfi,
}

const fn row(name: &'static str, boots: Boots, arguments: &'static str, parameter: &'static str) -> Row {
    Row { name, boots, arguments, parameter }
}

const ROWS: &[Row] = &[
    row("pc", Boots::Sector, "", ""),
    row("q35", Boots::Sector, "-machine q35", ""),
    row("irqchip-split", Boots::Sector, "-machine kernel-irqchip=split", ""),
    // QEMU offers an interrupt of KVM's that needs KVM's own local APIC, and fails.
    row("irqchip-off", Boots::Sector, "-machine kernel-irqchip=off -cpu host,-kvm-asyncpf-int", ""),
    row("linux-q35", Boots::Linux, "-machine q35", ""),
    row("linux-irqchip-split", Boots::Linux, "-machine kernel-irqchip=split", ""),
    row("linux-ovmf", Boots::LinuxByEfi, "-machine q35", ""),
    row("ept", Boots::Sector, "", "ept=0"),
    row("vpid", Boots::Sector, "", "vpid=0"),
    row("unrestricted-guest", Boots::Sector, "", "unrestricted_guest=0"),
    row("flexpriority", Boots::Sector, "", "flexpriority=0"),
    row("apicv", Boots::Sector, "", "enable_apicv=0"),
    row("shadow-vmcs", Boots::Sector, "", "enable_shadow_vmcs=0"),
    row("preemption-timer", Boots::Sector, "", "preemption_timer=0"),
    row("pml", Boots::Sector, "", "pml=0"),
    row("eptad", Boots::Sector, "", "eptad=0"),
    row("linux-ept", Boots::Linux, "", "ept=0"),
];

/// What a virtual machine has said, on either stream, and how it has ended.
struct Said {
    lines: Vec<String>,
    outcome: Outcome,
}

fn qemu(context: &Context, name: &str) -> Result<()> {
    let bare = run(context, &format!("{name}-bare"), None)?;
    let under = run(context, name, Some(context.host("")))?;
    for ((row, bare), under) in ROWS.iter().zip(bare).zip(under) {
        for (place, said) in [("bare", &bare), ("under l1hv", &under)] {
            let lines = &said.lines;
            let why = || format!("{} {place}: {}\n{lines:#?}", row.name, said.outcome);
            let has = |text: &str| lines.iter().any(|line| line.contains(text));
            match row.boots {
                Boots::Sector => ensure!(said.outcome == Outcome::GuestShutdown && has("sector: map:"), why()),
                // Its init resets it.
                Boots::Linux | Boots::LinuxByEfi => {
                    ensure!(said.outcome == Outcome::TripleFault && has("L1HV-NESTED-INIT") && has(", 2 cpu"), why());
                }
            }
        }
        let of_sector = |said: &Said| -> Vec<String> {
            said.lines.iter().filter(|line| line.starts_with("sector: ")).cloned().collect()
        };
        ensure!(of_sector(&bare) == of_sector(&under), "{}: {:#?}\nbare: {:#?}", row.name, under.lines, bare.lines);
    }
    Ok(())
}

/// Runs the virtual machines in a Linux, on the bare machine or with l1hv below.
fn run(context: &Context, name: &str, below: Option<Module>) -> Result<Vec<Said>> {
    let Context { layout, provisioned, programs, .. } = context;
    let kernel = provisioned.kernel("6.1")?;
    let initrd = layout.root().join("initrds").join("qemu-guest");
    std::fs::create_dir_all(layout.root().join("initrds"))?;
    guest::write_atomically(&initrd, &guest::nested_linux(&provisioned.busybox)?.finish())?;
    let arguments = format!("{} quiet", linux::default_args(QEMU_IN_BOCHS, DEFAULT_IPS));
    let machines: Vec<Machine> = ROWS
        .iter()
        .map(|row| {
            let boot = match row.boots {
                Boots::Sector => Boot::Disk,
                Boots::Linux | Boots::LinuxByEfi => {
                    Boot::Linux { kernel: Module::with_args(&kernel.image, &arguments), initrds: vec![initrd.clone()] }
                }
            };
            let disk = Drive { file: programs.sector_disk.clone(), kind: DriveKind::Disk };
            let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
            Machine {
                cpus: if row.boots == Boots::Sector { 1 } else { 2 },
                memory_mib: 256,
                drives: if row.boots == Boots::Sector { vec![disk] } else { Vec::new() },
                firmware: if row.boots == Boots::LinuxByEfi { Firmware::Uefi } else { Firmware::Bios },
                qemu_args: words(row.arguments),
                kvm_parameters: words(row.parameter),
                below: below.clone(),
                timeout: TIMEOUT,
                silence: TIMEOUT,
                ..Machine::new(row.name, QEMU_IN_BOCHS, boot)
            }
        })
        .collect();
    let mut lines = vec![Vec::new(); machines.len()];
    let outcomes = run_all_in_bochs(name, &machines, LIMIT, layout, provisioned, |number, line| {
        if line.source == Source::Console || line.text.starts_with("sector: ") {
            lines[number].push(line.text.to_owned());
        }
    })?;
    Ok(lines.into_iter().zip(outcomes).map(|(lines, outcome)| Said { lines, outcome }).collect())
}
