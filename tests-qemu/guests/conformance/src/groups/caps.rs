//! Capability MSRs and IA32_FEATURE_CONTROL (SDM Appendix A), CPUID, and MSRs that only hypervisors have.

use core::arch::x86_64::{__cpuid, __cpuid_count};
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

/// MSRs beyond the ranges of the MSR bitmaps and at their edges, and the two clocks of KVM within the ranges.
const OF_HYPERVISORS: [u32; 10] =
    [0x11, 0x12, 0x2000, 0x4000_0000, 0x4000_0073, 0x4b56_4d00, 0x4b56_4d01, 0xbfff_ffff, 0xc000_2000, 0xc001_0015];

/// MSRs by which the processor would store to memory, past EPT, or that change the host's instructions or memory: of
/// trace hub, encryption, voltage, PEBS, Intel PT, DS area, Key Locker, LBRs, hardware feedback.
const WITHHELD: [u32; 27] = [
    0x80, 0x87, 0x150, 0x3f1, 0x3f2, 0x3f4, 0x3f5, 0x560, 0x561, 0x570, 0x571, 0x572, 0x580, 0x587, 0x600, 0x981,
    0x982, 0x983, 0x984, 0x990, 0xd91, 0x14ce, 0x17d0, 0x17d1, 0x17d4, 0x1903, 0x1983,
];

/// IA32_MISC_ENABLE, and its bit that takes execute-disable away.
const IA32_MISC_ENABLE: u32 = 0x1a0;
const XD_BIT_DISABLE: u64 = 1 << 34;

/// IA32_XSS, by which XRSTORS loads MSRs.
fn extended_supervisor_state(suite: &mut Suite) {
    const IA32_XSS: u32 = 0xda0;
    // Without XSAVES there is no such MSR; the emulator would take any write to it.
    let has_xsaves = __cpuid(0).eax >= 0xd && __cpuid_count(0xd, 1).eax >> 3 & 1 != 0;
    if !has_xsaves {
        return;
    }
    let before = rdmsr(IA32_XSS);
    for bit in 0..64 {
        let written = wrmsr(IA32_XSS, 1 << bit);
        suite.case(format_args!("xss-bit-{bit}"), format_args!("{written} {}", Read(rdmsr(IA32_XSS))));
        let _ = wrmsr(IA32_XSS, before.unwrap_or(0));
    }
}

/// Reads and writes of MTRRs: types and reserved bits, and the registers at the ends.
fn mtrrs(suite: &mut Suite) {
    const REGISTERS: [u32; 9] = [0xfe, 0x200, 0x201, 0x20e, 0x20f, 0x250, 0x258, 0x26f, 0x2ff];
    let values = (0..8).chain([0xc00, 0xc06, 0x806]).chain((8..64).map(|bit| 1 << bit));
    for msr in REGISTERS {
        let before = rdmsr(msr);
        suite.case(format_args!("mtrr-{msr:#x}"), Read(before));
        for value in values.clone() {
            let written = wrmsr(msr, value);
            let read = rdmsr(msr);
            let _ = wrmsr(msr, before.unwrap_or(0));
            suite.case(format_args!("mtrr-{msr:#x}-{value:#x}"), format_args!("{written} {}", Read(read)));
        }
        let types = 0x0605_0401_0006_0504;
        suite.case(format_args!("mtrr-{msr:#x}-types"), format_args!("{} {}", wrmsr(msr, types), Read(rdmsr(msr))));
        let _ = wrmsr(msr, before.unwrap_or(0));
        suite.case(format_args!("mtrr-{msr:#x}-again"), rdmsr(msr) == before);
    }
}

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
    for msr in WITHHELD {
        suite.case(format_args!("withheld-read-{msr:#x}"), Read(rdmsr(msr)));
        suite.case(format_args!("withheld-write-{msr:#x}"), wrmsr(msr, 0));
    }
    mtrrs(suite);
    extended_supervisor_state(suite);
    let misc_enable = rdmsr(IA32_MISC_ENABLE).unwrap_or(0);
    suite.case("misc-enable-write-back", wrmsr(IA32_MISC_ENABLE, misc_enable));
    suite.case("misc-enable-without-execute-disable", wrmsr(IA32_MISC_ENABLE, misc_enable | XD_BIT_DISABLE));
    suite.case("misc-enable-reads", Read(rdmsr(IA32_MISC_ENABLE).map(|value| value & XD_BIT_DISABLE)));
    let _ = wrmsr(IA32_MISC_ENABLE, misc_enable);
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
