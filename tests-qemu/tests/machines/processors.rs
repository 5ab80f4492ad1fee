//! Runs of the conformance image on a machine with four processors, besides the suite's groups for several processors
//! (tests/conformance.rs).

use anyhow::{Result, ensure};
use tests_qemu::conformance::{Explained, Report};
use tests_qemu::machine::{Boot, Machine, Module, UnknownMsrs};

use crate::context::{Context, Finished, Test};
use crate::madt;

const PROCESSORS: u32 = 4;

pub fn tests() -> Vec<Test> {
    vec![
        Test { name: "vmcs_regions_that_another_processor_scribbles_on_do_not_stop_the_host", run: scribble },
        Test { name: "a_processor_that_the_guest_has_started_finds_what_the_first_one_finds", run: on_another },
        Test { name: "a_processor_that_the_firmware_does_not_list_is_held", run: unlisted },
        Test { name: "what_processors_share_is_edited_in_x2apic_mode_as_on_the_bare_machine", run: x2apic },
    ]
}

/// The image with these arguments, under l1hv or without it.
fn run(context: &Context, name: &str, arguments: &str, boot: impl FnOnce(Module) -> Boot) -> Result<Finished> {
    let image = Module::with_args(&context.programs.conformance, arguments);
    // As in the suite.
    let unknown_msrs = UnknownMsrs::Fault;
    let finished = context.run(&Machine { cpus: PROCESSORS, unknown_msrs, ..context.bochs(name, boot(image)) })?;
    finished.must_shut_down()?;
    Ok(finished)
}

fn under_l1hv(context: &Context) -> impl Fn(Module) -> Boot {
    |image| Boot::L1hv { host: context.host(""), guest: vec![image] }
}

/// There is no comparison, as the outcome on the bare machine is undefined.
fn scribble(context: &Context, name: &str) -> Result<()> {
    let finished = run(context, name, "scribble", under_l1hv(context))?;
    finished.debug_must_say("each has entered: true")
}

/// Groups that depend much on the processor: on its APIC, its MSRs, INIT and NMIs to itself.
fn on_another(context: &Context, name: &str) -> Result<()> {
    for group in ["events", "exits"] {
        both(context, &format!("{name}-{group}"), &format!("on=2 only={group}"))?;
    }
    Ok(())
}

/// The host sends INITs of its own when it begins to watch an MSR bitmap. In this mode it sends them by an MSR.
fn x2apic(context: &Context, name: &str) -> Result<()> {
    both(context, name, "x2apic only=smp-migration")
}

/// A list without the second processor, and one that is damaged before it. The guest starts it all the same, and finds
/// there what l1hv shows.
fn unlisted(context: &Context, name: &str) -> Result<()> {
    const NO_ENTRY: [u8; 2] = [0, 0];
    let first = madt::local_apic(0);
    let short = madt::file(context, "madt-of-one", &first)?;
    let damaged = madt::file(context, "damaged-madt", &[&first[..], &NO_ENTRY].concat())?;
    for (table, warning) in [(short, "APIC id 1 is in no list"), (damaged, "list of processors is unusable")] {
        let image = Module::with_args(&context.programs.conformance, "on=1 only=caps");
        let boot = under_l1hv(context)(image);
        let finished = context.run(&Machine { cpus: 2, madt: Some(table), ..context.bochs(name, boot) })?;
        finished.must_shut_down()?;
        finished.debug_must_say(warning)?;
        finished.debug_must_say("the guest hypervisor starts on 2 processors")?;
        finished.debug_must_say("C caps/withheld-read-0x600 #13(0x0)")?;
    }
    Ok(())
}

/// The image on the bare machine and under l1hv: no case differs.
fn both(context: &Context, name: &str, arguments: &str) -> Result<()> {
    let bare = |kernel| Boot::Multiboot { kernel, modules: Vec::new() };
    let bare = run(context, &format!("{name}-bare"), arguments, bare)?;
    let under = run(context, name, arguments, under_l1hv(context))?;
    let explained = Explained::find(&context.layout)?.under("", 1, None, &[]);
    let report = Report::compare(&cases(&bare), &cases(&under), &explained, Some("*"));
    ensure!(report.cases > 20 && report.different == 0, "{report}");
    Ok(())
}

/// The cases' names and results.
fn cases(finished: &Finished) -> Vec<(String, String)> {
    let cases = finished.debug.iter().filter_map(|line| line.strip_prefix("C ")?.split_once(' '));
    cases.map(|(name, result)| (name.to_owned(), result.to_owned())).collect()
}
