//! The benchmark in short: what l1hv costs per nested exit must not grow unnoticed.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use tests_qemu::bench::measure;
use tests_qemu::guest::{KvmEpt, Work};

use crate::context::{Context, Test};

/// Host instructions of each operation of the payload under l1hv, with Linux 6.1 KVM as guest hypervisor.
const RECORDED: &str = include_str!("../recorded.json");

/// Growth that the test lets pass.
const PERCENT: u64 = 2;

pub fn tests() -> Vec<Test> {
    vec![Test { name: "a_nested_exit_costs_no_more_host_instructions_than_recorded", run: host_instructions }]
}

fn host_instructions(context: &Context, name: &str) -> Result<()> {
    let recorded: BTreeMap<String, u64> = serde_json::from_str(RECORDED)?;
    let guest = context.guest_hypervisor("6.1", Work::Payload, KvmEpt::On)?;
    let finished = context.run(&context.bochs(name, guest.under(context.host(""))))?;
    finished.must_have_done(&["payload"])?;
    let mut grown = String::new();
    for measurement in measure::operations("l1hv", &finished.transcript)? {
        let operation = &measurement.operation;
        let before = *recorded.get(operation).with_context(|| format!("recorded.json lacks \"{operation}\""))?;
        let now = measurement.host_instructions;
        if now * 100 > before * (100 + PERCENT) {
            writeln!(grown, "  {operation}: {now}, recorded: {before}")?;
        }
    }
    ensure!(
        grown.is_empty(),
        "host instructions grew by more than {PERCENT}%; if that is meant, record the new numbers in \
         tests-qemu/tests/recorded.json:\n{grown}"
    );
    Ok(())
}
