//! Instructions of the nested guest with the controls that make them exit off and on (SDM 26.1 "Instructions That Cause
//! VM Exits").

mod control_registers;
mod exceptions;
mod io;
mod msrs;
mod others;
mod tables;

use super::enter;
use crate::output::Suite;
use crate::vm::Vm;

pub use others::user;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    others::run(suite);
    control_registers::run(suite);
    io::run(suite);
    msrs::run(suite);
    tables::run(suite);
    exceptions::run(suite);
}

/// One case: a nested guest at `code`.
fn case(suite: &mut Suite, name: impl core::fmt::Display, code: u64, change: impl FnOnce(&mut Vm)) {
    let verdict = enter(code, change);
    suite.case(name, verdict);
}
