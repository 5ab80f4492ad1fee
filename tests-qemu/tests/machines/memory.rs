//! Nested guests with more memory than the host has tables for.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use tests_qemu::machine::{Boot, Machine, Module, UnknownMsrs};
use tests_qemu::protocol::STATS_PREFIX;

use crate::context::{Context, Finished, Test};

/// The groups of the conformance image that spend the tables of EPT01, touch 2 GiB and take turns with 16 EPTs.
const GROUPS: &str = "exhaustion,memory-load";

/// The tight budget: about twice the tables of EPT01. 16 EPTs of four tables each, or 1024 page tables, do not fit at
/// once.
const TIGHT: u64 = 48;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "addresses_beyond_what_ept_maps_are_page_faults", run: far_addresses },
        Test { name: "msrs_that_reach_memory_or_the_host_fault_though_the_processor_has_them", run: withheld_msrs },
        Test { name: "tables_of_ept01_run_out_and_nested_guests_run_right", run: tables_of_ept01_run_out },
        Test { name: "2_gib_and_16_epts_run_right_within_a_budget_of_48_tables", run: within_a_budget },
    ]
}

/// By a processor with 52 bits. A bare machine has no memory there.
fn far_addresses(context: &Context, name: &str) -> Result<()> {
    let guest = Module::with_args(&context.programs.conformance, "far");
    let boot = Boot::L1hv { host: context.host(""), guest: vec![guest] };
    let finished = context.run(&Machine { physical_bits: Some(52), ..context.bochs(name, boot) })?;
    finished.must_shut_down()?;
    for text in [
        "far: 48 bits",
        "far: read: #PF(0x9) cr2=0x8100004000",
        "far: write: #PF(0xb) cr2=0x8100004000",
        "far: near memory holds 0x12345678",
        "far: APIC: #13(0x0)",
        "far: VMXON: ok",
        "far: VMPTRLD: fail-invalid",
        "far: a nested guest without EPT: exit=0x0 q=0x8100004000 int=0x80000b0e err=0x9",
    ] {
        finished.debug_must_say(text)?;
    }
    Ok(())
}

/// The emulated processor takes every MSR for one that it has.
fn withheld_msrs(context: &Context, name: &str) -> Result<()> {
    let guest = || Module::with_args(&context.programs.conformance, "only=caps");
    let with_all = |name: &str, boot| Machine { unknown_msrs: UnknownMsrs::ReadAsZero, ..context.bochs(name, boot) };
    let bare = Boot::Multiboot { kernel: guest(), modules: Vec::new() };
    let bare = context.run(&with_all(&format!("{name}-bare"), bare))?;
    let boot = Boot::L1hv { host: context.host(""), guest: vec![guest()] };
    let under = context.run(&with_all(name, boot))?;
    let outcomes = |finished| -> Result<BTreeMap<_, _>> {
        Ok(cases(finished)?.into_iter().filter_map(|case| case.split_once(' ')).collect())
    };
    let (has, found) = (outcomes(&bare)?, outcomes(&under)?);
    let is_withheld = |case: &str| ["caps/withheld-", "caps/hypervisors-"].iter().any(|start| case.starts_with(start));
    let withheld: Vec<_> = found.iter().filter(|(case, _)| is_withheld(case)).collect();
    ensure!(withheld.len() > 50, "{withheld:#?}");
    for (case, outcome) in withheld {
        ensure!(outcome.starts_with("#13("), "{case}: {outcome}");
        ensure!(!has[case].starts_with('#'), "{case} of the bare processor: {}", has[case]);
    }
    Ok(())
}

/// On a processor without pages of 1 GiB, where each GiB that is touched takes a table.
fn tables_of_ept01_run_out(context: &Context, name: &str) -> Result<()> {
    let guest = || Module::with_args(&context.programs.conformance, "only=exhaustion");
    let on_model =
        |name: &str, boot| Machine { cpu_model: Some("corei7_sandy_bridge_2600k"), ..context.bochs(name, boot) };
    let bare = Boot::Multiboot { kernel: guest(), modules: Vec::new() };
    let bare = context.run(&on_model(&format!("{name}-bare"), bare))?;
    let budget = format!("stats ept-tables={}", 2 * TIGHT);
    let under = context.run(&on_model(name, Boot::L1hv { host: context.host(&budget), guest: vec![guest()] }))?;
    let (expected, found) = (cases(&bare)?, cases(&under)?);
    ensure!(expected.len() > 5 && found == expected, "{found:#?}\nbare: {expected:#?}");
    under.debug_must_say("no table is left to map")
}

fn within_a_budget(context: &Context, name: &str) -> Result<()> {
    let guest = || Module::with_args(&context.programs.conformance, format!("only={GROUPS}"));
    let bare = Boot::Multiboot { kernel: guest(), modules: Vec::new() };
    let under = |arguments: &str| Boot::L1hv { host: context.host(arguments), guest: vec![guest()] };
    let bare = context.run(&context.bochs(&format!("{name}-bare"), bare))?;
    let tight = context.run(&context.bochs(name, under(&format!("stats ept-tables={TIGHT}"))))?;
    let ample = context.run(&context.bochs(&format!("{name}-ample"), under("stats")))?;

    let expected = cases(&bare)?;
    ensure!(expected.len() > 40, "only {} cases on the bare machine", expected.len());
    for (finished, budget) in [(&tight, "tight"), (&ample, "ample")] {
        let found = cases(finished)?;
        ensure!(found == expected, "with a {budget} budget: {found:#?}\nbare: {expected:#?}");
    }
    let (tight, ample) = (tables(&tight)?, tables(&ample)?);
    ensure!(tight["budget"] == TIGHT && tight["most-in-use"] <= TIGHT, "more tables than the budget: {tight:?}");
    ensure!(tight["reclaims"] > 0, "the budget was never tight: {tight:?}");
    ensure!(ample["most-in-use"] > 1024, "2 GiB in pages of 4 KiB take 1024 tables, and there are more: {ample:?}");
    Ok(())
}

/// The lines of the cases.
fn cases(finished: &Finished) -> Result<Vec<&str>> {
    finished.must_shut_down()?;
    Ok(finished.debug.iter().filter_map(|line| line.strip_prefix("C ")).collect())
}

/// The counters of l1hv's tables: `NAME=COUNT NAME=COUNT`.
fn tables(finished: &Finished) -> Result<BTreeMap<&str, u64>> {
    let stats = |line: &'_ String| line.starts_with(STATS_PREFIX) && line.contains(" ept-tables ");
    let line = finished.debug.iter().rfind(|line| stats(line)).context("l1hv printed no counters of its tables")?;
    let counters = line.split(' ').filter_map(|word| word.split_once('='));
    counters.map(|(name, count)| Ok((name, count.parse()?))).collect()
}
