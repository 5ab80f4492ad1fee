//! Checks that the host can run on the processor.

use core::fmt;

use crate::stop::StopKind;

/// What the processor reports about VMX. MSRs that do not exist are zero.
#[derive(Clone, Copy, Debug, Default)]
pub struct VmxSupport {
    /// CPUID.1:ECX.VMX\[bit 5\].
    pub vmx: bool,
    /// Whether IA32_EFER.NXE could be set.
    pub execute_disable: bool,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// IA32_VMX_PROCBASED_CTLS.
    pub primary_controls: u64,
    /// IA32_VMX_EXIT_CTLS.
    pub exit_controls: u64,
    /// IA32_VMX_ENTRY_CTLS.
    pub entry_controls: u64,
    /// IA32_VMX_PROCBASED_CTLS2.
    pub secondary_controls: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
}

/// IA32_FEATURE_CONTROL: the lock bit.
pub const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: enable VMX outside SMX operation.
pub const FEATURE_CONTROL_VMX_OUTSIDE_SMX: u64 = 1 << 2;

/// The high half of a VMX control capability MSR holds the allowed 1-settings. SDM Vol. 3D, A.3.
const fn allowed_1(control: u32) -> u64 {
    1 << (32 + control)
}

const ACTIVATE_SECONDARY_CONTROLS: u64 = allowed_1(31);
const ENABLE_EPT: u64 = allowed_1(1);
const ENABLE_VPID: u64 = allowed_1(5);
const UNRESTRICTED_GUEST: u64 = allowed_1(7);

/// Selects the capability MSR of a control word.
type Word = fn(&VmxSupport) -> u64;

/// The controls that the host needs, besides those whose absence has a stop kind of its own: word, bit and name.
const CONTROLS: [(Word, u32, &str); 12] = [
    (|vmx| vmx.primary_controls, 27, "the monitor trap flag"),
    (|vmx| vmx.primary_controls, 28, "MSR bitmaps"),
    (|vmx| vmx.exit_controls, 2, "debug controls saved by VM exits"),
    (|vmx| vmx.exit_controls, 9, "a host in IA-32e mode"),
    (|vmx| vmx.exit_controls, 18, "IA32_PAT saved by VM exits"),
    (|vmx| vmx.exit_controls, 19, "IA32_PAT loaded by VM exits"),
    (|vmx| vmx.exit_controls, 20, "IA32_EFER saved by VM exits"),
    (|vmx| vmx.exit_controls, 21, "IA32_EFER loaded by VM exits"),
    (|vmx| vmx.entry_controls, 2, "debug controls loaded by VM entries"),
    (|vmx| vmx.entry_controls, 9, "guests in IA-32e mode"),
    (|vmx| vmx.entry_controls, 14, "IA32_PAT loaded by VM entries"),
    (|vmx| vmx.entry_controls, 15, "IA32_EFER loaded by VM entries"),
];

/// The features of INVVPID in IA32_VMX_EPT_VPID_CAP that the host uses, with their names. Of the other features, the
/// guest hypervisor is offered those that the processor has.
const VPID_FEATURES: [(u64, &str); 2] = [(1 << 32, "INVVPID"), (1 << 41, "single-context INVVPID")];

/// The features of IA32_VMX_EPT_VPID_CAP that the host uses, with their names. SDM Vol. 3D, A.10 "VPID and EPT
/// Capabilities".
const EPT_FEATURES: [(u64, &str); 6] = [
    (1 << 6, "a page-walk length of 4"),
    (1 << 14, "the write-back memory type"),
    (1 << 16, "2 MiB pages"),
    (1 << 20, "INVEPT"),
    (1 << 25, "single-context INVEPT"),
    (1 << 26, "all-context INVEPT"),
];

/// Why the host cannot run here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unsupported {
    /// No VMX.
    NoVmx,
    /// IA32_FEATURE_CONTROL is locked without VMX outside SMX.
    VmxLocked,
    /// No EPT.
    NoEpt,
    /// EPT lacks the named feature.
    EptFeature(&'static str),
    /// No unrestricted guest.
    NoUnrestrictedGuest,
    /// No VPID.
    NoVpid,
    /// VMX lacks the named feature.
    Feature(&'static str),
    /// No execute-disable.
    NoExecuteDisable,
}

impl Unsupported {
    /// The kind of the stop that follows.
    pub const fn kind(self) -> StopKind {
        match self {
            Self::NoVmx => StopKind::NoVmx,
            Self::VmxLocked => StopKind::VmxLocked,
            Self::NoEpt | Self::EptFeature(_) => StopKind::NoEpt,
            Self::NoUnrestrictedGuest => StopKind::NoUnrestrictedGuest,
            Self::NoVpid => StopKind::NoVpid,
            Self::Feature(_) => StopKind::NoVmxFeature,
            Self::NoExecuteDisable => StopKind::NoExecuteDisable,
        }
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVmx => f.write_str(
                "this processor offers no VMX: use an Intel processor with VT-x, Bochs with VMX, or KVM with nested=1 and -cpu host",
            ),
            Self::VmxLocked => f.write_str(
                "the firmware locked VMX off (IA32_FEATURE_CONTROL): enable \"VT-x\" or \"Virtualization\" in its setup and power the machine off once",
            ),
            Self::NoEpt => f.write_str("this processor's VMX has no EPT: use one with EPT (Nehalem or later)"),
            Self::EptFeature(feature) => {
                write!(f, "this processor's EPT lacks {feature}: use a processor that has it (Haswell or later)")
            }
            Self::NoUnrestrictedGuest => {
                f.write_str("this processor's VMX has no unrestricted guest: use one that has it (Westmere or later)")
            }
            Self::NoVpid => f.write_str("this processor's VMX has no VPID: use one that has it (Nehalem or later)"),
            Self::Feature(feature) => write!(
                f,
                "VMX of this machine lacks {feature}: use a processor that has it (Westmere or later), or a hypervisor below that passes it on"
            ),
            Self::NoExecuteDisable => f.write_str(
                "this processor has no execute-disable, or the firmware switched it off: enable \"Execute Disable\" in its setup",
            ),
        }
    }
}

impl core::error::Error for Unsupported {}

impl VmxSupport {
    /// Checks all that the host needs. `Ok(Some(value))` says that IA32_FEATURE_CONTROL is unlocked and must be locked
    /// with `value` first.
    ///
    /// # Errors
    ///
    /// The first feature that is missing, the most basic one first.
    pub fn check(&self) -> Result<Option<u64>, Unsupported> {
        if !self.vmx {
            return Err(Unsupported::NoVmx);
        }
        let locked = self.feature_control & FEATURE_CONTROL_LOCKED != 0;
        if locked && self.feature_control & FEATURE_CONTROL_VMX_OUTSIDE_SMX == 0 {
            return Err(Unsupported::VmxLocked);
        }
        if self.primary_controls & ACTIVATE_SECONDARY_CONTROLS == 0 || self.secondary_controls & ENABLE_EPT == 0 {
            return Err(Unsupported::NoEpt);
        }
        for (bit, name) in EPT_FEATURES {
            if self.ept_vpid & bit == 0 {
                return Err(Unsupported::EptFeature(name));
            }
        }
        if self.secondary_controls & UNRESTRICTED_GUEST == 0 {
            return Err(Unsupported::NoUnrestrictedGuest);
        }
        if self.secondary_controls & ENABLE_VPID == 0 {
            return Err(Unsupported::NoVpid);
        }
        for (bit, name) in VPID_FEATURES {
            if self.ept_vpid & bit == 0 {
                return Err(Unsupported::Feature(name));
            }
        }
        for (word, control, name) in CONTROLS {
            if word(self) & allowed_1(control) == 0 {
                return Err(Unsupported::Feature(name));
            }
        }
        if !self.execute_disable {
            return Err(Unsupported::NoExecuteDisable);
        }
        let wanted = self.feature_control | FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX_OUTSIDE_SMX;
        Ok((!locked).then_some(wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> VmxSupport {
        VmxSupport {
            vmx: true,
            execute_disable: true,
            feature_control: FEATURE_CONTROL_LOCKED | FEATURE_CONTROL_VMX_OUTSIDE_SMX,
            primary_controls: u64::MAX,
            exit_controls: u64::MAX,
            entry_controls: u64::MAX,
            secondary_controls: ENABLE_EPT | ENABLE_VPID | UNRESTRICTED_GUEST,
            ept_vpid: EPT_FEATURES.iter().chain(&VPID_FEATURES).fold(0, |all, (bit, _)| all | bit),
        }
    }

    #[test]
    fn a_complete_processor_is_accepted_and_its_locked_register_left_alone() {
        assert_eq!(good().check(), Ok(None));
    }

    #[test]
    fn an_unlocked_feature_control_is_to_be_locked_with_vmx_enabled_and_its_other_bits_kept() {
        let machine = VmxSupport { feature_control: 1 << 18, ..good() };
        assert_eq!(machine.check(), Ok(Some(1 << 18 | 0b101)));
    }

    #[test]
    fn each_missing_feature_is_named_by_its_own_kind_of_stop() {
        let cases = [
            (VmxSupport { vmx: false, ..good() }, StopKind::NoVmx),
            (VmxSupport { feature_control: 0b001, ..good() }, StopKind::VmxLocked),
            (VmxSupport { feature_control: 0b011, ..good() }, StopKind::VmxLocked),
            (VmxSupport { primary_controls: 0, ..good() }, StopKind::NoEpt),
            (VmxSupport { secondary_controls: ENABLE_VPID | UNRESTRICTED_GUEST, ..good() }, StopKind::NoEpt),
            (VmxSupport { secondary_controls: ENABLE_EPT | ENABLE_VPID, ..good() }, StopKind::NoUnrestrictedGuest),
            (VmxSupport { secondary_controls: ENABLE_EPT | UNRESTRICTED_GUEST, ..good() }, StopKind::NoVpid),
            (VmxSupport { execute_disable: false, ..good() }, StopKind::NoExecuteDisable),
        ];
        for (machine, kind) in cases {
            assert_eq!(machine.check().map_err(Unsupported::kind), Err(kind), "{machine:x?}");
        }
    }

    #[test]
    fn each_missing_control_is_named_by_a_stop_that_calls_it_no_defect() {
        for control in 0..32 {
            let without = !allowed_1(control);
            for (word, machine) in [
                ("primary", VmxSupport { primary_controls: without, ..good() }),
                ("exit", VmxSupport { exit_controls: without, ..good() }),
                ("entry", VmxSupport { entry_controls: without, ..good() }),
            ] {
                let expected = match (word, control) {
                    ("primary", 27 | 28) | ("exit", 2 | 9 | 18..=21) | ("entry", 2 | 9 | 14 | 15) => {
                        Err(StopKind::NoVmxFeature)
                    }
                    ("primary", 31) => Err(StopKind::NoEpt),
                    _ => Ok(None),
                };
                assert_eq!(machine.check().map_err(Unsupported::kind), expected, "{word} {control}");
            }
        }
        for (bit, name) in VPID_FEATURES {
            let machine = VmxSupport { ept_vpid: good().ept_vpid & !bit, ..good() };
            assert_eq!(machine.check(), Err(Unsupported::Feature(name)));
        }
    }

    #[test]
    fn each_missing_ept_feature_is_named() {
        for (bit, name) in EPT_FEATURES {
            let machine = VmxSupport { ept_vpid: good().ept_vpid & !bit, ..good() };
            assert_eq!(machine.check(), Err(Unsupported::EptFeature(name)));
        }
    }
}
