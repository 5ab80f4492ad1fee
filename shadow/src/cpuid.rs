//! CPUID as the guest hypervisor sees it (SDM Volume 2A, CPUID), as an allow list: a bit of a leaf comes through only
//! if a row of this module names it.
//!
//! Everything else reads as on a processor without it: a bit as 0, a leaf as zeros, a leaf above the highest one as the
//! highest basic one. This hides two things that need no row: the leaves 4000_00xxH of a hypervisor below, whose
//! interface (VMCALL, and MSRs that name memory by address) is not for the guest hypervisor, and features of future
//! processors that this project has not examined.
//!
//! `FEATURES` lists the known features that do not come through unchanged, with the reasons.

use crate::caps::VmxCaps;
use crate::controls::{Control, Secondary};
use crate::msr::XSS_COMPONENTS;
use crate::registers::{CR4_OSXSAVE, CR4_PKE};
use core::ops::RangeInclusive;

/// EAX, EBX, ECX and EDX.
pub type Answer = [u32; 4];

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// A leaf, or some subleaves of one, and the bits that the SDM defines there.
struct Row {
    leaf: u32,
    subleaves: RangeInclusive<u32>,
    known: Answer,
}

/// When a feature comes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Presence {
    /// Never.
    Withheld,
    /// If the processor has this control, which vmcs01 then sets: without the control the feature's instructions are
    /// #UD in VMX non-root operation.
    With(Control),
    /// If the guest hypervisor has set these bits of CR4. The CPUID bit mirrors CR4, and the processor's answer would
    /// mirror the host's CR4.
    Enabled(u64),
}

struct Feature {
    leaf: u32,
    subleaf: u32,
    register: usize,
    bit: u32,
    presence: Presence,
}

/// Bits, listed as the SDM lists them.
const fn bits<const N: usize>(positions: [u32; N]) -> u32 {
    let mut bits = 0;
    let mut i = 0;
    while i < N {
        bits |= 1 << positions[i];
        i += 1;
    }
    bits
}

const ALL: u32 = u32::MAX;
const ANY: RangeInclusive<u32> = 0..=u32::MAX;
const WHOLE: Answer = [ALL; 4];

macro_rules! leaves {
    ($($(#[doc = $doc:literal])* $leaf:literal, $subleaves:expr, $known:expr;)*) => {
        const ROWS: [Row; [$($leaf as u32),*].len()] = [$(Row { leaf: $leaf, subleaves: $subleaves, known: $known }),*];
    };
}

leaves! {
    /// Vendor. EAX, the highest basic leaf, is limited to the last one here.
    0x00, ANY, WHOLE;
    /// Version and features.
    0x01, ANY, [0x0fff_3fff, ALL, !bits([16]), !bits([10, 20, 30])];
    /// Caches, as descriptors.
    0x02, ANY, WHOLE;
    /// Processor serial number.
    0x03, ANY, WHOLE;
    /// Caches.
    0x04, ANY, [ALL, ALL, ALL, 0b111];
    /// MONITOR and MWAIT.
    0x05, ANY, [0xffff, 0xffff, bits([0, 1]), ALL];
    /// Thermal and power management. Without the hardware feedback interface, which writes to memory by physical
    /// address.
    0x06, ANY, [bits([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18, 20, 22, 24]), 0xf, bits([0, 3]), 0];
    /// Structured extended features. EAX, the highest subleaf, is limited to the last one here.
    0x07, 0..=0, [ALL, !bits([22]), !bits([15, 26]), !bits([0, 6, 7, 12, 17, 21])];
    0x07, 1..=1, [
        bits([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 17, 18, 19, 20, 21, 22, 23, 26, 27, 30, 31]),
        bits([0, 1, 3]),
        bits([5]),
        bits([4, 5, 8, 10, 13, 14, 15, 17, 18, 19, 21, 23]),
    ];
    0x07, 2..=2, [0, 0, 0, 0xff];
    /// Direct cache access.
    0x09, ANY, [ALL, 0, 0, 0];
    /// Performance monitoring.
    0x0a, ANY, WHOLE;
    /// Topology.
    0x0b, ANY, WHOLE;
    /// Extended state: bits of XCR0, without APX, which is withheld.
    0x0d, 0..=0, [bits([0, 1, 2, 3, 4, 5, 6, 7, 9, 17, 18]), ALL, ALL, 0];
    /// Instructions, and bits of IA32_XSS, without Intel PT and architectural LBRs, which are withheld.
    0x0d, 1..=1, [0x1f, ALL, XSS_COMPONENTS as u32, 0];
    /// The components of extended state.
    0x0d, 2..=7, WHOLE;
    0x0d, 9..=14, WHOLE;
    0x0d, 16..=18, WHOLE;
    /// Monitoring and allocation of caches and memory bandwidth.
    0x0f, ANY, WHOLE;
    0x10, ANY, WHOLE;
    /// Frequencies.
    0x15, ANY, WHOLE;
    0x16, ANY, WHOLE;
    /// System on chip.
    0x17, ANY, WHOLE;
    /// TLBs.
    0x18, ANY, WHOLE;
    /// Kind of core.
    0x1a, ANY, WHOLE;
    /// AMX.
    0x1d, ANY, WHOLE;
    0x1e, ANY, WHOLE;
    /// Topology with more levels.
    0x1f, ANY, WHOLE;
    /// Performance monitoring, more of it. EAX says which subleaves there are.
    0x23, 0..=0, [0b1111, ALL, ALL, ALL];
    0x23, 1..=3, WHOLE;
    /// AVX10.
    0x24, ANY, WHOLE;
    /// The highest extended leaf, limited to the last one here.
    0x8000_0000, ANY, WHOLE;
    /// LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1-GByte pages, RDTSCP, 64-bit mode.
    0x8000_0001, ANY, [ALL, 0, bits([0, 5, 8]), bits([11, 20, 26, 27, 29])];
    /// Name.
    0x8000_0002, ANY, WHOLE;
    0x8000_0003, ANY, WHOLE;
    0x8000_0004, ANY, WHOLE;
    /// A cache.
    0x8000_0006, ANY, [0, 0, ALL, 0];
    /// Invariant TSC.
    0x8000_0007, ANY, [0, 0, 0, bits([8])];
    /// Widths of addresses, the physical one cut down to what guests can have; WBNOINVD.
    0x8000_0008, ANY, [ALL, bits([9]), 0, 0];
}

macro_rules! features {
    ($($(#[doc = $doc:literal])* $name:ident: ($leaf:literal, $subleaf:literal) $register:ident $bit:literal, $presence:expr;)*) => {
        const FEATURES: [Feature; [$(stringify!($name)),*].len()] = [$(Feature {
            leaf: $leaf,
            subleaf: $subleaf,
            register: $register,
            bit: $bit,
            presence: $presence,
        }),*];
    };
}

use Presence::{Enabled, With, Withheld};

features! {
    /// Where branches and events are recorded in memory, the processor stores by linear address: also while the host
    /// runs, by way of its page tables (shadow/src/msr/held.rs).
    DTES64: (0x01, 0) ECX 2, Withheld;
    DS_CPL: (0x01, 0) ECX 4, Withheld;
    DEBUG_STORE: (0x01, 0) EDX 21, Withheld;
    /// GETSEC always exits, and is #UD then.
    SMX: (0x01, 0) ECX 6, Withheld;
    OSXSAVE: (0x01, 0) ECX 27, Enabled(CR4_OSXSAVE);
    /// "There is a hypervisor below": only the host may talk to it.
    HYPERVISOR: (0x01, 0) ECX 31, Withheld;
    /// Enclaves need memory that EPT01 does not map, and controls that are hidden.
    SGX: (0x07, 0) EBX 2, Withheld;
    INVPCID: (0x07, 0) EBX 10, With(Control::Secondary(Secondary::ENABLE_INVPCID));
    /// Intel PT writes its packets by physical address, past EPT, and goes on while the host runs.
    INTEL_PT: (0x07, 0) EBX 25, Withheld;
    OSPKE: (0x07, 0) ECX 4, Enabled(CR4_PKE);
    WAITPKG: (0x07, 0) ECX 5, With(Control::Secondary(Secondary::ENABLE_USER_WAIT_AND_PAUSE));
    /// Encryption with several keys gives memory of the host a second address for each key.
    TOTAL_MEMORY_ENCRYPTION: (0x07, 0) ECX 13, Withheld;
    /// Nobody would keep the wrapping keys of the guest hypervisor and of its nested guests apart.
    KEY_LOCKER: (0x07, 0) ECX 23, Withheld;
    SGX_LAUNCH_CONFIGURATION: (0x07, 0) ECX 30, Withheld;
    SGX_KEYS: (0x07, 0) EDX 1, Withheld;
    /// The keys of memory encryption are the machine's: with another key, memory of the host has a second address.
    PCONFIG: (0x07, 0) EDX 18, Withheld;
    /// The controls that switch IA32_LBR_CTL are hidden, so that branches of the host would be recorded.
    ARCHITECTURAL_LBRS: (0x07, 0) EDX 19, Withheld;
    /// Entries and exits would have to switch its stack levels, and injection its event data.
    FRED: (0x07, 1) EAX 17, Withheld;
    /// Part of FRED.
    NMI_SOURCE: (0x07, 1) EAX 20, Withheld;
    /// Resets a history that only the thread director uses, which goes with the hardware feedback interface.
    HRESET: (0x07, 1) EAX 22, Withheld;
    /// Neither the checks of CR3 nor the operands of emulated instructions know addresses with metadata.
    LINEAR_ADDRESS_MASKING: (0x07, 1) EAX 26, Withheld;
    /// RDMSRLIST and WRMSRLIST are #UD without a tertiary control, and would pass the host's MSR bitmap.
    MSR_LIST: (0x07, 1) EAX 27, Withheld;
    /// PBNDKB is #UD without a control. Withheld as PCONFIG is.
    PBNDKB: (0x07, 1) EBX 1, Withheld;
    /// No code here decodes the exits of MSR accesses with an immediate operand.
    MSR_IMMEDIATE: (0x07, 1) ECX 5, Withheld;
    /// The guest hypervisor's deadline would stay in force while the host runs.
    USER_TIMER: (0x07, 1) EDX 13, Withheld;
    /// Withheld as MSR accesses with an immediate operand are.
    USER_MSR: (0x07, 1) EDX 15, Withheld;
    /// Operands of emulated instructions may be in registers that the host neither saves nor decodes.
    APX: (0x07, 1) EDX 21, Withheld;
    XSAVES: (0x0d, 1) EAX 3, With(Control::Secondary(Secondary::ENABLE_XSAVES));
    RDTSCP: (0x8000_0001, 0) EDX 27, With(Control::Secondary(Secondary::ENABLE_RDTSCP));
}

/// The highest basic leaf here.
const HIGHEST_BASIC: u32 = 0x24;
/// The first extended leaf, and the highest one here.
const EXTENDED: u32 = 0x8000_0000;
const HIGHEST_EXTENDED: u32 = 0x8000_0008;
/// The leaf of the widths of addresses.
const WIDTHS: u32 = 0x8000_0008;
/// The highest subleaf of leaf 7 here.
const HIGHEST_OF_7: u32 = 2;

/// The bits that come through on one machine.
#[derive(Clone, Debug)]
pub struct CpuidView {
    highest_basic: u32,
    highest_extended: u32,
    physical_bits: u32,
    passes: [Answer; ROWS.len()],
}

impl CpuidView {
    /// The view on a processor with these capabilities; `cpuid` executes CPUID on it.
    pub fn new(caps: &VmxCaps, cpuid: impl Fn(u32, u32) -> Answer) -> Self {
        let passes = ROWS.map(|Row { leaf, subleaves, mut known }| {
            let here = FEATURES.iter().filter(|feature| feature.leaf == leaf && subleaves.contains(&feature.subleaf));
            for feature in here {
                let comes_through = matches!(feature.presence, With(control) if caps.may_be_1(control));
                known[feature.register] &= if comes_through { ALL } else { !(1 << feature.bit) };
            }
            known
        });
        let [basic, ..] = cpuid(0, 0);
        let [extended, ..] = cpuid(EXTENDED, 0);
        Self {
            highest_basic: basic.min(HIGHEST_BASIC),
            highest_extended: extended.min(HIGHEST_EXTENDED),
            physical_bits: caps.physical_bits,
            passes,
        }
    }

    /// The answer to a guest hypervisor with this CR4.
    pub fn answer(&self, leaf: u32, subleaf: u32, cr4: u64, cpuid: impl Fn(u32, u32) -> Answer) -> Answer {
        let is_there = leaf <= self.highest_basic || (EXTENDED..=self.highest_extended).contains(&leaf);
        let leaf = if is_there { leaf } else { self.highest_basic };
        let first = ROWS.partition_point(|row| row.leaf < leaf);
        let rows = ROWS[first..].iter().zip(&self.passes[first..]).take_while(|(row, _)| row.leaf == leaf);
        let Some((_, passes)) = rows.into_iter().find(|(row, _)| row.subleaves.contains(&subleaf)) else {
            return [0; 4];
        };
        let mut answer = cpuid(leaf, subleaf);
        for (register, passes) in answer.iter_mut().zip(passes) {
            *register &= passes;
        }
        match (leaf, subleaf) {
            (0, _) => answer[EAX] = self.highest_basic,
            (1, _) | (7, 0) => enabled(leaf, cr4, &mut answer),
            (EXTENDED, _) => answer[EAX] = self.highest_extended,
            (WIDTHS, _) => answer[EAX] = answer[EAX] & !0xff | self.physical_bits.min(answer[EAX] & 0xff),
            _ => (),
        }
        if (leaf, subleaf) == (7, 0) {
            answer[EAX] = answer[EAX].min(HIGHEST_OF_7);
        }
        answer
    }
}

fn enabled(leaf: u32, cr4: u64, answer: &mut Answer) {
    for feature in FEATURES.iter().filter(|feature| feature.leaf == leaf) {
        if matches!(feature.presence, Enabled(bits) if cr4 & bits != 0) {
            answer[feature.register] |= 1 << feature.bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::skylake_caps;
    use proptest::prelude::*;

    /// A processor with every bit of every leaf, up to the highest leaves that it reports.
    fn everything(leaf: u32, _: u32) -> Answer {
        match leaf {
            0 => [0x30, ALL, ALL, ALL],
            EXTENDED => [0x8000_0021, 0, 0, 0],
            _ => WHOLE,
        }
    }

    fn answer(leaf: u32, subleaf: u32, cr4: u64) -> Answer {
        CpuidView::new(&skylake_caps(), everything).answer(leaf, subleaf, cr4, everything)
    }

    #[test]
    fn rows_are_in_order_and_each_feature_is_in_one() {
        assert!(ROWS.is_sorted_by_key(|row| (row.leaf, *row.subleaves.start())));
        assert!([HIGHEST_BASIC, HIGHEST_EXTENDED].iter().all(|&leaf| ROWS.iter().any(|row| row.leaf == leaf)));
        for feature in &FEATURES {
            let row = ROWS.iter().find(|row| row.leaf == feature.leaf && row.subleaves.contains(&feature.subleaf));
            let bit = 1 << feature.bit;
            assert!(
                row.is_some_and(|row| row.known[feature.register] & bit != 0),
                "{:x} {}",
                feature.leaf,
                feature.bit
            );
        }
    }

    #[test]
    fn what_is_withheld_is_absent_and_the_bits_beside_it_come_through() {
        assert_eq!(answer(1, 0, 0)[ECX], !bits([2, 4, 6, 16, 27, 31]));
        assert_eq!(answer(1, 0, 0)[EDX], !bits([10, 20, 21, 30]));
        assert_eq!(answer(7, 0, 0)[EBX], !bits([2, 22, 25]));
        assert_eq!(answer(7, 1, 0)[EBX], bits([0, 3]));
        for leaf in [0x12, 0x14, 0x19, 0x1b, 0x1c, 0x20, 0x21] {
            assert_eq!(answer(leaf, 0, 0), [0; 4], "{leaf:x}");
        }
        assert_eq!((answer(0xd, 8, 0), answer(0xd, 15, 0), answer(7, 3, 0)), ([0; 4], [0; 4], [0; 4]));
        assert_eq!((answer(0x23, 0, 0)[EAX], answer(0x23, 4, 0), answer(0x23, 5, 0)), (0b1111, [0; 4], [0; 4]));
        let feedback = answer(6, 0, 0);
        assert_eq!((feedback[EAX] & bits([19, 23]), feedback[ECX] & 0xff00, feedback[EDX]), (0, 0, 0));
    }

    #[test]
    fn a_bit_that_says_what_cr4_has_speaks_of_the_guest_hypervisors() {
        for (leaf, bit, cr4) in [(1, 27, CR4_OSXSAVE), (7, 4, CR4_PKE)] {
            assert_eq!(answer(leaf, 0, cr4)[ECX] >> bit & 1, 1);
            assert_eq!(answer(leaf, 0, !cr4)[ECX] >> bit & 1, 0);
        }
    }

    #[test]
    fn an_instruction_that_needs_a_control_is_there_with_the_control() {
        let mut caps = skylake_caps();
        caps.remove(Control::Secondary(Secondary::ENABLE_RDTSCP | Secondary::ENABLE_XSAVES));
        let without = CpuidView::new(&caps, everything);
        for (leaf, subleaf, register, bit) in [(0x8000_0001, 0, EDX, 27), (0xd, 1, EAX, 3)] {
            assert_eq!(answer(leaf, subleaf, 0)[register] >> bit & 1, 1);
            assert_eq!(without.answer(leaf, subleaf, 0, everything)[register] >> bit & 1, 0);
        }
        assert_eq!(answer(7, 0, 0)[ECX] >> 5 & 1, 0, "no WAITPKG: this processor lacks the control");
    }

    #[test]
    fn limits_are_cut_down_to_what_is_known_and_a_leaf_above_them_is_the_highest_basic_one() {
        assert_eq!((answer(0, 0, 0)[EAX], answer(EXTENDED, 0, 0)[EAX], answer(7, 0, 0)[EAX]), (0x24, 0x8000_0008, 2));
        let numbered = |leaf, subleaf| match leaf {
            0 => [0x16, 0, 0, 0],
            EXTENDED => [0x8000_0008, 0, 0, 0],
            _ => [leaf, subleaf, 0, 0],
        };
        let view = CpuidView::new(&skylake_caps(), numbered);
        for leaf in [0x17, 0x24, 0x4000_0000, 0x4000_0001, 0x7fff_ffff, 0x8000_0009, 0xc000_0000, u32::MAX] {
            assert_eq!(view.answer(leaf, 3, 0, numbered), [0x16, 3, 0, 0], "{leaf:x}");
        }
    }

    #[test]
    fn the_width_of_physical_addresses_is_the_one_that_guests_can_have() {
        let widths = |leaf, _| [if leaf == WIDTHS { 0x3934 } else { WIDTHS }, 0, 0, 0];
        let answer = |physical_bits| {
            CpuidView::new(&VmxCaps { physical_bits, ..skylake_caps() }, widths).answer(WIDTHS, 0, 0, widths)[EAX]
        };
        assert_eq!((answer(46), answer(52)), (0x392e, 0x3934));
    }

    proptest! {
        #[test]
        fn no_bit_comes_from_anywhere_but_the_processor_or_cr4(leaf: u32, subleaf in 0..64_u32, cr4: u64, word: u32) {
            let processor = |leaf, _| match leaf { 0 => [0x24, 0, 0, 0], EXTENDED => [0x8000_0008, 0, 0, 0], _ => [word; 4] };
            let view = CpuidView::new(&skylake_caps(), processor);
            for leaf in [leaf, leaf % 0x28, EXTENDED + leaf % 12] {
                let answer = view.answer(leaf, subleaf, cr4, processor);
                let of_cr4 = bits([4, 27]);
                if leaf != 0 && leaf != EXTENDED {
                    // EAX of these leaves has numbers.
                    let words = &answer[usize::from(leaf == 7 || leaf == WIDTHS)..];
                    prop_assert!(words.iter().all(|register| register & !word & !of_cr4 == 0), "{leaf:x}");
                }
            }
        }
    }
}
