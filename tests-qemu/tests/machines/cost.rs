//! The benchmark in short: what l1hv costs per nested exit must not grow unnoticed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, ensure};
use tests_qemu::bench::image::{self, Image};
use tests_qemu::bench::measure::{self, Measurement};
use tests_qemu::bench::{Bench, MEMORY_MIB};
use tests_qemu::guest::{KvmEpt, Plan, Work};
use tests_qemu::machine::{BOCHS, Boot, Machine, MachineOptions, Module};
use tests_qemu::profile;
use tests_qemu::progress::Progress;
use tests_qemu::transcript::Operation;

use crate::context::{Context, Test};

/// Host instructions of each operation by guest hypervisor: Linux 6.1 KVM, and the minimal one.
const RECORDED: &str = include_str!("../recorded.json");

/// The growth that the test permits.
const PERCENT: u64 = 2;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "a_nested_exit_costs_no_more_host_instructions_than_recorded", run: host_instructions },
        Test { name: "with_four_processors_a_nested_exit_costs_what_it_costs_with_one", run: with_four_processors },
        Test { name: "the_bench_image_boots_l1hv_and_shows_what_nested_exits_take", run: bench_image },
        Test { name: "a_profile_proposes_shadow_permissions_that_save_exits", run: proposal },
    ]
}

/// The proposal has the fields that KVM's exit handler reads and no field that cannot be granted, and reduces CPUID to
/// two exits.
fn proposal(context: &Context, _: &str) -> Result<()> {
    let Context { layout, provisioned, programs, .. } = context;
    let progress = &Progress::silent();
    let options = MachineOptions { memory_mib: MEMORY_MIB, ..MachineOptions::default() };
    let bench = Bench { layout, progress, provisioned, programs, series: "6.1", emulator: BOCHS, options: &options };
    let profile = profile::run(&bench, KvmEpt::On)?;
    let granted: Vec<&str> = profile.proposal.split(',').collect();
    for expected in ["GUEST_RIP:rw", "EXIT_REASON:r"] {
        ensure!(granted.contains(&expected), "{expected} is not in {}", profile.proposal);
    }
    ensure!(!profile.proposal.contains("HOST_"), "{}", profile.proposal);
    let exits = |measurements: &[Measurement]| {
        measurements.iter().find(|measurement| measurement.operation == "CPUID").map(|cpuid| cpuid.hardware_exits)
    };
    let (before, after) = (exits(&profile.before), exits(&profile.after));
    ensure!(before > after && after == Some(2), "CPUID: {before:?} exits before, {after:?} after");
    Ok(())
}

/// Runs the menu's first entry, up to its power-off. It prints the results as a table for people and as one line of
/// JSON.
fn bench_image(context: &Context, name: &str) -> Result<()> {
    let Context { layout, provisioned, programs, l1hv, .. } = context;
    let iso = layout.root().join(format!("{name}.iso"));
    let image = Image { series: "6.1", menu_seconds: 1, linger_seconds: 0 };
    image::make(&image, &iso, layout, provisioned, programs, l1hv)?;
    let finished = context.run(&context.bochs(name, Boot::Iso(iso.clone())))?;
    finished.must_have_done(&["payload"])?;
    let timings = finished.transcript.timings().context("no line of JSON has the results")?;
    ensure!(timings.system == "l1hv" && timings.operations.len() == measure::PAYLOAD.operations.len(), "{timings:?}");
    ensure!(timings.processor.is_emulated, "Bochs passes for silicon: {:?}", timings.processor);
    for operation in &timings.operations {
        let Operation { minimum, percentile_1, median, percentile_99, .. } = operation;
        ensure!(
            0 < *minimum && minimum <= percentile_1 && percentile_1 <= median && median <= percentile_99,
            "{operation:?}"
        );
    }
    finished.console_must_say("The numbers mean NOTHING.")?;
    finished.console_must_say("storm: CPUID, VMCALL, RDMSR, WRMSR, OUT  ")?;
    Ok(fs::remove_file(iso)?)
}

/// Measures both guest hypervisors.
fn measure(context: &Context, name: &str, cpus: u32) -> Result<Vec<Measurement>> {
    let plan = Plan { counted: true, ..Plan::new(context.provisioned.kernel("6.1")?, Work::Payload, KvmEpt::On) };
    let guest = context.prepare(&plan)?;
    let payload = context.run(&Machine { cpus, ..context.bochs(name, guest.under(context.host(""))) })?;
    payload.must_have_done(&["payload"])?;
    let image = Module::with_args(&context.programs.conformance, "minimal");
    let boot = Boot::L1hv { host: context.host(""), guest: vec![image] };
    let minimal = context.run(&Machine { cpus, ..context.bochs(&format!("{name}-minimal"), boot) })?;
    let mut measurements = measure::operations("l1hv", &measure::PAYLOAD, &payload.transcript)?;
    measurements.extend(measure::operations("l1hv", &measure::MINIMAL, &minimal.transcript)?);
    Ok(measurements)
}

/// What [`measure`] finds with one processor: two tests compare with it.
fn with_one_processor(context: &Context) -> Result<Vec<Measurement>> {
    static MEASUREMENTS: OnceLock<Result<Vec<Measurement>, String>> = OnceLock::new();
    let measurements =
        MEASUREMENTS.get_or_init(|| measure(context, "one-processor", 1).map_err(|error| format!("{error:#}")));
    measurements.clone().map_err(|error| anyhow!(error))
}

/// The counts are equal to the instruction: the handling of a nested exit does not depend on the number of processors.
fn with_four_processors(context: &Context, name: &str) -> Result<()> {
    let four = measure(context, name, 4)?;
    let one = with_one_processor(context)?;
    for (four, one) in four.iter().zip(&one) {
        let Measurement { guest_hypervisor, operation, .. } = one;
        ensure!(
            four.host_instructions == one.host_instructions && four.hardware_exits == one.hardware_exits,
            "{guest_hypervisor}, {operation}: {} host instructions in {} exits instead of {} in {}",
            four.host_instructions,
            four.hardware_exits,
            one.host_instructions,
            one.hardware_exits
        );
    }
    ensure!(four.len() == one.len(), "{} operations instead of {}", four.len(), one.len());
    Ok(())
}

fn host_instructions(context: &Context, _: &str) -> Result<()> {
    let recorded: BTreeMap<String, BTreeMap<String, u64>> = serde_json::from_str(RECORDED)?;
    let measurements = with_one_processor(context)?;
    let mut grown = String::new();
    for Measurement { guest_hypervisor, operation, host_instructions: now, .. } in measurements {
        let before = recorded.get(&guest_hypervisor).and_then(|operations| operations.get(&operation));
        let &before = before.with_context(|| format!("recorded.json lacks {guest_hypervisor}, {operation}"))?;
        if now * 100 > before * (100 + PERCENT) {
            writeln!(grown, "  {guest_hypervisor}, {operation}: {now}, recorded: {before}")?;
        }
    }
    ensure!(
        grown.is_empty(),
        "host instructions grew by more than {PERCENT}%; if that is meant, record the new numbers in \
         tests-qemu/tests/recorded.json:\n{grown}"
    );
    Ok(())
}
