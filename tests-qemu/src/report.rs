//! The tables at the end of the demo.

use table::{Table, grouped};

use crate::demo::Run;
use crate::guest::KvmEpt;
use crate::transcript::GuestResult;

/// All tables of the demo's runs.
pub fn demo(runs: &[Run]) -> String {
    let mut text = String::new();
    for run in runs {
        text += &host_exits(run);
        text += &kvm_exits(run);
    }
    text + &costs(runs) + &boots(runs)
}

/// The table of exits to l1hv.
fn host_exits(run: &Run) -> String {
    let Some(total) = &run.transcript.host_total else {
        return String::new();
    };
    let mut table = Table::new(&["reason", "guest hypervisor", "nested guests", "of these reflected"]);
    for count in run.transcript.host_stats.iter().chain([total]) {
        let numbers = [count.guest_hypervisor, count.nested, count.reflected];
        table.row(&count.reason, numbers.map(Some));
    }
    format!("\nExits to l1hv, KVM with {}\n\n{}", run.ept, table.render())
}

/// Counters of the guest hypervisor's KVM.
fn kvm_exits(run: &Run) -> String {
    let guests = ["payload", "linux"].map(|name| run.transcript.kvm_counters(name));
    let mut names: Vec<&String> = guests.iter().flatten().flat_map(|counters| counters.keys()).collect();
    names
        .retain(|name| name.contains("exits") || matches!(name.as_str(), "pf_taken" | "hypercalls" | "irq_injections"));
    names.sort();
    names.dedup();
    if names.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["counter", "payload", "Linux"]);
    for name in names {
        table.row(name, guests.map(|counters| counters.and_then(|counters| counters.get(name)).copied()));
    }
    format!("\nCounters of the guest hypervisor's KVM, {}\n\n{}", run.ept, table.render())
}

/// Instructions of each operation.
fn costs(runs: &[Run]) -> String {
    let median = |ept: KvmEpt, name: &str| {
        let run = runs.iter().find(|run| run.ept == ept)?;
        Some(run.transcript.operations().find(|operation| operation.name == name)?.median)
    };
    let mut names: Vec<&str> = Vec::new();
    for operation in runs.iter().flat_map(|run| run.transcript.operations()) {
        if !names.contains(&operation.name.as_str()) {
            names.push(&operation.name);
        }
    }
    if names.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["operation", "ept=1", "ept=0"]);
    for name in names {
        table.row(name, [KvmEpt::On, KvmEpt::Off].map(|ept| median(ept, name)));
    }
    format!(
        "\nInstructions of one exit of the nested guest, from exit to next instruction (median). `cargo bench-nested` has KVM's \
         beside them.\n\n{}",
        table.render()
    )
}

/// The boot times of Linux as nested guest.
fn boots(runs: &[Run]) -> String {
    let lines = runs.iter().filter_map(|run| {
        let ticks = run.transcript.results.iter().find_map(|result| match result {
            GuestResult::Linux { ticks_to_init } => Some(*ticks_to_init),
            _ => None,
        })?;
        Some(format!("  {}: {} instructions\n", run.ept, grouped(ticks)))
    });
    let lines: String = lines.collect();
    if lines.is_empty() {
        return lines;
    }
    format!("\nLinux as nested guest, from entry to init\n\n{lines}")
}
