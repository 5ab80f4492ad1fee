//! The differential suite as a test.

use tests_qemu::conformance::{Case, Mode, Place, Suite, Verdicts, of_model};
use tests_qemu::layout::Layout;
use tests_qemu::models::Model;
use tests_qemu::progress::Progress;
use tests_qemu::provision;

/// The number of cases that issue 3 asks for.
const CASES: usize = 3000;

/// The number of cases about memory that issue 4 asks for, and their groups.
const MEMORY_CASES: usize = 2000;
const MEMORY: [&str; 8] =
    ["ept/", "ept-edits/", "ept-random/", "ept-features/", "paging-modes/", "page-log/", "isolation/", "memory-load/"];

/// Modes of l1hv that may cost more, but must not change any result.
const MODES: [Mode<'_>; 3] = [
    Mode::DEFAULT,
    Mode { name: "conformance-emulated", host: "vmcs-shadowing=off", image: "" },
    Mode { name: "conformance-shadow-permissions", host: "hypercalls shadow=*:none", image: "permissions=20261121" },
];

/// The oldest of Bochs' processors that l1hv runs on and the one with most features; `cargo l1hv conformance
/// --all-models` runs them all.
const MODELS: [&str; 2] = ["corei5_arrandale_m520", "sapphire_rapids"];

/// Processors of the machine for the groups that need several, and the least number of their cases.
const SEVERAL: u32 = 4;
const CASES_OF_SEVERAL: usize = 350;

/// The groups that depend most on which processor runs next, the least number of their cases, and a seed of turns.
const RACES: &str = "smp-races,smp-migration";
const CASES_OF_RACES: usize = 40;
const TURNS_SEED: u64 = 20_261_127;

#[test]
fn a_guest_hypervisor_observes_under_l1hv_what_it_observes_on_the_bare_machine() {
    let layout = Layout::find().expect("the workspace is where it was built");
    let progress = Progress::stderr();
    let provisioned = provision::provision(&layout, &progress).expect("what the machines need is there");
    let suite = Suite::build(&layout, &progress, &provisioned, Place::usual(1)).expect("the suite can be built");
    let reports = suite.compare(MODES, None).expect("the suite runs");
    for (mode, report) in MODES.iter().zip(reports) {
        assert!(report.cases >= CASES, "only {} cases", report.cases);
        let is_memory = |name: &str| MEMORY.iter().any(|group| name.starts_with(group));
        let memory = report.records.iter().filter(|case| is_memory(&case.name)).count();
        assert!(memory >= MEMORY_CASES, "only {memory} cases about memory");
        assert_eq!(report.different, 0, "{mode:?}\n{report}");
    }
}

#[test]
fn an_old_and_a_new_processor_look_under_l1hv_as_they_are() {
    let layout = Layout::find().expect("the workspace is where it was built");
    let progress = Progress::stderr();
    let provisioned = provision::provision(&layout, &progress).expect("what the machines need is there");
    let models = MODELS.map(|name| Model::named(name).expect("Bochs has the model"));
    let run = |model| of_model(&layout, &progress, &provisioned, model, (Mode::DEFAULT, None));
    let verdicts = Verdicts(models.into_iter().map(|model| run(model).expect("the machines start")).collect());
    let wrong: Vec<_> = verdicts.0.iter().filter(|verdict| !verdict.is_right()).map(ToString::to_string).collect();
    assert!(wrong.is_empty(), "{}\n{verdicts}", wrong.join("\n"));
}

/// The suite itself fails if interrupts are lost or a processor misses an edit.
#[test]
fn several_processors_observe_under_l1hv_what_they_observe_on_the_bare_machine() {
    let cases = equal_cases_of_several("conformance-processors", Place::usual(SEVERAL));
    assert!(cases >= CASES_OF_SEVERAL, "only {cases} cases");
}

/// Any instruction of one processor may come between any two of another one.
#[test]
fn several_processors_observe_the_same_when_they_take_turns_of_random_lengths() {
    let mut place = Place { only: Some(RACES.to_owned()), ..Place::usual(SEVERAL) };
    place.options.turns_seed = Some(TURNS_SEED);
    let cases = equal_cases_of_several("conformance-turns", place);
    assert!(cases >= CASES_OF_RACES, "only {cases} cases");
}

/// The number of cases of several processors, which are all right and equal.
fn equal_cases_of_several(name: &str, place: Place) -> usize {
    let layout = Layout::find().expect("the workspace is where it was built");
    let progress = Progress::stderr();
    let provisioned = provision::provision(&layout, &progress).expect("what the machines need is there");
    let suite = Suite::build(&layout, &progress, &provisioned, place).expect("the suite can be built");
    let [report] = suite.compare([Mode { name, ..Mode::DEFAULT }], None).expect("the suite runs");
    let is_wrong = |case: &&Case| case.bare.as_ref().is_some_and(|result| result.starts_with("wrong"));
    let wrong: Vec<_> = report.records.iter().filter(is_wrong).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(report.different, 0, "{report}");
    report.cases
}
