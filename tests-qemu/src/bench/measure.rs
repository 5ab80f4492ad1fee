//! From marks to measurements.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use guest_abi::{minimal, payload};
use serde::{Deserialize, Serialize};
use shadow::exit::ExitReason;

use super::model;
use crate::counters::{CountMark, Counters};
use crate::protocol::KERNEL_STARTS;
use crate::transcript::Transcript;

/// A guest hypervisor with a nested guest that does each operation many times, with a mark of the emulator around each.
#[derive(Debug)]
pub struct Marked {
    /// As in [`Measurement::guest_hypervisor`].
    guest_hypervisor: &'static str,
    /// The mark of the first operation. The last character counts up for the others.
    mark: &'static [u8],
    repeats: usize,
    /// The names of the operations.
    pub operations: &'static [&'static str],
}

/// Linux KVM with the payload.
pub const PAYLOAD: Marked = Marked {
    guest_hypervisor: "linux-kvm",
    mark: payload::COUNT_MARK,
    repeats: payload::REPEATS,
    operations: &payload::OPERATIONS,
};

/// The minimal guest hypervisor with its own nested guest.
pub const MINIMAL: Marked = Marked {
    guest_hypervisor: "minimal",
    mark: minimal::MARK,
    repeats: minimal::REPEATS,
    operations: &minimal::OPERATIONS,
};

/// What one operation costs on one system; an object of `--json`.
///
/// "Host" is the lowest hypervisor. The counts of VMX and MSR instructions are the host's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measurement {
    /// `bare`, `l1hv` or `kvm`.
    pub system: String,
    /// The hypervisor that runs the nested guest.
    pub guest_hypervisor: String,
    /// The operation.
    pub operation: String,
    /// Instructions of all levels.
    pub instructions: u64,
    /// Instructions in VMX root operation.
    pub host_instructions: u64,
    /// VM exits of the processor.
    pub hardware_exits: u64,
    /// VMREADs of the host. The following fields count other instructions of the host.
    pub vmread: u64,
    /// See `vmread`.
    pub vmwrite: u64,
    /// See `vmread`.
    pub vmptrld: u64,
    /// See `vmread`.
    pub vmclear: u64,
    /// See `vmread`.
    pub invept: u64,
    /// See `vmread`.
    pub invvpid: u64,
    /// See `vmread`.
    pub rdmsr: u64,
    /// See `vmread`.
    pub wrmsr: u64,
    /// An estimate for silicon ([`model`]).
    #[serde(default)]
    pub model_cycles: u64,
    /// Hardware exits by the basic exit reason's name.
    #[serde(default)]
    pub exits: BTreeMap<String, u64>,
}

/// A number of a measurement.
#[derive(Debug)]
pub struct Number {
    /// Heading of its column.
    pub heading: &'static str,
    /// Its value.
    pub of: fn(&Measurement) -> u64,
}

/// All numbers, in the order of the columns.
pub const NUMBERS: [Number; 12] = [
    Number { heading: "instructions", of: |m| m.instructions },
    Number { heading: "of the host", of: |m| m.host_instructions },
    Number { heading: "exits", of: |m| m.hardware_exits },
    Number { heading: "VMREAD", of: |m| m.vmread },
    Number { heading: "VMWRITE", of: |m| m.vmwrite },
    Number { heading: "VMPTRLD", of: |m| m.vmptrld },
    Number { heading: "VMCLEAR", of: |m| m.vmclear },
    Number { heading: "INVEPT", of: |m| m.invept },
    Number { heading: "INVVPID", of: |m| m.invvpid },
    Number { heading: "RDMSR", of: |m| m.rdmsr },
    Number { heading: "WRMSR", of: |m| m.wrmsr },
    Number { heading: "model cycles", of: |m| m.model_cycles },
];

impl Measurement {
    /// This measurement with `suffix` after the operation's name.
    pub fn renamed(mut self, suffix: &str) -> Self {
        self.operation.push_str(suffix);
        self
    }

    /// Whether the numbers are those of a whole boot, not of one operation.
    pub fn is_total(&self) -> bool {
        [BOOT, NESTED_BOOT].contains(&self.operation.as_str())
    }

    /// Takes each number from `number`, which is called with the function that reads it from the counters.
    fn new(
        system: &str,
        guest_hypervisor: &str,
        operation: &str,
        number: impl Fn(&dyn Fn(&Counters) -> u64) -> u64,
    ) -> Self {
        let named = |name: &'static str| number(&move |counters: &Counters| counters.get(name));
        let exits_for = |reason: u16| {
            let count = number(&move |counters: &Counters| counters.exits.get(&reason).copied().unwrap_or(0));
            let name = ExitReason(reason.into()).name().map_or_else(|| reason.to_string(), str::to_owned);
            (count > 0).then_some((name, count))
        };
        let mut measurement = Self {
            system: system.to_owned(),
            guest_hypervisor: guest_hypervisor.to_owned(),
            operation: operation.to_owned(),
            instructions: number(&Counters::instructions),
            host_instructions: number(&Counters::host_instructions),
            hardware_exits: number(&Counters::hardware_exits),
            vmread: named("vmread"),
            vmwrite: named("vmwrite"),
            vmptrld: named("vmptrld"),
            vmclear: named("vmclear"),
            invept: named("invept"),
            invvpid: named("invvpid"),
            rdmsr: named("rdmsr"),
            wrmsr: named("wrmsr"),
            model_cycles: 0,
            exits: (0..ExitReason::BASIC_COUNT as u16).filter_map(exits_for).collect(),
        };
        measurement.model_cycles = model::cycles(&measurement);
        measurement
    }
}

/// The operations between marks: of each number the median over all repeats, the loop's handful of
/// instructions included.
pub fn operations(system: &str, marked: &Marked, transcript: &Transcript) -> Result<Vec<Measurement>> {
    let &Marked { guest_hypervisor, mark, repeats, operations } = marked;
    operations
        .iter()
        .enumerate()
        .map(|(index, operation)| {
            let mut mark = mark.to_vec();
            mark[marked.mark.len() - 1] += index as u8;
            let mark = String::from_utf8_lossy(&mark);
            let marks: Vec<&CountMark> = transcript.counts.iter().filter(|count| count.name == mark).collect();
            ensure!(marks.len() == repeats + 1, "{system}, {operation}: {} marks of {}", marks.len(), repeats + 1);
            let each: Vec<Counters> = marks.windows(2).map(|pair| &pair[1].counters - &pair[0].counters).collect();
            Ok(Measurement::new(system, guest_hypervisor, operation, |number| median(each.iter().map(number))))
        })
        .collect()
}

fn median(values: impl Iterator<Item = u64>) -> u64 {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values[values.len() / 2]
}

/// The whole boots of the guest hypervisor and of its nested Linux.
pub fn boots(system: &str, transcript: &Transcript) -> Result<[Measurement; 2]> {
    let counts = &transcript.counts;
    let last = |marks: &[CountMark], name: &str| marks.iter().rposition(|mark| mark.name == name);
    let at = |index: Option<usize>, name: &str| index.with_context(|| format!("{system}: no mark \"{name}\""));
    // With KVM below, each level sets each mark. The guest hypervisor's is the last.
    let init = at(last(counts, "init"), "init")?;
    let kernel = at(last(&counts[..init], KERNEL_STARTS), KERNEL_STARTS)?;
    let nested = at(last(counts, "nested-begin"), "nested-begin")?;
    let nested_init = counts[nested..].iter().position(|mark| mark.name == "nested-init");
    let nested_init = nested + at(nested_init, "nested-init")?;
    let whole = |operation: &str, from: usize, to: usize| {
        let difference = &counts[to].counters - &counts[from].counters;
        Measurement::new(system, PAYLOAD.guest_hypervisor, operation, |number| number(&difference))
    };
    Ok([whole(BOOT, kernel, init), whole(NESTED_BOOT, nested, nested_init)])
}

/// From the decompressed kernel's first steps to init.
const BOOT: &str = "guest hypervisor's Linux, boot to init";

/// From the first entry to init's first line.
const NESTED_BOOT: &str = "nested Linux, boot to init";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::COUNT_PREFIX;

    fn transcript(lines: &[&str]) -> Transcript {
        let parse = |line: &&str| CountMark::parse(&format!("{COUNT_PREFIX}{line}")).unwrap();
        Transcript { counts: lines.iter().map(parse).collect(), ..Transcript::default() }
    }

    #[test]
    fn of_two_levels_the_guest_hypervisors_boot_counts() {
        let transcript = transcript(&[
            "efer.sce root=1 exits=",
            "init root=2 exits=",
            "nested-begin root=3 exits=",
            "efer.sce root=10 exits=",
            "init root=30 exits=",
            "nested-begin root=100 exits=",
            "nested-init root=400 exits=10:7",
            "nested-init root=500 exits=10:9",
        ]);
        let [boot, nested] = boots("kvm", &transcript).unwrap();
        assert_eq!(boot.instructions, 20);
        assert_eq!((nested.instructions, nested.hardware_exits), (300, 7));
    }

    #[test]
    fn a_timer_interrupt_does_not_change_the_median() {
        let line = |total: u64| format!("payload-opA root={total} exits=");
        let mut total = 0;
        let mut lines = vec![line(0)];
        for n in 0..PAYLOAD.repeats {
            total += if n == 7 { 5000 } else { 20 };
            lines.push(line(total));
        }
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        // The first operation is complete; the second has no marks, which the error reports.
        let error = operations("l1hv", &PAYLOAD, &transcript(&lines)).unwrap_err();
        assert_eq!(error.to_string(), "l1hv, VMCALL: 0 marks of 1001");
        let values = lines.windows(2).map(|_| 20);
        assert_eq!(median(values), 20);
    }
}
