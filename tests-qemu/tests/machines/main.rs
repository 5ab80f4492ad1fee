//! The tests that need a machine: one fresh machine per test, with results over its console and debug port.
//!
//! The first test provisions and builds the files that all tests need. A failed test's logs are in the directory that
//! its message names; `cargo test --test machines NAME` runs it alone.

mod boot;
mod cli;
mod context;
mod cost;
mod devices;
mod disks;
mod images;
mod madt;
mod memory;
mod nesting;
mod processors;
mod second;
mod smp;
mod stops;
mod uefi;
mod vmm;
mod xen;

use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Trial};

use context::{Context, Test};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    // The longest first, as several run side by side.
    let tests = [
        second::tests(),
        smp::tests(),
        vmm::tests(),
        xen::tests(),
        cost::tests(),
        nesting::tests(),
        boot::tests(),
        cli::tests(),
        devices::tests(),
        disks::tests(),
        images::tests(),
        memory::tests(),
        processors::tests(),
        stops::tests(),
        uefi::tests(),
    ]
    .concat();
    let trials = tests.into_iter().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(test: Test) -> Trial {
    Trial::test(test.name, move || {
        let context = Context::shared()?;
        let began = Instant::now();
        let outcome = (test.run)(context, test.name).map_err(|error| format!("{error:#}").into());
        eprintln!("  {} took {} s", test.name, began.elapsed().as_secs());
        outcome
    })
}
