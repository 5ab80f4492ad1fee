//! Capability MSRs and IA32_FEATURE_CONTROL (SDM Appendix A).

use core::fmt;

use crate::cpu::{rdmsr, wrmsr};
use crate::fault::Outcome;
use crate::output::Suite;

const IA32_FEATURE_CONTROL: u32 = 0x3a;

/// A value that was read, or the fault.
struct Read(Result<u64, Outcome>);

impl fmt::Display for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(value) => write!(f, "{value:#x}"),
            Err(outcome) => write!(f, "{outcome}"),
        }
    }
}

/// One case for reading and one for writing each.
pub fn run(suite: &mut Suite) {
    for msr in (0x480..=0x493).chain([IA32_FEATURE_CONTROL]) {
        let before = rdmsr(msr);
        suite.case(format_args!("read-{msr:#x}"), Read(before));
        suite.case(format_args!("write-{msr:#x}"), wrmsr(msr, before.unwrap_or(0)));
        suite.case(format_args!("write-zero-{msr:#x}"), wrmsr(msr, 0));
        suite.case(format_args!("unchanged-{msr:#x}"), rdmsr(msr) == before);
    }
}
