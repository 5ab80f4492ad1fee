//! Lines for the runner.

use std::fs;
use std::process;
use std::time::Duration;

use guest_abi::{MARK_PREFIX, RESULT_PREFIX};
use serde_json::{Map, Value, json};

use crate::cpu;

/// Prints a result line of kind `kind` with the members of `value`.
pub fn result(kind: &str, value: Value) {
    let mut object = Map::from_iter([("kind".to_owned(), json!(kind))]);
    if let Value::Object(members) = value {
        object.extend(members);
    }
    println!("{RESULT_PREFIX}{}", Value::Object(object));
}

/// Prints the line of a reached point, after the emulator has printed its counters.
pub fn mark(name: &str) {
    cpu::count(name);
    println!("{MARK_PREFIX}{name} tsc={}", cpu::tsc());
}

/// Prints this level's clocks at the moment of a nested guest's line with its clocks.
pub fn clock(since_beginning: Duration) {
    result("clock", json!({ "ns": since_beginning.as_nanos() as u64, "tsc": cpu::tsc() }));
}

/// Prints why the work ended early.
pub fn error(error: &anyhow::Error) {
    println!("vmm: {error:#}");
    result("error", json!({ "message": format!("{error:#}") }));
}

/// Prints KVM's counters of this process's virtual machine, which must still exist.
pub fn kvm_stats(of: &str) {
    let own = format!("{}-", process::id());
    let directories = fs::read_dir("/sys/kernel/debug/kvm").into_iter().flatten().flatten();
    let counters = directories
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&own))
        .flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten())
        .filter_map(|file| {
            let count: u64 = fs::read_to_string(file.path()).ok()?.trim().parse().ok()?;
            Some((file.file_name().to_string_lossy().into_owned(), json!(count)))
        })
        .filter(|(_, count)| count != 0);
    let counters = Map::from_iter(counters);
    result("kvm-stats", json!({ "of": of, "counters": counters }));
}
