//! Several processors: guest hypervisors and nested guests use them all, take them offline and online, keep time, and
//! reset the machine.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tests_qemu::guest::{GuestHypervisor, KvmEpt, Plan, Work};
use tests_qemu::machine::{DEFAULT_IPS, Machine, TripleFault};
use tests_qemu::parallel::{Clock, Level, Parallel};
use tests_qemu::transcript::GuestResult;

use crate::context::{self, Context, Finished, Test};

/// Processors of the machine.
const CPUS: u32 = 4;

/// Longest run of one machine.
const TIMEOUT: Duration = Duration::from_secs(400);

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "the_demo_runs_on_four_processors_its_nested_linux_on_two", run: demo },
        Test { name: "a_nested_guest_has_four_processors", run: four_processors },
        Test { name: "processors_go_and_come_while_a_nested_guest_without_apicv_runs", run: hotplug },
        Test { name: "clocks_of_both_levels_agree_under_load", run: clocks },
        Test { name: "a_reset_by_the_keyboard_controller_boots_the_machine_again", run: |c, n| reboot(c, n, "k") },
        Test { name: "a_reset_by_triple_fault_boots_the_machine_again", run: |c, n| reboot(c, n, "t") },
        Test { name: "a_reset_by_port_cf9_boots_the_machine_again", run: |c, n| reboot(c, n, "p") },
    ]
}

fn plan(context: &Context, work: Work) -> Result<Plan<'_>> {
    Ok(Plan { nested_cpus: 2, ..Plan::new(context.provisioned.kernel("6.1")?, work, KvmEpt::On) })
}

fn machine(context: &Context, name: &str, guest: GuestHypervisor) -> Machine {
    Machine { cpus: CPUS, timeout: TIMEOUT, ..context.bochs(name, guest.under(context.host(""))) }
}

/// Runs the plan until all work is done, at each level by all its processors.
fn run(context: &Context, name: &str, plan: &Plan<'_>) -> Result<Finished> {
    let finished = context.run(&machine(context, name, context.prepare(plan)?))?;
    finished.must_have_done(&["linux"])?;
    let expected = [(Level::GuestHypervisor, CPUS), (Level::NestedGuest, plan.nested_cpus)];
    match Parallel::failure(&finished.transcript.parallel, expected) {
        Some(failure) => bail!(failure),
        None => Ok(finished),
    }
}

fn demo(_: &Context, _: &str) -> Result<()> {
    let said = context::demo("bochs", CPUS)?;
    // With EPT and without.
    for level in ["guest hypervisor    4 processors: sum ", "nested guest        2 processors: sum "] {
        ensure!(said.matches(level).count() == 2, "not twice: {level}\n{said}");
    }
    Ok(())
}

fn four_processors(context: &Context, name: &str) -> Result<()> {
    let finished = run(context, name, &Plan { nested_cpus: 4, ..plan(context, Work::Linux)? })?;
    finished.console_must_say("kvm-intel: enable_apicv=Y")
}

fn hotplug(context: &Context, name: &str) -> Result<()> {
    let finished = run(context, name, &Plan { parameters: &["enable_apicv=0"], ..plan(context, Work::Hotplug)? })?;
    finished.console_must_say("kvm-intel: enable_apicv=N")?;
    let said = finished.console.iter().find_map(|line| line.strip_prefix("hotplug: ")?.strip_suffix(" changes"));
    let changes: u32 = said.context("the guest hypervisor counted no changes")?.parse()?;
    ensure!(changes >= 2 * (CPUS - 1), "only {changes} times a processor went or came");
    Ok(())
}

/// Compares the intervals between two readings of the clocks, in a nested guest and in the guest hypervisor: no clock
/// drifts or stops.
fn clocks(context: &Context, name: &str) -> Result<()> {
    /// The longest delay of a line on the nested guest's console.
    const LATENCY_NS: u64 = 5_000_000;
    let finished = run(context, name, &Plan { parallel_times: 20, ..plan(context, Work::Clocks)? })?;
    let host = finished.transcript.results.iter().filter_map(|result| match result {
        GuestResult::Clock(clock) => Some(*clock),
        _ => None,
    });
    let (host, nested): (Vec<Clock>, _) = (host.collect(), finished.transcript.nested_clocks);
    let ([host_begin, host_end], [nested_begin, nested_end]) = (&host[..], &nested[..]) else {
        bail!("the clocks were read {} and {} times instead of twice", host.len(), nested.len());
    };
    // The machine's TSC has a tick each nanosecond.
    const { assert!(DEFAULT_IPS == 1_000_000_000) };
    let interval = host_end.ns - host_begin.ns;
    ensure!(interval > 20 * LATENCY_NS, "{interval} ns are no load");
    for (clock, measured) in [
        ("the guest hypervisor's TSC", host_end.tsc - host_begin.tsc),
        ("the nested guest's CLOCK_MONOTONIC", nested_end.ns - nested_begin.ns),
        ("the nested guest's TSC", nested_end.tsc - nested_begin.tsc),
    ] {
        let difference = interval.abs_diff(measured);
        ensure!(difference < interval / 100 + LATENCY_NS, "{clock} counted {measured} in {interval} ns");
    }
    Ok(())
}

/// Reboots while a nested guest runs on two processors; `by` is the kernel's name of the way. The machine's FADT has no
/// reset register: with `reboot=a` Linux continues with the keyboard controller. That resets only the processors. The
/// firmware then writes to the locked IA32_FEATURE_CONTROL and triple-faults, which resets the whole machine, with l1hv
/// and without it.
fn reboot(context: &Context, name: &str, by: &str) -> Result<()> {
    let mut guest = context.prepare(&plan(context, Work::Reboot)?)?;
    guest.kernel.args += &format!(" reboot={by}");
    let machine = Machine { triple_fault: TripleFault::Resets, ..machine(context, name, guest) };
    let finished = context.run(&machine)?;
    finished.must_have_done(&[])?;
    finished.console_must_say("reboot: now")?;
    finished.console_must_say("reboot: the machine has come back")?;
    let count = |text: &str| finished.debug.iter().filter(|line| line.contains(text)).count();
    ensure!(count("l1hv INFO] l1hv ") == 2, "l1hv did not start twice");
    let faults = usize::from(by == "t");
    ensure!(
        count("the guest hypervisor triple-faulted") == faults,
        "the guest hypervisor went another way than reboot={by}"
    );
    Ok(())
}
