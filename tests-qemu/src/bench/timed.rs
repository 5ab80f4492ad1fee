//! Operations that the nested guest has timed, in TSC ticks. They are never mixed with an emulator's counts.

use serde::Serialize;
use table::Table;

use crate::transcript::{Operation, Timings};

/// Texts on the meaning of a machine's ticks.
const MEASURED: &str = "TSC ticks, read by the nested guest";
const EMULATED: &str = "instructions of an emulator, whose TSC counts them: they mean NOTHING for silicon";

/// An object of `--json`.
#[derive(Debug, Serialize)]
pub struct Timed {
    /// The machine, as the runner names it.
    pub machine: String,
    /// The meaning of the ticks.
    pub ticks: &'static str,
    /// The rest.
    #[serde(flatten)]
    pub timings: Timings,
}

impl Timed {
    /// The timings of `machine`.
    pub fn new(machine: String, timings: Timings) -> Self {
        let ticks = if timings.processor.is_emulated { EMULATED } else { MEASURED };
        Self { machine, ticks, timings }
    }
}

/// A number of an operation.
struct Number {
    heading: &'static str,
    of: fn(&Operation) -> u64,
}

/// The numbers of a system, in the order of its columns.
const NUMBERS: [Number; 3] = [
    Number { heading: "1%", of: |operation| operation.percentile_1 },
    Number { heading: "median", of: |operation| operation.median },
    Number { heading: "99%", of: |operation| operation.percentile_99 },
];

/// The operations as a table for people, the systems side by side, preceded by a line on each one's processor.
pub fn table(timed: &[Timed]) -> String {
    let mut headings = vec!["operation".to_owned()];
    let mut operations: Vec<&str> = Vec::new();
    let mut text = String::new();
    for Timed { machine, ticks, timings } in timed {
        let Timings { system, processor, .. } = timings;
        headings.extend(NUMBERS.map(|number| format!("{system} {}", number.heading)));
        for operation in &timings.operations {
            if !operations.contains(&operation.name.as_str()) {
                operations.push(&operation.name);
            }
        }
        text += &format!(
            "{system}: {machine}; {}, TSC of {} kHz; reading it twice takes {} ticks\n  {ticks}\n",
            processor.name, processor.tsc_khz, processor.ticks_of_nothing
        );
    }
    let mut table = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
    for name in operations {
        let numbers = timed.iter().flat_map(|timed| {
            let operation = timed.timings.operations.iter().find(|operation| operation.name == name);
            NUMBERS.map(|number| operation.map(number.of))
        });
        table.row(name, numbers);
    }
    text + "\n" + &table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(system: &str, is_emulated: bool) -> Timed {
        let timings = serde_json::from_value(serde_json::json!({
            "system": system, "guest_hypervisor": "linux-kvm",
            "processor": { "name": "a processor", "tsc_khz": 2_000_000, "hypervisor": null, "is_emulated": is_emulated, "ticks_of_nothing": 9 },
            "operations": [{ "operation": "CPUID", "repeats": 1000, "right": 1000, "minimum": 1, "percentile_1": 2, "median": 3456, "percentile_99": 4 }],
        }));
        Timed::new("a machine".to_owned(), timings.unwrap())
    }

    #[test]
    fn systems_are_side_by_side() {
        let text = table(&[timed("bare", false), timed("l1hv", false)]);
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row, ["CPUID", "2", "3,456", "4", "2", "3,456", "4"]);
        assert!(!text.contains("NOTHING"), "{text}");
    }

    #[test]
    fn an_emulators_ticks_say_what_they_are() {
        let timed = timed("l1hv", true);
        assert!(serde_json::to_string(&timed).unwrap().contains("mean NOTHING"));
        assert!(table(&[timed]).contains("mean NOTHING"));
    }
}
