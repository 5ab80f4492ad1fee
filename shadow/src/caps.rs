//! VMX capabilities: what the processor has, and what of it the guest hypervisor is offered (SDM Appendix A).

mod choose;

use crate::controls::{
    Allowed, Control, ControlWord, EntryControls, Exists, ExitControls, Pin, Primary, Secondary, SecondaryExitControls,
    Tertiary, VmFunctions,
};
use crate::fields::FieldId;
use crate::index::FieldSet;
use crate::msr::*;
use crate::registers::is_canonical;

/// A control word whose allowed settings a capability MSR reports.
pub trait CapabilityWord: ControlWord {
    /// The bits that a processor requires to be 1, and the bits that it allows to be 1.
    fn allowed(caps: &VmxCaps) -> (Self, Self);
}

/// 32-bit words have allowed 0- and 1-settings, 64-bit words only 1-settings.
macro_rules! capability_words {
    ($($word:ident: $capability:ident $settings:tt,)*) => {$(
        impl CapabilityWord for $word {
            fn allowed(caps: &VmxCaps) -> (Self, Self) {
                let (must_be_1, may_be_1) = capability_words!(@ caps, $capability $settings);
                (Self::from_bits_retain(must_be_1), Self::from_bits_retain(may_be_1))
            }
        }
    )*};
    (@ $caps:ident, $capability:ident[01]) => {
        ($caps.$capability.must_be_1, $caps.$capability.may_be_1)
    };
    (@ $caps:ident, $capability:ident[1]) => {
        (0, $caps.$capability)
    };
}

capability_words! {
    Pin: pin[01],
    Primary: primary[01],
    Secondary: secondary[01],
    Tertiary: tertiary[1],
    ExitControls: exit[01],
    SecondaryExitControls: secondary_exit[1],
    EntryControls: entry[01],
    VmFunctions: vmfunc[1],
}

/// IA32_VMX_BASIC\[30:0\]: the VMCS revision identifier.
const REVISION: u32 = 0x7fff_ffff;

/// IA32_VMX_BASIC\[55\]: the TRUE capability MSRs exist.
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;

/// What a host decides about the VMX that its guest hypervisor gets.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// The VMCS revision identifier of VMCS12s, 31 bits. This crate defines their layout ([`crate::vmcs12`]): a new
    /// layout needs a new identifier.
    pub revision: u32,
    /// Controls that the guest hypervisor does not get, although the processor has them and this crate could offer
    /// them.
    pub withheld: &'a [Control],
}

impl Policy<'_> {
    /// Everything that can be offered.
    pub const EVERYTHING: Self = Self { revision: 0x4c31_4856, withheld: &[] };
}

/// The width of physical addresses that guests can have, of the processor's `CPUID.80000008H:EAX[7:0]`: EPT01 has four
/// levels, and no address bit may choose a key of memory encryption, for with another key the host's memory has another
/// address (IA32_TME_ACTIVATE\[35:32\], SDM Volume 4, Table 2-2 "IA-32 Architectural MSRs").
pub const fn usable_physical_bits(width: u32, tme_activate: u64) -> u32 {
    const EPT01_BITS: u32 = 48;
    let without_keys = width.saturating_sub((tme_activate >> 32 & 0xf) as u32);
    if without_keys < EPT01_BITS { without_keys } else { EPT01_BITS }
}

/// A processor's VMX capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VmxCaps {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub primary: Allowed,
    /// Secondary processor-based controls.
    pub secondary: Allowed,
    /// Tertiary processor-based controls: allowed 1-settings.
    pub tertiary: u64,
    /// VM-exit controls.
    pub exit: Allowed,
    /// Secondary VM-exit controls: allowed 1-settings.
    pub secondary_exit: u64,
    /// VM-entry controls.
    pub entry: Allowed,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// Bits of CR0 that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// Bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// Bits of CR4 that must be 1 in VMX operation.
    pub cr4_fixed0: u64,
    /// Bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// IA32_VMX_VMFUNC.
    pub vmfunc: u64,
    /// Physical-address width, as [`usable_physical_bits`] says.
    pub physical_bits: u32,
    /// Linear-address width: 57 with 5-level paging, else 48.
    pub linear_bits: u32,
    /// Fields that the capabilities above promise and VMREAD does not know.
    pub missing: FieldSet,
}

impl VmxCaps {
    /// Reads the capability MSRs. An MSR whose existence another MSR reports is read only if it exists.
    pub fn read(mut rdmsr: impl FnMut(u32) -> u64, physical_bits: u32, linear_bits: u32) -> Self {
        let basic = rdmsr(IA32_VMX_BASIC);
        let (pin, primary, exit, entry) = if basic & BASIC_TRUE_CONTROLS != 0 {
            (
                IA32_VMX_TRUE_PINBASED_CTLS,
                IA32_VMX_TRUE_PROCBASED_CTLS,
                IA32_VMX_TRUE_EXIT_CTLS,
                IA32_VMX_TRUE_ENTRY_CTLS,
            )
        } else {
            (IA32_VMX_PINBASED_CTLS, IA32_VMX_PROCBASED_CTLS, IA32_VMX_EXIT_CTLS, IA32_VMX_ENTRY_CTLS)
        };
        let mut read_if = |present: bool, msr| if present { rdmsr(msr) } else { 0 };
        let primary = Allowed::from_msr(read_if(true, primary));
        let may = |bit: Primary| primary.may_be_1 & bit.bits() != 0;
        let secondary = Allowed::from_msr(read_if(may(Primary::ACTIVATE_SECONDARY), IA32_VMX_PROCBASED_CTLS2));
        let with = |bit: Secondary| secondary.may_be_1 & bit.bits() != 0;
        let exit = Allowed::from_msr(read_if(true, exit));
        let exit_may = |bit: ExitControls| exit.may_be_1 & bit.bits() != 0;
        Self {
            basic,
            pin: Allowed::from_msr(read_if(true, pin)),
            primary,
            secondary,
            tertiary: read_if(may(Primary::ACTIVATE_TERTIARY), IA32_VMX_PROCBASED_CTLS3),
            exit,
            secondary_exit: read_if(exit_may(ExitControls::ACTIVATE_SECONDARY), IA32_VMX_EXIT_CTLS2),
            entry: Allowed::from_msr(read_if(true, entry)),
            misc: read_if(true, IA32_VMX_MISC),
            cr0_fixed0: read_if(true, IA32_VMX_CR0_FIXED0),
            cr0_fixed1: read_if(true, IA32_VMX_CR0_FIXED1),
            cr4_fixed0: read_if(true, IA32_VMX_CR4_FIXED0),
            cr4_fixed1: read_if(true, IA32_VMX_CR4_FIXED1),
            ept_vpid: read_if(with(Secondary::ENABLE_EPT) || with(Secondary::ENABLE_VPID), IA32_VMX_EPT_VPID_CAP),
            vmfunc: read_if(with(Secondary::ENABLE_VM_FUNCTIONS), IA32_VMX_VMFUNC),
            physical_bits,
            linear_bits,
            missing: FieldSet::EMPTY,
        }
    }

    /// These capabilities on a machine whose VMREAD knows only the fields `known`. A hypervisor below may promise a
    /// control and lack the control's field: such a control is of no use, so it counts as absent.
    #[must_use]
    pub fn with_fields(self, known: &FieldSet) -> Self {
        let missing = self.fields().minus(known);
        let mut caps = Self { missing, ..self };
        for id in missing.iter() {
            if let Exists::With(controls) = id.info().exists {
                controls.iter().for_each(|&control| caps.remove(control));
            }
        }
        caps
    }

    /// The first missing field of those that every processor has: the host cannot run without it.
    pub fn missing_essential(&self) -> Option<FieldId> {
        self.missing.iter().find(|id| id.info().exists == Exists::Always)
    }

    /// Removes a control, and the controls that only this control activates.
    pub(crate) fn remove(&mut self, control: Control) {
        match control {
            Control::Pin(bits) => self.pin = self.pin.without(bits.bits()),
            Control::Primary(bits) => self.primary = self.primary.without(bits.bits()),
            Control::Secondary(bits) => self.secondary = self.secondary.without(bits.bits()),
            Control::Tertiary(bits) => self.tertiary &= !bits.bits(),
            Control::Exit(bits) => self.exit = self.exit.without(bits.bits()),
            Control::SecondaryExit(bits) => self.secondary_exit &= !bits.bits(),
            Control::Entry(bits) => self.entry = self.entry.without(bits.bits()),
            Control::VmFunction(bits) => self.vmfunc &= !bits.bits(),
        }
        if !self.may_be_1(Control::Primary(Primary::ACTIVATE_TERTIARY)) {
            self.tertiary = 0;
        }
        if !self.may_be_1(Control::Exit(ExitControls::ACTIVATE_SECONDARY)) {
            self.secondary_exit = 0;
        }
        if !self.has_secondary(Secondary::ENABLE_VM_FUNCTIONS) {
            self.vmfunc = 0;
        }
    }

    /// The capabilities that the guest hypervisor is offered. Of the processor's capabilities, they are the controls
    /// that [`crate::controls`] names and does not mark hidden, the EPT features of `ept_offered`, and the other
    /// features that this function names; the controls that the policy withholds are left out. A feature without a name
    /// stays hidden.
    pub fn offered(&self, policy: &Policy<'_>) -> Self {
        /// IA32_VMX_BASIC: physical addresses of 32 bits, the memory type, information on INS and OUTS, the TRUE
        /// capability MSRs, and hardware exceptions with any error code.
        const BASIC: u64 = 1 << 48 | 0xf << 50 | 1 << 54 | BASIC_TRUE_CONTROLS | 1 << 56;
        /// IA32_VMX_MISC: the rate of the timer, EFER.LMA stored, activity states, CR3-target values, the size of MSR
        /// areas, VMWRITE to exit information, and injection with an instruction length of 0. Not Intel PT, and nothing
        /// of SMM.
        const MISC: u64 = 0x1f | 1 << 5 | 7 << 6 | 0x1ff << 16 | 7 << 25 | 1 << 29 | 1 << 30;
        // Offering VMCS shadowing needs IA32_VMX_MISC[29]: the host copies the guest's shadow VMCS into one of its own,
        // exit information included.
        let vmcs_shadowing = if self.vmwrite_any() { Secondary::empty() } else { Secondary::VMCS_SHADOWING };
        // An exit that the host handles must not restart the timer, so the host needs the control that saves it.
        let saves_timer = self.may_be_1(Control::Exit(ExitControls::SAVE_PREEMPTION_TIMER));
        let timer = if saves_timer { Pin::empty() } else { Pin::ACTIVATE_PREEMPTION_TIMER };
        // Without an offered tertiary control there is nothing to activate.
        let tertiary = self.tertiary & Tertiary::OFFERED.bits();
        let activate = if tertiary == 0 { Primary::ACTIVATE_TERTIARY } else { Primary::empty() };
        let mut offered = Self {
            basic: self.basic & BASIC | u64::from(policy.revision & REVISION) | 4096 << 32,
            pin: self.pin.only((Pin::OFFERED - timer).bits(), Pin::DEFAULT1.bits()),
            primary: self.primary.only((Primary::OFFERED - activate).bits(), Primary::DEFAULT1.bits()),
            secondary: self.secondary.only((Secondary::OFFERED - vmcs_shadowing).bits(), 0),
            tertiary,
            exit: self.exit.only(ExitControls::OFFERED.bits(), ExitControls::DEFAULT1.bits()),
            secondary_exit: self.secondary_exit & SecondaryExitControls::OFFERED.bits(),
            entry: self.entry.only(EntryControls::OFFERED.bits(), EntryControls::DEFAULT1.bits()),
            misc: self.misc & MISC,
            ept_vpid: ept_offered(self.ept_vpid),
            vmfunc: self.vmfunc & VmFunctions::OFFERED.bits(),
            ..*self
        };
        policy.withheld.iter().for_each(|&control| offered.remove(control));
        offered
    }

    /// The VMCS revision identifier.
    pub const fn revision(&self) -> u32 {
        self.basic as u32 & REVISION
    }

    /// The value of a capability MSR; `None` where the processor has no such MSR.
    pub fn msr(&self, msr: u32) -> Option<u64> {
        let with_default1 =
            |allowed: Allowed, default1| Allowed { must_be_1: allowed.must_be_1 | default1, ..allowed }.to_msr();
        let has_true = self.basic & BASIC_TRUE_CONTROLS != 0;
        Some(match msr {
            IA32_VMX_BASIC => self.basic,
            IA32_VMX_PINBASED_CTLS => with_default1(self.pin, Pin::DEFAULT1.bits()),
            IA32_VMX_PROCBASED_CTLS => with_default1(self.primary, Primary::DEFAULT1.bits()),
            IA32_VMX_EXIT_CTLS => with_default1(self.exit, ExitControls::DEFAULT1.bits()),
            IA32_VMX_ENTRY_CTLS => with_default1(self.entry, EntryControls::DEFAULT1.bits()),
            IA32_VMX_MISC => self.misc,
            IA32_VMX_CR0_FIXED0 => self.cr0_fixed0,
            IA32_VMX_CR0_FIXED1 => self.cr0_fixed1,
            IA32_VMX_CR4_FIXED0 => self.cr4_fixed0,
            IA32_VMX_CR4_FIXED1 => self.cr4_fixed1,
            IA32_VMX_VMCS_ENUM => self.highest_index() << 1,
            IA32_VMX_PROCBASED_CTLS2 if self.secondary.may_be_1 != 0 => self.secondary.to_msr(),
            IA32_VMX_EPT_VPID_CAP if self.ept_vpid != 0 => self.ept_vpid,
            IA32_VMX_TRUE_PINBASED_CTLS if has_true => self.pin.to_msr(),
            IA32_VMX_TRUE_PROCBASED_CTLS if has_true => self.primary.to_msr(),
            IA32_VMX_TRUE_EXIT_CTLS if has_true => self.exit.to_msr(),
            IA32_VMX_TRUE_ENTRY_CTLS if has_true => self.entry.to_msr(),
            IA32_VMX_VMFUNC if self.has_secondary(Secondary::ENABLE_VM_FUNCTIONS) => self.vmfunc,
            IA32_VMX_PROCBASED_CTLS3 if self.tertiary != 0 => self.tertiary,
            IA32_VMX_EXIT_CTLS2 if self.secondary_exit != 0 => self.secondary_exit,
            _ => return None,
        })
    }

    fn highest_index(&self) -> u64 {
        self.fields().iter().map(|id| u64::from(id.encoding().index())).max().unwrap_or(0)
    }

    /// Whether a field exists.
    pub fn has_field(&self, id: FieldId) -> bool {
        let promised = match id.info().exists {
            Exists::Always | Exists::Smm => true,
            Exists::Cr3Target(number) => number < self.cr3_targets(),
            Exists::Unreported => false,
            Exists::With(controls) => controls.iter().any(|&control| self.may_be_1(control)),
        };
        promised && !self.missing.contains(id)
    }

    /// Whether the processor allows a control to be 1.
    pub fn may_be_1(&self, control: Control) -> bool {
        match control {
            Control::Pin(bits) => Pin::allowed(self).1.contains(bits),
            Control::Primary(bits) => Primary::allowed(self).1.contains(bits),
            Control::Secondary(bits) => Secondary::allowed(self).1.contains(bits),
            Control::Tertiary(bits) => Tertiary::allowed(self).1.contains(bits),
            Control::Exit(bits) => ExitControls::allowed(self).1.contains(bits),
            Control::SecondaryExit(bits) => SecondaryExitControls::allowed(self).1.contains(bits),
            Control::Entry(bits) => EntryControls::allowed(self).1.contains(bits),
            Control::VmFunction(bits) => VmFunctions::allowed(self).1.contains(bits),
        }
    }

    /// All fields that exist.
    pub fn fields(&self) -> FieldSet {
        FieldId::all().filter(|&id| self.has_field(id)).fold(FieldSet::EMPTY, FieldSet::with)
    }

    /// Whether a secondary control may be 1.
    pub const fn has_secondary(&self, bit: Secondary) -> bool {
        self.secondary.may_be_1 & bit.bits() == bit.bits()
    }

    /// Whether an address is valid where the SDM says "must not set any bits beyond the processor's physical-address
    /// width".
    pub const fn is_physical(&self, address: u64) -> bool {
        address >> self.physical_bits == 0
    }

    /// Whether an address is canonical where it is not accessed but put into a register: by what the processor
    /// supports, whatever CR4.LA57 is (SDM Volume 1, 3.3.7.1 "Canonical Addressing").
    pub const fn is_canonical(&self, address: u64) -> bool {
        is_canonical(address, self.linear_bits)
    }

    /// IA32_VMX_MISC\[24:16\]: number of CR3-target values.
    pub const fn cr3_targets(&self) -> u32 {
        (self.misc >> 16 & 0x1ff) as u32
    }

    /// IA32_VMX_MISC\[27:25\]: recommended maximum number of entries in an MSR area.
    pub const fn msr_area_entries(&self) -> u32 {
        512 * ((self.misc >> 25 & 7) as u32 + 1)
    }

    /// IA32_VMX_MISC\[29\]: VMWRITE may write exit information.
    pub const fn vmwrite_any(&self) -> bool {
        self.misc >> 29 & 1 != 0
    }

    /// IA32_VMX_MISC\[5\]: VM exits store EFER.LMA into "IA-32e mode guest".
    pub const fn stores_lma(&self) -> bool {
        self.misc >> 5 & 1 != 0
    }

    /// Whether an activity state other than active is supported: 1 HLT, 2 shutdown, 3 wait-for-SIPI.
    pub const fn has_activity(&self, state: u32) -> bool {
        state == 0 || state <= 3 && self.misc >> (5 + state) & 1 != 0
    }
}

/// Bits of IA32_VMX_EPT_VPID_CAP (SDM A.10 "VPID and EPT Capabilities").
pub mod ept_vpid {
    /// Execute-only translations.
    pub const EXECUTE_ONLY: u64 = 1 << 0;
    /// Page-walk length of 4.
    pub const WALK_4: u64 = 1 << 6;
    /// Uncacheable EPT paging structures.
    pub const UC: u64 = 1 << 8;
    /// Write-back EPT paging structures.
    pub const WB: u64 = 1 << 14;
    /// 2-MByte pages.
    pub const PAGE_2M: u64 = 1 << 16;
    /// 1-GByte pages.
    pub const PAGE_1G: u64 = 1 << 17;
    /// INVEPT.
    pub const INVEPT: u64 = 1 << 20;
    /// Accessed and dirty flags.
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    /// Advanced VM-exit information for EPT violations.
    pub const ADVANCED_VIOLATION: u64 = 1 << 22;
    /// INVEPT, single-context.
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    /// INVEPT, all-context.
    pub const INVEPT_ALL: u64 = 1 << 26;
    /// INVVPID.
    pub const INVVPID: u64 = 1 << 32;
    /// INVVPID types 0 to 3 begin at this bit.
    pub const INVVPID_TYPE_0: u32 = 40;
    /// All four INVVPID types.
    pub const INVVPID_TYPES: u64 = 0xf << INVVPID_TYPE_0;
}

/// The EPT and VPID features offered. Left out: supervisor shadow-stack control, as ept02 has no shadow-stack pages,
/// and 5-level walks, which no machine of the tests has.
fn ept_offered(processor: u64) -> u64 {
    use ept_vpid::*;
    const OFFERED: u64 = EXECUTE_ONLY
        | WALK_4
        | UC
        | WB
        | PAGE_2M
        | PAGE_1G
        | INVEPT
        | ACCESSED_DIRTY
        | ADVANCED_VIOLATION
        | INVEPT_SINGLE
        | INVEPT_ALL
        | INVVPID
        | INVVPID_TYPES;
    processor & OFFERED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::skylake_caps;
    use crate::fields::*;

    #[test]
    fn plain_capability_msrs_force_the_default1_class() {
        let caps = skylake_caps().offered(&Policy::EVERYTHING);
        let plain = Allowed::from_msr(caps.msr(IA32_VMX_PROCBASED_CTLS).unwrap());
        assert_eq!(plain.must_be_1 & Primary::DEFAULT1.bits(), Primary::DEFAULT1.bits());
        let exact = Allowed::from_msr(caps.msr(IA32_VMX_TRUE_PROCBASED_CTLS).unwrap());
        assert_eq!(exact.must_be_1 & Primary::CR3_LOAD_EXITING.bits(), 0);
    }

    #[test]
    fn a_hidden_control_takes_its_fields_with_it() {
        let (machine, offered) = (skylake_caps(), skylake_caps().offered(&Policy::EVERYTHING));
        assert!(machine.has_field(GUEST_BNDCFGS.id()));
        assert!(!offered.has_field(GUEST_BNDCFGS.id()));
        assert!(offered.has_field(EPT_POINTER.id()));
        assert!(offered.fields().minus(&machine.fields()).is_empty());
    }

    /// KVM of Linux 6.1 as the processor: no CR3-target values, and none of the fields for SMM.
    #[test]
    fn a_field_that_vmread_does_not_know_exists_for_nobody() {
        let machine = VmxCaps { misc: 0x2000_0165, ..skylake_caps() };
        let smm = [EXECUTIVE_VMCS_POINTER.id(), GUEST_SMBASE.id(), IO_RCX.id(), IO_RSI.id(), IO_RDI.id(), IO_RIP.id()];
        let cr3_targets = [CR3_TARGET_VALUE_0, CR3_TARGET_VALUE_1, CR3_TARGET_VALUE_2, CR3_TARGET_VALUE_3];
        assert!(cr3_targets.iter().all(|field| !machine.has_field(field.id()) && skylake_caps().has_field(field.id())));
        let machine = machine.with_fields(&FieldSet::ALL.minus(&FieldSet::of(&smm)));
        assert_eq!(machine.missing.iter().collect::<std::vec::Vec<_>>(), smm);
        assert_eq!(machine.missing_essential(), None);
        assert!(!machine.fields().or(&machine.offered(&Policy::EVERYTHING).fields()).intersects(&FieldSet::of(&smm)));
    }

    #[test]
    fn what_vmread_knows_beyond_the_capabilities_changes_nothing() {
        assert_eq!(skylake_caps().with_fields(&FieldSet::ALL), skylake_caps());
    }

    #[test]
    fn a_control_whose_field_is_missing_is_not_offered_and_takes_its_other_fields_with_it() {
        for id in FieldId::all().filter(|&id| skylake_caps().has_field(id)) {
            let machine = skylake_caps().with_fields(&FieldSet::ALL.minus(&FieldSet::EMPTY.with(id)));
            let offered = machine.offered(&Policy::EVERYTHING);
            assert!(!offered.has_field(id), "{id:?}");
            match id.info().exists {
                Exists::With(controls) => {
                    assert!(controls.iter().all(|&control| !offered.may_be_1(control)), "{id:?}");
                    assert_eq!(machine.missing_essential(), None);
                }
                exists => assert_eq!(machine.missing_essential().is_some(), exists == Exists::Always, "{id:?}"),
            }
        }
        let machine = skylake_caps().with_fields(&FieldSet::ALL.minus(&FieldSet::of(&[VMREAD_BITMAP.id()])));
        assert!(!machine.has_field(VMWRITE_BITMAP.id()) && !machine.has_secondary(Secondary::VMCS_SHADOWING));
    }

    #[test]
    fn vmcs_shadowing_is_offered_where_the_host_can_fill_a_shadow_vmcs() {
        let machine = skylake_caps();
        assert!(machine.offered(&Policy::EVERYTHING).has_field(VMREAD_BITMAP.id()));
        let read_only = VmxCaps { misc: machine.misc & !(1 << 29), ..machine.clone() };
        let without_shadowing =
            Policy { withheld: &[Control::Secondary(Secondary::VMCS_SHADOWING)], ..Policy::EVERYTHING };
        for without in [read_only.offered(&Policy::EVERYTHING), machine.offered(&without_shadowing)] {
            assert!(!without.has_secondary(Secondary::VMCS_SHADOWING) && !without.has_field(VMREAD_BITMAP.id()));
            assert!(without.has_secondary(Secondary::ENABLE_EPT));
        }
    }

    #[test]
    fn what_the_policy_withholds_takes_along_what_can_only_be_reached_through_it() {
        let withheld =
            [Control::Secondary(Secondary::ENABLE_VM_FUNCTIONS), Control::Pin(Pin::PROCESS_POSTED_INTERRUPTS)];
        let machine = VmxCaps { vmfunc: 1, ..skylake_caps() };
        let all = machine.offered(&Policy::EVERYTHING);
        let offered = machine.offered(&Policy { revision: 0x1234, withheld: &withheld });
        assert_eq!((all.vmfunc, offered.vmfunc), (1, 0));
        assert!(all.has_field(POSTED_INTERRUPT_NOTIFICATION_VECTOR.id()));
        assert!(!offered.has_field(POSTED_INTERRUPT_NOTIFICATION_VECTOR.id()));
        assert_eq!((offered.revision(), offered.msr(IA32_VMX_BASIC).map(|basic| basic as u32)), (0x1234, Some(0x1234)));
    }

    /// A processor that allows every bit: each bit that is offered has a name.
    #[test]
    fn nothing_without_a_name_is_offered_but_what_must_be_1() {
        fn named<W: ControlWord>() -> u64 {
            W::BITS.iter().fold(0, |bits, bit| bits | 1 << bit.position)
        }
        const RESERVED: u32 = 1 << 31;
        let anything = Allowed { must_be_1: 0, may_be_1: u32::MAX };
        let machine = VmxCaps {
            basic: u64::MAX,
            pin: Allowed { must_be_1: RESERVED, ..anything },
            primary: anything,
            secondary: anything,
            tertiary: u64::MAX,
            exit: anything,
            secondary_exit: u64::MAX,
            entry: Allowed { must_be_1: RESERVED, ..anything },
            misc: u64::MAX,
            ept_vpid: u64::MAX,
            vmfunc: u64::MAX,
            ..VmxCaps::default()
        };
        let offered = machine.offered(&Policy::EVERYTHING);
        let unnamed = |word: Allowed, named: u64| word.may_be_1 & !(named as u32);
        assert_eq!(unnamed(offered.pin, named::<Pin>()), Pin::DEFAULT1.bits() | RESERVED);
        assert_eq!(
            unnamed(offered.primary, named::<Primary>()),
            Primary::DEFAULT1.bits() & !(named::<Primary>() as u32)
        );
        assert_eq!(unnamed(offered.secondary, named::<Secondary>()), 0);
        let exit = ExitControls::DEFAULT1.bits() & !(named::<ExitControls>() as u32);
        assert_eq!(unnamed(offered.exit, named::<ExitControls>()), exit);
        assert_eq!(offered.exit.must_be_1, exit, "what is unknown keeps its default");
        let entry = EntryControls::DEFAULT1.bits() & !(named::<EntryControls>() as u32);
        assert_eq!(unnamed(offered.entry, named::<EntryControls>()), entry | RESERVED);
        assert_eq!(offered.tertiary & !named::<Tertiary>(), 0);
        assert_eq!(offered.secondary_exit & !named::<SecondaryExitControls>(), 0);
        assert_eq!(offered.vmfunc, named::<VmFunctions>());
        assert_eq!(offered.basic, 0x01fd_1000_0000_0000 | u64::from(Policy::EVERYTHING.revision));
        assert_eq!(offered.misc, 0x6fff_01ff & !(1 << 28) & !(0x7f << 9));
    }

    #[test]
    fn addresses_of_guests_have_no_bits_that_choose_a_key_or_that_ept01_does_not_reach() {
        assert_eq!(usable_physical_bits(40, 0), 40);
        assert_eq!(usable_physical_bits(52, 0), 48);
        assert_eq!(usable_physical_bits(46, 6 << 32 | 3), 40);
        assert_eq!(usable_physical_bits(52, 6 << 32 | 3), 46);
        assert_eq!(usable_physical_bits(52, u64::MAX), 37);
    }

    #[test]
    fn a_timer_that_no_exit_saves_is_not_offered() {
        let exit = skylake_caps().exit.without(ExitControls::SAVE_PREEMPTION_TIMER.bits());
        let offered = VmxCaps { exit, ..skylake_caps() }.offered(&Policy::EVERYTHING);
        assert!(!offered.has_field(PREEMPTION_TIMER_VALUE.id()) && offered.has_field(GUEST_RIP.id()));
    }

    #[test]
    fn vmcs_enum_is_twice_the_highest_index_of_an_offered_field() {
        // TSC multiplier, index 25, is the highest one.
        assert_eq!(skylake_caps().offered(&Policy::EVERYTHING).msr(IA32_VMX_VMCS_ENUM), Some(25 << 1));
    }

    #[test]
    fn the_revision_is_ours_and_the_region_a_page() {
        let basic = skylake_caps().offered(&Policy::EVERYTHING).basic;
        assert_eq!(basic as u32, Policy::EVERYTHING.revision);
        assert_eq!(basic >> 32 & 0x1fff, 4096);
    }
}
