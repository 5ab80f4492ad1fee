//! MSR numbers used here, by their SDM names (Volume 4), and the MSRs that are not left to guests.

mod held;

pub use held::{
    CLEARED_AT_START, Held, XSS_COMPONENTS, held, misc_enable_shown, misc_enable_written, perf_capabilities_shown,
    xss_may_be,
};

/// IA32_TIME_STAMP_COUNTER.
pub const IA32_TSC: u32 = 0x10;
/// IA32_APIC_BASE.
pub const IA32_APIC_BASE: u32 = 0x1b;
/// IA32_FEATURE_CONTROL.
pub const IA32_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_PRED_CMD.
pub const IA32_PRED_CMD: u32 = 0x49;
/// IA32_FLUSH_CMD.
pub const IA32_FLUSH_CMD: u32 = 0x10b;
/// IA32_ARCH_CAPABILITIES.
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_BIOS_UPDT_TRIG.
pub const IA32_BIOS_UPDT_TRIG: u32 = 0x79;
/// IA32_SMM_MONITOR_CTL.
pub const IA32_SMM_MONITOR_CTL: u32 = 0x9b;
/// IA32_SMBASE.
pub const IA32_SMBASE: u32 = 0x9e;
/// IA32_MTRRCAP.
pub const IA32_MTRRCAP: u32 = 0xfe;
/// IA32_SYSENTER_CS.
pub const IA32_SYSENTER_CS: u32 = 0x174;
/// IA32_SYSENTER_ESP.
pub const IA32_SYSENTER_ESP: u32 = 0x175;
/// IA32_SYSENTER_EIP.
pub const IA32_SYSENTER_EIP: u32 = 0x176;
/// IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// IA32_DEBUGCTL.
pub const IA32_DEBUGCTL: u32 = 0x1d9;
/// IA32_PAT.
pub const IA32_PAT: u32 = 0x277;
/// IA32_PERF_CAPABILITIES.
pub const IA32_PERF_CAPABILITIES: u32 = 0x345;
/// IA32_PEBS_ENABLE.
pub const IA32_PEBS_ENABLE: u32 = 0x3f1;
/// IA32_VMX_BASIC.
pub const IA32_VMX_BASIC: u32 = 0x480;
/// IA32_VMX_PINBASED_CTLS.
pub const IA32_VMX_PINBASED_CTLS: u32 = 0x481;
/// IA32_VMX_PROCBASED_CTLS.
pub const IA32_VMX_PROCBASED_CTLS: u32 = 0x482;
/// IA32_VMX_EXIT_CTLS.
pub const IA32_VMX_EXIT_CTLS: u32 = 0x483;
/// IA32_VMX_ENTRY_CTLS.
pub const IA32_VMX_ENTRY_CTLS: u32 = 0x484;
/// IA32_VMX_MISC.
pub const IA32_VMX_MISC: u32 = 0x485;
/// IA32_VMX_CR0_FIXED0.
pub const IA32_VMX_CR0_FIXED0: u32 = 0x486;
/// IA32_VMX_CR0_FIXED1.
pub const IA32_VMX_CR0_FIXED1: u32 = 0x487;
/// IA32_VMX_CR4_FIXED0.
pub const IA32_VMX_CR4_FIXED0: u32 = 0x488;
/// IA32_VMX_CR4_FIXED1.
pub const IA32_VMX_CR4_FIXED1: u32 = 0x489;
/// IA32_VMX_VMCS_ENUM.
pub const IA32_VMX_VMCS_ENUM: u32 = 0x48a;
/// IA32_VMX_PROCBASED_CTLS2.
pub const IA32_VMX_PROCBASED_CTLS2: u32 = 0x48b;
/// IA32_VMX_EPT_VPID_CAP.
pub const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
/// IA32_VMX_TRUE_PINBASED_CTLS.
pub const IA32_VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
/// IA32_VMX_TRUE_PROCBASED_CTLS.
pub const IA32_VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
/// IA32_VMX_TRUE_EXIT_CTLS.
pub const IA32_VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
/// IA32_VMX_TRUE_ENTRY_CTLS.
pub const IA32_VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
/// IA32_VMX_VMFUNC.
pub const IA32_VMX_VMFUNC: u32 = 0x491;
/// IA32_VMX_PROCBASED_CTLS3.
pub const IA32_VMX_PROCBASED_CTLS3: u32 = 0x492;
/// IA32_VMX_EXIT_CTLS2.
pub const IA32_VMX_EXIT_CTLS2: u32 = 0x493;
/// IA32_RTIT_CTL.
pub const IA32_RTIT_CTL: u32 = 0x570;
/// IA32_S_CET.
pub const IA32_S_CET: u32 = 0x6a2;
/// IA32_INTERRUPT_SSP_TABLE_ADDR.
pub const IA32_INTERRUPT_SSP_TABLE_ADDR: u32 = 0x6a8;
/// IA32_PKRS.
pub const IA32_PKRS: u32 = 0x6e1;
/// IA32_TME_ACTIVATE.
pub const IA32_TME_ACTIVATE: u32 = 0x982;
/// IA32_UINTR_MISC.
pub const IA32_UINTR_MISC: u32 = 0x988;
/// IA32_LBR_CTL.
pub const IA32_LBR_CTL: u32 = 0x14ce;
/// IA32_XSS.
pub const IA32_XSS: u32 = 0xda0;
/// IA32_EFER.
pub const IA32_EFER: u32 = 0xc000_0080;
/// IA32_FS_BASE.
pub const IA32_FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const IA32_GS_BASE: u32 = 0xc000_0101;

/// The MSRs that report VMX capabilities; all read-only.
pub const VMX_CAPABILITIES: core::ops::RangeInclusive<u32> = IA32_VMX_BASIC..=IA32_VMX_EXIT_CTLS2;

/// A kind of access to an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// RDMSR.
    Read,
    /// WRMSR.
    Write,
}

/// Whether the host looks at this access of the guest hypervisor's or a nested guest's: [`held`] says what it does.
/// Everything else passes through.
#[inline(always)]
pub const fn host_owns(msr: u32, access: Access) -> bool {
    let set = match access {
        Access::Read => &held::HELD_READS,
        Access::Write => &held::HELD_WRITES,
    };
    msr < held::LOWER_RANGE && set[(msr / u64::BITS) as usize] >> (msr % u64::BITS) & 1 != 0
}

/// Size in bytes of the MSR bitmaps (SDM 25.6.9 "MSR-Bitmap Address").
pub const BITMAP_BYTES: usize = 4096;

/// The place of an MSR's bit in the bitmaps: byte and bit. `None`: outside both ranges, such an access always exits.
pub const fn bitmap_bit(msr: u32, access: Access) -> Option<(usize, u32)> {
    let base = match msr {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 1024,
        _ => return None,
    };
    let base = match access {
        Access::Read => base,
        Access::Write => base + 2048,
    };
    let index = msr & 0x1fff;
    Some((base + (index / 8) as usize, index % 8))
}

/// Whether an MSR is outside both ranges of the bitmaps. No Intel processor has an MSR there. Hypervisors do,
/// 4000_0000H to 4000_02FFH and 4B56_4D00H and above: most of these MSRs take the address of memory that the hypervisor
/// then writes, and a hypervisor below l1hv would write the host's memory. So no guest has any of them, even where the
/// host executes the access.
pub const fn is_outside_ranges(msr: u32) -> bool {
    bitmap_bit(msr, Access::Read).is_none()
}

/// The MSR bitmap of the host's own intercepts.
pub const HOST_INTERCEPTS: [u8; BITMAP_BYTES] = {
    let mut bitmap = [0; BITMAP_BYTES];
    let mut msr = 0;
    while msr < 0x2000 {
        if let (true, Some((byte, bit))) = (host_owns(msr, Access::Read), bitmap_bit(msr, Access::Read)) {
            bitmap[byte] |= 1 << bit;
        }
        if let (true, Some((byte, bit))) = (host_owns(msr, Access::Write), bitmap_bit(msr, Access::Write)) {
            bitmap[byte] |= 1 << bit;
        }
        msr += 1;
    }
    bitmap
};

/// Makes writes to these MSRs exit.
pub fn intercept_writes(bitmap: &mut [u8], msrs: &[u32]) {
    for (byte, bit) in msrs.iter().filter_map(|&msr| bitmap_bit(msr, Access::Write)) {
        bitmap[byte] |= 1 << bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_bitmaps_lie_where_the_sdm_puts_them() {
        assert_eq!(bitmap_bit(0, Access::Read), Some((0, 0)));
        assert_eq!(bitmap_bit(IA32_EFER, Access::Read), Some((1024 + 0x10, 0)));
        assert_eq!(bitmap_bit(0x1fff, Access::Write), Some((3071, 7)));
        assert_eq!(bitmap_bit(0xc000_1fff, Access::Write), Some((4095, 7)));
        assert_eq!(bitmap_bit(0x4000_0000, Access::Read), None);
    }

    #[test]
    fn the_host_intercepts_vmx_capabilities_and_leaves_what_entries_and_exits_switch() {
        let set =
            |msr, access| bitmap_bit(msr, access).is_some_and(|(byte, bit)| HOST_INTERCEPTS[byte] >> bit & 1 != 0);
        assert!(VMX_CAPABILITIES.into_iter().all(|msr| set(msr, Access::Read) && set(msr, Access::Write)));
        assert!(set(IA32_FEATURE_CONTROL, Access::Read));
        assert!(!set(IA32_EFER, Access::Write) && !set(IA32_TSC, Access::Write));
        assert!(!set(IA32_APIC_BASE, Access::Read) && set(IA32_APIC_BASE, Access::Write));
        for msr in [0x4000_0000, 0x4000_0073, 0x4b56_4d01, 0x2000, 0xbfff_ffff, 0xc000_2000, 0xc001_0015, u32::MAX] {
            assert!(is_outside_ranges(msr), "{msr:x}");
        }
        assert!([0, 0x1fff, 0xc000_0000, 0xc000_1fff].iter().all(|&msr| !is_outside_ranges(msr)));
    }
}
