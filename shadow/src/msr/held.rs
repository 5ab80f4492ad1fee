//! The MSRs that are not left to guests, the guest hypervisor and nested guests alike: a block list, each row with its
//! reason. There are three.
//!
//! * The host emulates VMX.
//! * Some MSRs make the processor store to memory by an address that EPT does not check: by a physical one, or by a
//!   linear one that it translates in VMX root operation too. A guest would write to the host's memory.
//! * Some change how VMX root operation runs: what its instructions do, or what its memory is.
//!
//! The rows name the MSRs as the SDM does (Volume 4, Table 2-2 "IA-32 Architectural MSRs" and the tables of models). An
//! MSR that a feature brings goes with the feature's bit in [`crate::cpuid`].

use super::{
    IA32_APIC_BASE, IA32_BIOS_UPDT_TRIG, IA32_FEATURE_CONTROL, IA32_LBR_CTL, IA32_MISC_ENABLE, IA32_PEBS_ENABLE,
    IA32_PERF_CAPABILITIES, IA32_RTIT_CTL, IA32_SMM_MONITOR_CTL, IA32_VMX_BASIC, IA32_VMX_EXIT_CTLS2, IA32_XSS,
};

/// What a guest finds in place of an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    /// Nothing: both accesses are #GP, as on a processor without it.
    Absent,
    /// A register that it may read and that is locked: a write is #GP.
    Locked,
    /// What the host makes of both accesses.
    Emulated,
    /// What the host makes of a write; reads are the processor's.
    Written,
    /// What the host makes of a read; writes are the processor's.
    Read,
}

impl Held {
    const fn holds_reads(self) -> bool {
        matches!(self, Self::Absent | Self::Emulated | Self::Read)
    }

    const fn holds_writes(self) -> bool {
        !matches!(self, Self::Read)
    }
}

/// Every `step`th MSR of a range.
#[derive(Clone, Copy, Debug)]
struct Row {
    first: u32,
    last: u32,
    step: u32,
    held: Held,
}

use Held::{Absent, Emulated, Locked, Read, Written};

const fn one(msr: u32, held: Held) -> Row {
    range(msr, msr, held)
}

const fn range(first: u32, last: u32, held: Held) -> Row {
    Row { first, last, step: 1, held }
}

const ROWS: &[Row] = &[
    // KVM's clocks in their first place: a hypervisor below would write to the address that they are given. No
    // processor with VMX has MSRs there.
    range(0x11, 0x12, Absent),
    // The APIC page must not lie over the host's memory.
    one(IA32_APIC_BASE, Written),
    // IA32_USER_MSR_CTL: user-level MSR accesses are withheld.
    one(0x1c, Absent),
    one(IA32_FEATURE_CONTROL, Emulated),
    // An update comes from memory, and is the machine owner's business.
    one(IA32_BIOS_UPDT_TRIG, Written),
    // MSR_TRACE_HUB_STH_ACPIBAR_BASE: the processor's trace messages are stores to this physical address.
    one(0x80, Absent),
    // IA32_MKTME_KEYID_PARTITIONING: address bits that choose a key give the host's memory a second address.
    one(0x87, Absent),
    one(IA32_SMM_MONITOR_CTL, Emulated),
    // Overclocking mailbox: with too low a voltage the host's instructions give wrong results.
    one(0x150, Absent),
    // Bit 34 makes the no-execute bit of the host's page tables reserved. Reads show that there is no PEBS and no BTS.
    one(IA32_MISC_ENABLE, Emulated),
    // IA32_SMRR_PHYSBASE, IA32_SMRR_PHYSMASK, MSR_PRMRR_PHYS_BASE, MSR_PRMRR_PHYS_MASK: ranges of memory that only SMM
    // or enclaves reach; a range over the host's memory would take it away.
    range(0x1f2, 0x1f5, Locked),
    // MSR_PRMRR_VALID_CONFIG: as for these.
    one(0x1fb, Locked),
    // MTRRs ([`crate::mtrr`]): they decide about the host's memory, and not about that of guests.
    range(0x200, 0x21f, Emulated),
    one(0x250, Emulated),
    range(0x258, 0x259, Emulated),
    range(0x268, 0x26f, Emulated),
    // MSR_PRMRR_BASE_0, MSR_UNCORE_PRMRR_PHYS_BASE and _MASK: as for MSR_PRMRR_PHYS_BASE.
    one(0x2a0, Locked),
    range(0x2f4, 0x2f5, Locked),
    one(0x2ff, Emulated),
    // Reads show that there is no PEBS.
    one(IA32_PERF_CAPABILITIES, Read),
    // PEBS: the processor stores records by linear address, in VMX root operation by way of the host's page tables.
    // IA32_PEBS_ENABLE, MSR_PEBS_DATA_CFG; IA32_PEBS_BASE and IA32_PEBS_INDEX of architectural PEBS; MSR_PEBS_LD_LAT,
    // MSR_PEBS_FRONTEND.
    range(IA32_PEBS_ENABLE, 0x3f2, Absent),
    range(0x3f4, 0x3f7, Absent),
    range(IA32_VMX_BASIC, IA32_VMX_EXIT_CTLS2, Emulated),
    // Intel PT: packets are stored by physical address, and go on in VMX root operation. IA32_RTIT_OUTPUT_BASE and
    // _MASK_PTRS, IA32_RTIT_CTL, _STATUS, _CR3_MATCH, and the address filters.
    range(0x560, 0x561, Absent),
    range(IA32_RTIT_CTL, 0x572, Absent),
    range(0x580, 0x587, Absent),
    // IA32_DS_AREA: where PEBS and BTS store.
    one(0x600, Absent),
    // IA32_TME_CAPABILITY, IA32_TME_ACTIVATE, IA32_TME_EXCLUDE_MASK, IA32_TME_EXCLUDE_BASE: memory encryption with
    // other keys, or with none, makes other data of the host's.
    range(0x981, 0x984, Absent),
    // IA32_COPY_STATUS, IA32_IWKEYBACKUP_STATUS: Key Locker is withheld.
    range(0x990, 0x991, Absent),
    // IA32_DEBUG_INTERFACE: lets a debugger at the pins into the host.
    one(0xc80, Locked),
    // IA32_COPY_LOCAL_TO_PLATFORM, IA32_COPY_PLATFORM_TO_LOCAL: as for IA32_COPY_STATUS.
    range(0xd91, 0xd92, Absent),
    // XRSTORS loads MSRs that are held, as components of extended state: those of Intel PT and architectural LBRs.
    one(IA32_XSS, Written),
    // IA32_SEAMRR_PHYS_BASE, IA32_SEAMRR_PHYS_MASK: memory that only SEAM reaches.
    range(0x1400, 0x1401, Locked),
    // Architectural LBRs would record branches of the host.
    range(IA32_LBR_CTL, 0x14cf, Absent),
    // The hardware feedback interface: the package stores to the physical address in IA32_HW_FEEDBACK_PTR.
    // IA32_HW_FEEDBACK_CONFIG, IA32_THREAD_FEEDBACK_CHAR, IA32_HW_FEEDBACK_THREAD_CONFIG.
    range(0x17d0, 0x17d2, Absent),
    one(0x17d4, Absent),
    // IA32_PMC_GPn_CFG_C and IA32_PMC_FXn_CFG_C: switch architectural PEBS on, counter by counter.
    Row { step: 4, ..range(0x1903, 0x197f, Absent) },
    Row { step: 4, ..range(0x1983, 0x19ff, Absent) },
];

/// MSRs that make the processor store to memory, or record what the host does, as soon as they are not 0; and the one by
/// which XRSTORS loads these. The firmware may have used them: the host clears them when it starts.
pub const CLEARED_AT_START: [u32; 4] = [IA32_PEBS_ENABLE, IA32_RTIT_CTL, IA32_XSS, IA32_LBR_CTL];

/// The components of extended state that IA32_XSS may enable: PASID, both of CET, HDC, UINTR, HWP (SDM Volume 1, 13.1
/// "XSAVE-Supported Features and State-Component Bitmaps").
pub const XSS_COMPONENTS: u64 = 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 16;

/// Whether a guest may write a value to IA32_XSS, as far as the host is concerned.
pub const fn xss_may_be(value: u64) -> bool {
    value & !XSS_COMPONENTS == 0
}

/// The lower range of the MSR bitmaps. No MSR of the upper one is held.
pub(super) const LOWER_RANGE: u32 = 0x2000;

/// A bit for each MSR.
pub(super) type Msrs = [u64; (LOWER_RANGE / u64::BITS) as usize];

const fn set_of(reads: bool) -> Msrs {
    let mut set = [0; (LOWER_RANGE / u64::BITS) as usize];
    let mut row = 0;
    while row < ROWS.len() {
        let Row { first, last, step, held } = ROWS[row];
        assert!(first <= last && last < LOWER_RANGE && step != 0);
        let mut msr = first;
        while msr <= last {
            if if reads { held.holds_reads() } else { held.holds_writes() } {
                set[(msr / u64::BITS) as usize] |= 1 << (msr % u64::BITS);
            }
            msr += step;
        }
        row += 1;
    }
    set
}

pub(super) static HELD_READS: Msrs = set_of(true);
pub(super) static HELD_WRITES: Msrs = set_of(false);

/// What a guest finds in place of an MSR; `None` where it finds the processor's.
pub fn held(msr: u32) -> Option<Held> {
    let is_in = |row: &&Row| (row.first..=row.last).contains(&msr) && (msr - row.first).is_multiple_of(row.step);
    ROWS.iter().find(is_in).map(|row| row.held)
}

/// IA32_MISC_ENABLE\[34\]: execute-disable is off.
const XD_BIT_DISABLE: u64 = 1 << 34;
/// IA32_MISC_ENABLE\[11\] and \[12\]: no BTS, no PEBS; read-only.
const BTS_AND_PEBS_UNAVAILABLE: u64 = 1 << 11 | 1 << 12;

/// IA32_MISC_ENABLE as a guest reads it.
pub const fn misc_enable_shown(value: u64) -> u64 {
    value | BTS_AND_PEBS_UNAVAILABLE
}

/// What a guest's write puts into IA32_MISC_ENABLE, which holds `current`; `None` if the write is #GP.
pub const fn misc_enable_written(value: u64, current: u64) -> Option<u64> {
    if value & XD_BIT_DISABLE != 0 {
        return None;
    }
    Some(value & !BTS_AND_PEBS_UNAVAILABLE | current & BTS_AND_PEBS_UNAVAILABLE)
}

/// IA32_PERF_CAPABILITIES as a guest reads it: the format of LBRs that IA32_DEBUGCTL controls, freezing in SMM, writes
/// of all bits of counters, and performance metrics.
pub const fn perf_capabilities_shown(value: u64) -> u64 {
    const LBR_FORMAT: u64 = 0x3f;
    const KNOWN: u64 = 1 << 12 | 1 << 13 | 1 << 15;
    let has_architectural_lbrs = value & LBR_FORMAT == LBR_FORMAT;
    value & if has_architectural_lbrs { KNOWN } else { KNOWN | LBR_FORMAT }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msr::{Access, HOST_INTERCEPTS, bitmap_bit, host_owns};

    #[test]
    fn rows_are_in_order_and_none_overlaps_another() {
        assert!(ROWS.is_sorted_by(|a, b| a.last < b.first));
    }

    #[test]
    fn each_access_that_a_row_holds_is_intercepted_and_no_other() {
        for msr in 0..LOWER_RANGE {
            let held = held(msr);
            for (access, holds) in [
                (Access::Read, held.is_some_and(Held::holds_reads)),
                (Access::Write, held.is_some_and(Held::holds_writes)),
            ] {
                let (byte, bit) = bitmap_bit(msr, access).unwrap();
                assert_eq!(HOST_INTERCEPTS[byte] >> bit & 1 != 0, holds, "{msr:x} {access:?}");
                assert_eq!(host_owns(msr, access), holds, "{msr:x} {access:?}");
            }
        }
    }

    #[test]
    fn what_stores_by_an_address_that_ept_does_not_check_is_absent() {
        let tracing = (0x560..=0x561).chain(0x570..=0x572).chain(0x580..=0x587);
        let pebs = [0x3f1, 0x3f2, 0x3f4, 0x3f5, 0x600, 0x1903, 0x1907, 0x1983];
        let others = [0x80, 0x87, 0x982, 0x17d0, 0x17d1];
        for msr in tracing.chain(pebs).chain(others).chain([0x570, 0x14ce]) {
            assert_eq!(held(msr), Some(Absent), "{msr:x}");
        }
        // Counters, their events, and what an operating system writes at each of its starts.
        for msr in [0xc1, 0x186, 0x309, 0x38d, 0x38f, 0x390, 0x1900, 0x1901, 0x1902, 0x1980, 0x8b, 0x1b0, 0x774] {
            assert_eq!(held(msr), None, "{msr:x}");
        }
    }

    #[test]
    fn execute_disable_stays_on_and_pebs_and_bts_are_not_there() {
        let unavailable = 1 << 11 | 1 << 12;
        assert_eq!(misc_enable_shown(1), 1 | unavailable);
        assert_eq!(misc_enable_written(1 << 34 | 1, 1), None);
        assert_eq!(misc_enable_written(misc_enable_shown(1), 1), Some(1));
        assert_eq!(misc_enable_written(1 << 22, unavailable), Some(1 << 22 | unavailable));
        assert_eq!(perf_capabilities_shown(u64::MAX), 1 << 12 | 1 << 13 | 1 << 15);
        assert_eq!(perf_capabilities_shown(0x3_5fc5), 1 << 12 | 5);
    }

    #[test]
    fn xrstors_loads_no_msr_that_is_held() {
        const INTEL_PT: u64 = 1 << 8;
        const ARCHITECTURAL_LBRS: u64 = 1 << 15;
        assert!(!xss_may_be(INTEL_PT) && !xss_may_be(ARCHITECTURAL_LBRS | 1 << 11));
        assert!(xss_may_be(0) && xss_may_be(1 << 11 | 1 << 12));
        for msr in CLEARED_AT_START {
            assert!(matches!(held(msr), Some(Absent | Written)), "{msr:x}");
        }
    }
}
