//! Capability MSRs and IA32_FEATURE_CONTROL (SDM Appendix A), CPUID, and MSRs that only hypervisors have.

use core::arch::x86_64::__cpuid_count;
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

/// Beyond the ranges of the MSR bitmaps and at their edges; the two clocks of KVM that are within them.
const OF_HYPERVISORS: [u32; 10] =
    [0x11, 0x12, 0x2000, 0x4000_0000, 0x4000_0073, 0x4b56_4d00, 0x4b56_4d01, 0xbfff_ffff, 0xc000_2000, 0xc001_0015];

/// One case for reading and one for writing each MSR; one for each leaf of CPUID.
pub fn run(suite: &mut Suite) {
    for msr in (0x480..=0x493).chain([IA32_FEATURE_CONTROL]) {
        let before = rdmsr(msr);
        suite.case(format_args!("read-{msr:#x}"), Read(before));
        suite.case(format_args!("write-{msr:#x}"), wrmsr(msr, before.unwrap_or(0)));
        suite.case(format_args!("write-zero-{msr:#x}"), wrmsr(msr, 0));
        suite.case(format_args!("unchanged-{msr:#x}"), rdmsr(msr) == before);
    }
    for msr in OF_HYPERVISORS {
        suite.case(format_args!("hypervisors-read-{msr:#x}"), Read(rdmsr(msr)));
        suite.case(format_args!("hypervisors-write-{msr:#x}"), wrmsr(msr, 0));
    }
    let beyond = [0x4000_0000, 0x4000_0001, 0x4000_0100, 0x7fff_ffff, 0xc000_0000, u32::MAX];
    for leaf in (0..0x30).chain(0x8000_0000..0x8000_0010).chain(beyond) {
        let subleaves = if leaf == 0xd { 20 } else { 4 };
        for subleaf in 0..subleaves {
            let answer = __cpuid_count(leaf, subleaf);
            let (eax, ebx, ecx, edx) = (answer.eax, answer.ebx, answer.ecx, answer.edx);
            suite.case(
                format_args!("cpuid-{leaf:#x}-{subleaf}"),
                format_args!("eax={eax:#x} ebx={ebx:#x} ecx={ecx:#x} edx={edx:#x}"),
            );
        }
    }
}
