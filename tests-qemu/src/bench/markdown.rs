//! The measurements as the table of the README.

use std::fmt::Write as _;

use table::grouped;

use super::measure::Measurement;

/// A row for each operation with the systems side by side, VMREAD and VMWRITE together; `-` if a system was not
/// measured.
pub fn table(measurements: &[Measurement]) -> String {
    let mut rows: Vec<(&str, &str)> = Vec::new();
    for measurement in measurements {
        let key = (measurement.guest_hypervisor.as_str(), measurement.operation.as_str());
        if !rows.contains(&key) {
            rows.push(key);
        }
    }
    let mut text = "| guest hypervisor | operation | bare: instructions | l1hv: instructions | of the host | exits | VMREAD + VMWRITE \
                    | model cycles | KVM: instructions | of the host | exits | VMREAD + VMWRITE | model cycles |\n\
                    |---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for (guest_hypervisor, operation) in rows {
        let of = |system: &str| {
            measurements.iter().find(|measurement| {
                measurement.system == system
                    && measurement.guest_hypervisor == guest_hypervisor
                    && measurement.operation == operation
            })
        };
        let bare = of("bare").map_or("-".to_owned(), |measurement| grouped(measurement.instructions));
        let _ = write!(text, "| {guest_hypervisor} | {operation} | {bare}");
        for system in ["l1hv", "kvm"] {
            let numbers = of(system)
                .map(|m| [m.instructions, m.host_instructions, m.hardware_exits, m.vmread + m.vmwrite, m.model_cycles]);
            for number in numbers.map_or([const { None }; 5], |numbers| numbers.map(Some)) {
                // Writing to a string cannot fail.
                let _ = write!(text, " | {}", number.map_or("-".to_owned(), grouped));
            }
        }
        text.push_str(" |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_are_side_by_side_and_what_is_missing_shows() {
        let measurement = |system: &str, instructions: u64| -> Measurement {
            serde_json::from_value(serde_json::json!({
                "system": system, "guest_hypervisor": "minimal", "operation": "CPUID", "instructions": instructions,
                "host_instructions": 371, "hardware_exits": 2, "vmread": 4, "vmwrite": 49, "vmptrld": 0, "vmclear": 0,
                "invept": 0, "invvpid": 0, "rdmsr": 0, "wrmsr": 0, "model_cycles": 5000,
            }))
            .unwrap()
        };
        let text = table(&[measurement("bare", 27), measurement("l1hv", 1_398)]);
        let row = text.lines().last().unwrap();
        assert_eq!(row, "| minimal | CPUID | 27 | 1,398 | 371 | 2 | 53 | 5,000 | - | - | - | - | - |");
        assert!(text.lines().all(|line| line.matches('|').count() == 14), "{text}");
    }
}
