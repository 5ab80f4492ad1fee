//! Processors that lack a feature: KVM and QEMU remove it, and the suite's quick groups run bare and under l1hv.
//!
//! QEMU itself lists the features that can be removed. A Linux on Bochs runs machines with as many processors as it
//! has, one after the other. Several such Linuxes run side by side.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::processors::{Found, OfProcessor, Verdicts};
use super::{Explained, KVM, Report, Results};
use crate::build;
use crate::command;
use crate::layout::Layout;
use crate::machine::{self, Boot, DEFAULT_MEMORY_MIB, Line, Machine, Module, Outcome, QEMU_IN_BOCHS};
use crate::progress::Progress;
use crate::provision::Provisioned;
use crate::side_by_side;

/// The groups of the suite that run. One compares all capabilities; one enters nested guests, which exit and are
/// resumed.
const GROUPS: &str = "caps,stepping";

/// The most rows that share a Linux: enough that its start is short in comparison, few enough that all rows need
/// several Linuxes.
const ROWS_OF_A_BOOT: usize = 14;

/// Limit on one machine, in emulated time.
const LIMIT: Duration = Duration::from_secs(40);

/// Parameters of kvm_intel that remove a feature of its guests' processor.
const PARAMETERS: [&str; 11] = [
    "ept=0",
    "vpid=0",
    "unrestricted_guest=0",
    "flexpriority=0",
    "enable_apicv=0",
    "eptad=0",
    "pml=0",
    "enable_shadow_vmcs=0",
    "preemption_timer=0",
    "vnmi=0",
    "ple_gap=0",
];

/// Features that are missing together.
const PAIRS: [[&str; 2]; 6] = [
    ["vmx-true-ctls", "vmx-shadow-vmcs"],
    ["vmx-desc-exit", "vmx-movdr-exit"],
    ["vmx-ept-1gb", "vmx-ept-2mb"],
    ["vmx-ept-execonly", "vmx-eptad"],
    ["vmx-vmwrite-vmexit-fields", "vmx-activity-wait-sipi"],
    ["vmx-invvpid-single-addr", "vmx-ept-1gb"],
];

/// Machines with other numbers of processors, or other memory.
const SIZES: [(&str, u32, u32, &str); 8] = [
    ("4 processors", 4, DEFAULT_MEMORY_MIB, ""),
    ("4 processors, q35", 4, DEFAULT_MEMORY_MIB, "-machine q35"),
    ("2 processors", 2, DEFAULT_MEMORY_MIB, ""),
    ("q35", 1, DEFAULT_MEMORY_MIB, "-machine q35"),
    ("64 MiB", 1, 64, ""),
    ("96 MiB", 1, 96, ""),
    ("128 MiB", 1, 128, ""),
    ("4 GiB", 1, 4096, ""),
];

/// A processor, or a machine.
#[derive(Debug, Clone)]
struct Row {
    name: String,
    cpus: u32,
    memory_mib: u32,
    qemu_args: String,
    kvm_parameter: Option<String>,
}

impl Row {
    fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            cpus: 1,
            memory_mib: DEFAULT_MEMORY_MIB,
            qemu_args: String::new(),
            kvm_parameter: None,
        }
    }

    fn without(features: &[&str]) -> Self {
        let minus: Vec<String> = features.iter().map(|feature| format!("-{feature}")).collect();
        Self { qemu_args: format!("-cpu host,{}", minus.join(",")), ..Self::new(minus.join(" ")) }
    }

    /// The machine that boots `boot`.
    fn machine(&self, name: String, boot: Boot) -> Machine {
        Machine {
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            qemu_args: self.qemu_args.split_whitespace().map(str::to_owned).collect(),
            kvm_parameters: self.kvm_parameter.iter().cloned().collect(),
            timeout: Duration::from_secs(7200),
            silence: Duration::from_secs(1800),
            ..Machine::new(name, QEMU_IN_BOCHS, boot)
        }
    }
}

/// All rows whose names contain `filter`. Rows with the most processors come first, as they take longest. KVM's
/// parameters come last, as each loads the module anew.
fn rows(provisioned: &Provisioned, filter: &str) -> Result<Vec<Row>> {
    let features = features(provisioned)?;
    let size = |&(name, cpus, memory_mib, qemu_args): &(&str, u32, u32, &str)| Row {
        cpus,
        memory_mib,
        qemu_args: qemu_args.to_owned(),
        ..Row::new(name)
    };
    let mut rows: Vec<Row> = SIZES.iter().map(size).collect();
    rows.push(Row::new("as it is"));
    rows.extend(features.iter().map(|feature| Row::without(&[feature])));
    rows.extend(PAIRS.iter().map(|pair| Row::without(pair)));
    rows.extend(PARAMETERS.iter().map(|parameter| Row {
        kvm_parameter: Some((*parameter).to_owned()),
        ..Row::new(format!("kvm_intel {parameter}"))
    }));
    rows.retain(|row| row.name.contains(filter));
    Ok(rows)
}

/// The rows of each Linux. The Linux has as many processors as its rows: more would only make it slower.
fn boots(rows: &[Row]) -> Vec<&[Row]> {
    rows.chunk_by(|one, next| one.cpus == next.cpus).flat_map(|rows| rows.chunks(ROWS_OF_A_BOOT)).collect()
}

/// The VMX features that this QEMU can remove.
fn features(provisioned: &Provisioned) -> Result<Vec<String>> {
    let help = command::output(Command::new(&provisioned.qemu).args(["-cpu", "help"]))?;
    let mut features: Vec<String> =
        help.split_whitespace().filter(|word| word.starts_with("vmx-")).map(str::to_owned).collect();
    features.sort();
    features.dedup();
    ensure!(!features.is_empty(), "{} lists no VMX features", provisioned.qemu.display());
    Ok(features)
}

/// Runs the rows whose names contain `filter`.
///
/// # Errors
/// When an outer machine could not be started.
pub fn run(
    layout: &Layout,
    progress: &Progress,
    provisioned: &Provisioned,
    name: &str,
    filter: &str,
) -> Result<Verdicts> {
    let rows = rows(provisioned, filter)?;
    ensure!(!rows.is_empty(), "no row of the matrix is called like \"{filter}\"");
    let explained = Explained::find(layout)?;
    let image = Module::with_args(build::conformance(layout, progress)?, format!("only={GROUPS}"));
    let host = Module::new(build::l1hv(layout, progress)?);
    let matrix = Matrix { layout, progress, provisioned, name, explained, image, host };
    let boots = boots(&rows).into_iter().enumerate().collect();
    let mut verdicts = Vec::new();
    for of_boot in side_by_side::map(boots, |(number, rows)| matrix.boot(number, rows)) {
        verdicts.extend(of_boot?);
    }
    Ok(Verdicts(verdicts))
}

struct Matrix<'a> {
    layout: &'a Layout,
    progress: &'a Progress,
    provisioned: &'a Provisioned,
    name: &'a str,
    explained: Explained,
    image: Module,
    host: Module,
}

impl Matrix<'_> {
    /// Runs these rows in the Linux with this number.
    fn boot(&self, number: usize, rows: &[Row]) -> Result<Vec<OfProcessor>> {
        let machines: Vec<Machine> = rows.iter().flat_map(|row| self.machines(row)).collect();
        let name = format!("{}-{number}", self.name);
        let step = self.progress.step(format!("{name}: {} of QEMU's processors", rows.len()));
        let mut results: Vec<Results> = machines.iter().map(|_| Results::default()).collect();
        let mut running = None;
        let on_line = |number: usize, line: Line<'_>| {
            if running.replace(number) != Some(number) {
                step.detail(&rows[number / 2].name);
            }
            results[number].add(line.text);
        };
        let outcomes = machine::run_all_in_bochs(&name, &machines, LIMIT, self.layout, self.provisioned, on_line)?;
        step.done();
        let both = results.chunks(2).zip(outcomes.chunks(2));
        let verdict = |(row, (results, outcomes)): (&Row, (&[Results], &[Outcome]))| {
            let [bare, under] = results else { unreachable!("two machines a row") };
            let found = found((bare, &outcomes[0]), (under, &outcomes[1]), &self.explained);
            OfProcessor { processor: row.name.clone(), found }
        };
        Ok(rows.iter().zip(both).map(verdict).collect())
    }

    /// The row's machine, bare and with l1hv.
    fn machines(&self, row: &Row) -> [Machine; 2] {
        let bare = Boot::Multiboot { kernel: self.image.clone(), modules: Vec::new() };
        let under = Boot::L1hv { host: self.host.clone(), guest: vec![self.image.clone()] };
        [row.machine("bare".to_owned(), bare), row.machine("l1hv".to_owned(), under)]
    }
}

fn found(bare: (&Results, &Outcome), under: (&Results, &Outcome), explained: &Explained) -> Found {
    if let Outcome::HostStop(stop) = under.1 {
        return Found::Stops(format!("{}: {}", stop.kind, stop.message));
    }
    for (place, (results, outcome)) in [("bare", bare), ("under l1hv", under)] {
        if !results.complete || *outcome != Outcome::GuestShutdown {
            let last = results.cases.last().map_or("none", |(case, _)| case);
            return Found::Failed(format!("{place}: {outcome}; the last case was {last}"));
        }
    }
    // These are groups for one processor.
    let explained = explained.under("", 1, Some(KVM), &bare.0.cases);
    Found::Compared(Report::compare(&bare.0.cases, &under.0.cases, &explained, Some("*")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_boot_have_as_many_processors_and_no_row_is_lost() {
        let row = |cpus| Row { cpus, ..Row::new(format!("{cpus}")) };
        let rows: Vec<Row> = [4, 4, 2].into_iter().chain([1; ROWS_OF_A_BOOT + 1]).map(row).collect();
        let boots = boots(&rows);
        let sizes: Vec<_> = boots.iter().map(|rows| (rows[0].cpus, rows.len())).collect();
        assert_eq!(sizes, [(4, 2), (2, 1), (1, ROWS_OF_A_BOOT), (1, 1)]);
        assert!(boots.iter().all(|boot| boot.iter().all(|row| row.cpus == boot[0].cpus)));
    }

    #[test]
    fn features_are_taken_away_by_name() {
        let row = Row::without(&["vmx-pml", "vmx-ple"]);
        assert_eq!((row.name.as_str(), row.qemu_args.as_str()), ("-vmx-pml -vmx-ple", "-cpu host,-vmx-pml,-vmx-ple"));
    }
}
