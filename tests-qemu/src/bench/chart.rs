//! The measurements as a chart: a bar for each system and operation, on a logarithmic axis.

use std::fmt::Write as _;

use super::measure::Measurement;

const LABELS: f64 = 430.0;
const PLOT: f64 = 620.0;
const RIGHT: f64 = 110.0;
const TOP: f64 = 64.0;
const BAR: f64 = 13.0;
const GAP: f64 = 11.0;

/// Systems and their colours.
const SYSTEMS: [(&str, &str); 3] = [("bare", "#9aa5b1"), ("l1hv", "#1b7f5c"), ("kvm", "#c2572b")];

/// An SVG of the instructions per operation; boots, which are totals, are left out.
pub fn svg(measurements: &[Measurement]) -> String {
    let mut operations: Vec<(&str, &str)> = Vec::new();
    for measurement in measurements.iter().filter(|measurement| !measurement.is_total()) {
        let key = (measurement.guest_hypervisor.as_str(), measurement.operation.as_str());
        if !operations.contains(&key) {
            operations.push(key);
        }
    }
    let most = measurements.iter().filter(|m| !m.is_total()).map(|m| m.instructions).max().unwrap_or(1);
    let decades = (most.max(10) as f64).log10().ceil();
    let x = |instructions: u64| LABELS + (instructions.max(1) as f64).log10() / decades * PLOT;
    let group = BAR * SYSTEMS.len() as f64 + GAP;
    let bottom = TOP + group * operations.len() as f64;
    let (width, height) = (LABELS + PLOT + RIGHT, bottom + 30.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"20\" font-size=\"15\">Instructions per operation of a nested guest, all levels (logarithmic)</text>\n"
    );
    // Writing to a string cannot fail.
    for (index, (system, colour)) in SYSTEMS.iter().enumerate() {
        let left = LABELS + 90.0 * index as f64;
        let _ = writeln!(svg, "<rect x=\"{left}\" y=\"34\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        let _ = writeln!(svg, "<text x=\"{}\" y=\"44\">{system}</text>", left + 17.0);
    }
    for decade in 0..=decades as u32 {
        let left = x(10_u64.pow(decade));
        let _ = writeln!(svg, "<line x1=\"{left}\" y1=\"{TOP}\" x2=\"{left}\" y2=\"{bottom}\" stroke=\"#ddd\"/>");
        let label = table::grouped(10_u64.pow(decade));
        let _ = writeln!(svg, "<text x=\"{left}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 18.0);
    }
    for (row, (guest_hypervisor, operation)) in operations.iter().enumerate() {
        let y = TOP + group * row as f64;
        let middle = y + group / 2.0;
        let _ = writeln!(svg, "<text x=\"8\" y=\"{middle}\">{} ({guest_hypervisor})</text>", escaped(operation));
        for (bar, (system, colour)) in SYSTEMS.iter().enumerate() {
            let is_it = |m: &&Measurement| {
                m.system == *system && m.operation == *operation && m.guest_hypervisor == *guest_hypervisor
            };
            let Some(measurement) = measurements.iter().find(is_it) else { continue };
            let (top, right) = (y + BAR * bar as f64, x(measurement.instructions));
            let (length, height) = ((right - LABELS).max(1.0), BAR - 2.0);
            let _ = writeln!(
                svg,
                "<rect x=\"{LABELS}\" y=\"{top}\" width=\"{length}\" height=\"{height}\" fill=\"{colour}\"/>"
            );
            let number = table::grouped(measurement.instructions);
            let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">{number}</text>", right + 5.0, top + BAR - 3.0);
        }
    }
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_system_of_an_operation_has_its_bar() {
        let measurement = |system: &str, instructions: u64| -> Measurement {
            serde_json::from_value(serde_json::json!({
                "system": system, "guest_hypervisor": "linux-kvm", "operation": "MMIO <write>",
                "instructions": instructions, "host_instructions": 1, "hardware_exits": 2, "vmread": 0, "vmwrite": 0,
                "vmptrld": 0, "vmclear": 0, "invept": 0, "invvpid": 0, "rdmsr": 0, "wrmsr": 0,
            }))
            .unwrap()
        };
        let svg = svg(&[measurement("bare", 900), measurement("l1hv", 1_234), measurement("kvm", 14_915)]);
        for text in ["1,234", "14,915", "MMIO &lt;write> (linux-kvm)", "</svg>"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        let bars = svg.matches("height=\"11\"").count();
        assert_eq!(bars, 3);
    }
}
