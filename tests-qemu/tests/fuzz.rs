//! Random programs of a guest hypervisor, in short: a part of what `cargo l1hv fuzz` runs.

use tests_qemu::conformance::Place;
use tests_qemu::fuzz::{Fuzzer, Range};
use tests_qemu::layout::Layout;
use tests_qemu::progress::Progress;
use tests_qemu::provision;

/// Runs `test` with the programs of a seed, on a machine with so many processors.
fn with_fuzzer((host, cpus): (&str, u32), seed: u64, test: impl FnOnce(&Fuzzer<'_>)) {
    let layout = Layout::find().expect("the workspace is where it was built");
    let progress = Progress::stderr();
    let provisioned = provision::provision(&layout, &progress).expect("what the machines need is there");
    let fuzzer = Fuzzer::build(&layout, &progress, &provisioned, Place::usual(cpus), (host, seed));
    test(&fuzzer.expect("the programs can be built"));
}

fn first(count: u64) -> Range {
    Range { first: 0, count, limit: None }
}

#[test]
fn random_programs_see_under_l1hv_what_they_see_on_the_bare_machine() {
    const PROGRAMS: u64 = 3_000;
    with_fuzzer(("", 1), 3, |fuzzer| {
        let report = fuzzer.run(first(PROGRAMS), 1).expect("the machines start");
        assert!(report.is_right(), "{report}");
        assert_eq!(report.programs(), PROGRAMS);
        // Close to the border: neither all entries nor none.
        assert!((30..=75).contains(&report.entered_percent()), "{report}");
    });
}

#[test]
fn the_host_survives_hostile_programs_with_its_code_unchanged() {
    for (cpus, programs) in [(1, 2_000), (3, 1_000)] {
        with_fuzzer(("stats", cpus), 1, |fuzzer| {
            let survival = fuzzer.run_hostile(first(programs)).expect("the machines start");
            assert!(survival.is_right(), "{cpus} processors, {survival}");
        });
    }
}
