//! Guest hypervisors that nobody here wrote, on each machine that they were tried on: one table.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use table::Table;

use crate::build::GuestPrograms;
use crate::debian::{self, Grub};
use crate::guest::{KvmEpt, Plan, Work};
use crate::layout::Layout;
use crate::linux;
use crate::machine::{
    BOCHS, Boot, ChosenEmulator, Drive, DriveKind, Firmware, Machine, Module, Outcome, QEMU_IN_BOCHS,
};
use crate::progress::Progress;
use crate::provision::{self, Provisioned};
use crate::transcript::{Event, Transcript};
use crate::xen::{XenGuest, XenGuestKind, XenHypervisor};

const TIMEOUT: Duration = Duration::from_secs(1200);

/// What the rows need.
pub struct Context<'a> {
    /// The directories.
    pub layout: &'a Layout,
    /// Where progress is shown.
    pub progress: &'a Progress,
    /// What machines need.
    pub provisioned: &'a Provisioned,
    /// The guests' own programs.
    pub programs: &'a GuestPrograms,
    /// l1hv, without arguments.
    pub l1hv: Module,
}

/// A guest hypervisor on a machine.
struct Row {
    name: &'static str,
    guest: &'static str,
    machine: &'static str,
    run: fn(&Context<'_>, &str) -> Result<()>,
}

const fn row(
    name: &'static str,
    guest: &'static str,
    machine: &'static str,
    run: fn(&Context<'_>, &str) -> Result<()>,
) -> Row {
    Row { name, guest, machine, run }
}

const ROWS: &[Row] = &[
    row("linux-6.1", "Linux 6.1 KVM: payload, nested Linux", "Bochs, BIOS", |context, name| {
        linux(context, name, "6.1", BOCHS, Firmware::Bios)
    }),
    row("linux-6.12", "Linux 6.12 KVM: payload, nested Linux", "Bochs, BIOS", |context, name| {
        linux(context, name, "6.12", BOCHS, Firmware::Bios)
    }),
    row("linux-6.1-efi", "Linux 6.1 KVM: payload, nested Linux", "Bochs, EFI", |context, name| {
        linux(context, name, "6.1", BOCHS, Firmware::Uefi)
    }),
    row("linux-6.12-efi", "Linux 6.12 KVM: payload, nested Linux", "Bochs, EFI", |context, name| {
        linux(context, name, "6.12", BOCHS, Firmware::Uefi)
    }),
    row("linux-6.1-kvm", "Linux 6.1 KVM: payload, nested Linux", "QEMU in Bochs", |context, name| {
        linux(context, name, "6.1", QEMU_IN_BOCHS, Firmware::Bios)
    }),
    row("xen-4.17", "Xen 4.17: PVH Linux with 1 and 2 cpus, HVM", "Bochs, BIOS", xen),
    row("debian-cd", "Debian from its disk, systemd, QEMU; l1hv from CD", "Bochs, BIOS", debian_from_cd),
    row("debian-grub", "Debian from its disk; l1hv by the disk's GRUB", "Bochs, BIOS", debian_by_grub),
    row("debian-grub-efi", "Debian from its disk; l1hv by the disk's GRUB", "Bochs, EFI", debian_by_efi),
];

/// Names of the rows.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.name)
}

/// Runs the rows of these names, or all, and prints the table. Returns whether all are right.
pub fn run(context: &Context<'_>, names: &[String]) -> bool {
    let mut table = Table::new(&["guest", "machine", "result", "seconds"]);
    let mut is_right = true;
    for row in ROWS.iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name)) {
        let step = context.progress.step(row.name.to_owned());
        let start = Instant::now();
        let result = (row.run)(context, &format!("guests-{}", row.name));
        let seconds = start.elapsed().as_secs();
        let text = match &result {
            Ok(()) => "right".to_owned(),
            Err(error) => format!("{error:#}").lines().next().unwrap_or_default().to_owned(),
        };
        is_right &= result.is_ok();
        step.done();
        table.row_of(&[row.guest, row.machine, &text], [Some(seconds)]);
    }
    print!("{}", table.render());
    is_right
}

/// Runs a machine: returns what it printed and how it ended.
fn outcome(context: &Context<'_>, machine: &Machine) -> Result<(Vec<String>, Transcript, Outcome)> {
    let mut lines = Vec::new();
    let mut transcript = Transcript::default();
    let outcome = machine.run(context.layout, context.provisioned, |line| {
        if let Some(event) = Event::of(line) {
            transcript.add(event);
        }
        lines.push(line.text.to_owned());
    })?;
    Ok((lines, transcript, outcome))
}

/// Whether a machine without ACPI has ended as its guest wants it: by a triple fault.
fn must_end(outcome: &Outcome, firmware: Firmware) -> Result<()> {
    match (outcome, firmware) {
        (Outcome::GuestShutdown, Firmware::Bios) => Ok(()),
        (Outcome::HostStop(stop), Firmware::Uefi) if stop.kind == "triple-fault" => Ok(()),
        _ => bail!("{outcome}"),
    }
}

fn linux(context: &Context<'_>, name: &str, series: &str, emulator: ChosenEmulator, firmware: Firmware) -> Result<()> {
    let Context { layout, provisioned, programs, .. } = context;
    let machine = Machine::new(name, emulator, Boot::Disk);
    let plan = Plan::new(provisioned.kernel(series)?, Work::Demo, KvmEpt::On);
    let mut arguments = linux::default_args(emulator, machine.ips);
    if firmware == Firmware::Uefi {
        // OVMF has no ACPI tables for Bochs.
        arguments += " l1hv.end=reset";
    }
    let guest = plan.prepare_with(layout, provisioned, programs, &arguments)?;
    let boot = guest.under(context.l1hv.clone());
    let (_, transcript, outcome) =
        outcome(context, &Machine { boot, firmware, timeout: TIMEOUT, silence: TIMEOUT, ..machine })?;
    must_end(&outcome, firmware)?;
    ensure!(transcript.error().is_none(), "{}", transcript.error().unwrap_or_default());
    for work in ["payload", "linux"] {
        ensure!(transcript.is_done(work), "{work} is not done");
    }
    Ok(())
}

/// The guests that Xen makes.
pub const XEN_GUESTS: &[XenGuest] = &[
    XenGuest { name: "hvm", kind: XenGuestKind::Hvm, cpus: 1 },
    XenGuest { name: "pvh", kind: XenGuestKind::Pvh, cpus: 1 },
    XenGuest { name: "pvh-2", kind: XenGuestKind::Pvh, cpus: 2 },
];

/// Ticks to a second: Xen and its first domain wait in seconds for what is not there.
const XEN_IPS: u64 = 100_000_000;

/// Xen on Bochs.
///
/// # Errors
/// When a file cannot be read or written.
pub fn xen_machine(context: &Context<'_>, name: &str) -> Result<Machine> {
    let Context { layout, provisioned, programs, progress, l1hv } = context;
    let xen = provision::xen(layout, progress)?;
    let hypervisor =
        XenHypervisor::prepare(layout, provisioned, (&xen, provisioned.kernel("6.1")?), programs, XEN_GUESTS)?;
    let machine = Machine::new(name, BOCHS, hypervisor.under(l1hv.clone()));
    Ok(Machine { memory_mib: 2048, ips: XEN_IPS, timeout: TIMEOUT, silence: TIMEOUT, ..machine })
}

/// Whether each of Xen's guests has done what it is there for.
///
/// # Errors
/// When one has not.
pub fn xen_guests_have_run(lines: &[String]) -> Result<()> {
    let says = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
    for XenGuest { name, kind, cpus } in XEN_GUESTS {
        ensure!(says(&format!("xen: {name} runs")) == 1, "{name} does not run");
        let is_right = match kind {
            XenGuestKind::Pvh => says(&format!(", {cpus} cpu")) > 0,
            // Xen prints what a guest writes to port E9H.
            XenGuestKind::Hvm => says("sector: map:") > 4 && says("sector: base:") == 1,
        };
        ensure!(is_right, "{name} says nothing");
    }
    let linuxes = XEN_GUESTS.iter().filter(|guest| guest.kind == XenGuestKind::Pvh).count();
    ensure!(says("L1HV-NESTED-INIT") == linuxes, "not each Linux greets");
    Ok(())
}

fn xen(context: &Context<'_>, name: &str) -> Result<()> {
    let (lines, _, outcome) = outcome(context, &xen_machine(context, name)?)?;
    must_end(&outcome, Firmware::Bios)?;
    xen_guests_have_run(&lines)
}

fn debian_from_cd(context: &Context<'_>, name: &str) -> Result<()> {
    let host = Module { args: "boot=disk".to_owned(), ..context.l1hv.clone() };
    debian(context, name, Grub::Debian, Firmware::Bios, Boot::L1hv { host, guest: Vec::new() })
}

fn debian_by_grub(context: &Context<'_>, name: &str) -> Result<()> {
    debian(context, name, Grub::L1hv { multiboot: 1, arguments: "" }, Firmware::Bios, Boot::Disk)
}

fn debian_by_efi(context: &Context<'_>, name: &str) -> Result<()> {
    let grub = Grub::L1hv { multiboot: 2, arguments: "l1hv.end=reset" };
    debian(context, name, grub, Firmware::Uefi, Boot::Disk)
}

fn debian(context: &Context<'_>, name: &str, grub: Grub, firmware: Firmware, boot: Boot) -> Result<()> {
    let Context { layout, provisioned, progress, l1hv, .. } = context;
    let disk = debian::disk(layout, provisioned, &l1hv.file, grub, progress)?;
    let drives = vec![Drive { file: disk, kind: DriveKind::Disk }];
    let machine = Machine::new(name, BOCHS, boot);
    let machine = Machine { drives, firmware, memory_mib: 2048, timeout: TIMEOUT, silence: TIMEOUT, ..machine };
    let (lines, _, outcome) = outcome(context, &machine)?;
    let has = |text: &str| lines.iter().any(|line| line.contains(text));
    ensure!(has("the guest hypervisor starts"), "l1hv does not start: {outcome}");
    ensure!(has("debian: Linux"), "Debian does not come to its service: {outcome}");
    ensure!(has("L1HV-NESTED-INIT") && has(", 2 cpu"), "the nested guest does not greet: {outcome}");
    must_end(&outcome, firmware)
}
