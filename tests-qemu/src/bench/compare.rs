//! Two runs of the benchmark, number by number.

use table::Table;

use super::measure::{Measurement, NUMBERS};

/// The changes from `old` to `new` as a table, or one line if nothing changed.
pub fn compare(old: &[Measurement], new: &[Measurement]) -> String {
    let mut table = Table::new(&["operation", "system", "number", "before", "now"]);
    let mut changes = 0;
    for now in new {
        let same = |before: &&Measurement| {
            (&before.system, &before.guest_hypervisor, &before.operation)
                == (&now.system, &now.guest_hypervisor, &now.operation)
        };
        let before = old.iter().find(same);
        for number in &NUMBERS {
            let pair = (before.map(number.of), Some((number.of)(now)));
            if pair.0 != pair.1 {
                changes += 1;
                table.row_of(&[&now.operation, &now.system, number.heading], [pair.0, pair.1]);
            }
        }
    }
    if changes == 0 { "no number changed\n".to_owned() } else { table.render() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measurement(vmread: u64) -> Measurement {
        let json = format!(
            r#"{{"system":"l1hv","guest_hypervisor":"linux-kvm","operation":"CPUID","instructions":9,
            "host_instructions":8,"hardware_exits":2,"vmread":{vmread},"vmwrite":0,"vmptrld":0,"vmclear":0,
            "invept":0,"invvpid":0,"rdmsr":0,"wrmsr":0}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn only_what_changed_is_shown() {
        assert_eq!(compare(&[measurement(5)], &[measurement(5)]), "no number changed\n");
        let text = compare(&[measurement(5)], &[measurement(4)]);
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row, ["CPUID", "l1hv", "VMREAD", "5", "4"]);
        assert_eq!(text.lines().count(), 3, "heading, rule, one row");
    }
}
