//! The payload's results for people and for files: a table that fits on a screen of text, and one line of JSON.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use guest_abi::RESULT_PREFIX;
use serde_json::{Value, json};
use table::Table;

use crate::cpu;
use crate::report;

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// For people.
    Table,
    /// A result line of kind `timings`.
    Json,
}

impl FromStr for Form {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            _ => bail!("results are shown as table or json, not as {word}"),
        }
    }
}

/// The columns of the table, which are also members of an operation.
const NUMBERS: [&str; 3] = ["percentile_1", "median", "percentile_99"];

/// Shows the results in `file`, which holds the output of `vmm payload` of this level or of a nested guest.
pub fn show(form: Form, system: &str, file: &Path) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let results: Vec<Value> = text.lines().filter_map(result).collect();
    let of_kind = |kind| results.iter().filter(move |result| result["kind"] == kind);
    let mut processor = of_kind("processor").next().context("no payload has reported its processor")?.clone();
    // KVM hides both from its guests, so they are read here: the level that shows the results is the lowest.
    processor["name"] = json!(cpu::brand());
    processor["hypervisor"] = json!(cpu::hypervisor());
    let operations: Vec<&Value> = of_kind("payload").collect();
    ensure!(!operations.is_empty(), "no payload has reported operations");
    match form {
        Form::Table => print!("{}", render(system, &processor, &operations)),
        Form::Json => {
            report::result(
                "timings",
                json!({
                    "system": system,
                    "guest_hypervisor": "linux-kvm",
                    "processor": processor,
                    "operations": operations,
                }),
            );
        }
    }
    Ok(())
}

/// The result in a line, which has a prefix if a nested guest printed it.
fn result(line: &str) -> Option<Value> {
    let (_, json) = line.split_once(RESULT_PREFIX)?;
    serde_json::from_str(json).ok()
}

fn render(system: &str, processor: &Value, operations: &[&Value]) -> String {
    let text = |value: &Value, absent: &str| value.as_str().unwrap_or(absent).to_owned();
    let mut table = Table::new(&["TSC ticks", "1%", "median", "99%"]);
    for operation in operations {
        table.row(&text(&operation["operation"], "?"), NUMBERS.map(|number| operation[number].as_u64()));
    }
    let nothing = &processor["ticks_of_nothing"];
    let warning = match processor["is_emulated"] == true {
        true => "  The TSC counts instructions: an emulator. The numbers mean NOTHING.\n",
        false => "",
    };
    format!(
        "\n  {system}: nested exits on {}\n  TSC: {} kHz; reading it twice: {nothing} ticks\n  \
         hypervisor that CPUID shows: {}\n{warning}\n{}",
        text(&processor["name"], "?"),
        processor["tsc_khz"],
        text(&processor["hypervisor"], "none"),
        table.render()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_fits_on_a_screen_of_text() {
        let processor = json!({ "name": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "tsc_khz": 2_700_000,
            "hypervisor": "KVMKVMKVM", "is_emulated": true, "ticks_of_nothing": 40 });
        let name = "storm: CPUID, VMCALL, RDMSR, WRMSR, OUT";
        let operation =
            json!({ "operation": name, "percentile_1": 1, "median": 12_345_678, "percentile_99": 123_456_789 });
        let text = render("l1hv", &processor, &[&operation; 14]);
        assert!(text.lines().count() <= 24 && text.lines().all(|line| line.len() <= 80), "{text}");
        assert!(text.contains("12,345,678"), "{text}");
    }

    #[test]
    fn a_nested_guests_line_counts_too() {
        assert_eq!(result("nested: L1HV-RESULT {\"kind\":\"done\"}"), Some(json!({ "kind": "done" })));
        assert_eq!(result("vmm: something"), None);
    }
}
