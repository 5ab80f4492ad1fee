//! Exit qualification of an EPT violation (SDM Table 28-7 "Exit Qualification for EPT Violations").

use bitflags::bitflags;

use crate::Rights;
use crate::entry::{ExecuteControl, Features};

/// The qualification. Bits 11:9 are defined only if [`Self::LINEAR_ADDRESS_IS_VALID`] and [`Self::IS_TRANSLATION`] are
/// both set, and the processor reports advanced information (IA32_VMX_EPT_VPID_CAP\[22\]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct EptViolation(pub u64);

bitflags! {
    impl EptViolation: u64 {
        /// A data read.
        const READ = 1 << 0;
        /// A data write. With accessed and dirty flags enabled, an access to the guest's paging structures counts as
        /// one.
        const WRITE = 1 << 1;
        /// An instruction fetch.
        const FETCH = 1 << 2;
        /// The guest-physical address is readable.
        const READABLE = 1 << 3;
        /// The guest-physical address is writable.
        const WRITABLE = 1 << 4;
        /// The guest-physical address is executable; with mode-based execute control, from supervisor-mode linear
        /// addresses.
        const EXECUTABLE = 1 << 5;
        /// With mode-based execute control, the guest-physical address is executable from user-mode linear addresses.
        const USER_EXECUTABLE = 1 << 6;
        /// The guest-linear address is valid.
        const LINEAR_ADDRESS_IS_VALID = 1 << 7;
        /// The access was to the translation of a linear address, not to a paging-structure entry.
        const IS_TRANSLATION = 1 << 8;
        /// Advanced: the linear address is a user-mode one.
        const USER_ADDRESS = 1 << 9;
        /// Advanced: the linear address translates to a writable page.
        const WRITABLE_PAGE = 1 << 10;
        /// Advanced: the linear address translates to an execute-disable page.
        const EXECUTE_DISABLE_PAGE = 1 << 11;
        /// NMI unblocking due to IRET. Exit qualifications of other reasons have this bit as well.
        const NMI_UNBLOCKING = 1 << 12;
        /// A shadow-stack access.
        const SHADOW_STACK_ACCESS = 1 << 13;
        /// The guest-physical address has supervisor shadow-stack rights (bit 60 of its EPT entry).
        const SHADOW_STACK_RIGHTS = 1 << 14;
        /// Guest-paging verification caused the violation.
        const GUEST_PAGING_VERIFICATION = 1 << 15;
        /// The access was asynchronous to instruction execution.
        const ASYNCHRONOUS = 1 << 16;
    }
}

impl EptViolation {
    const RIGHTS_SHIFT: u32 = 3;
    /// The accesses that the translation permits.
    const PERMITTED: Self = Self::READABLE.union(Self::WRITABLE).union(Self::EXECUTABLE).union(Self::USER_EXECUTABLE);

    /// The rights that the access needs. With mode-based execute control the mode of a fetch may be unknown. Then there
    /// are two candidates, of which one is right; a right that the translation grants already was not the missing one.
    pub const fn needs(self, execute: ExecuteControl, features: &Features) -> (Rights, Option<Rights>) {
        let data = Rights::from_bits(self.0);
        if !self.contains(Self::FETCH) || !execute.all().contain(Rights::USER_EXECUTE) {
            return (data, None);
        }
        if features.advanced_violation && self.contains(Self::LINEAR_ADDRESS_IS_VALID.union(Self::IS_TRANSLATION)) {
            return (if self.contains(Self::USER_ADDRESS) { Rights::USER_EXECUTE } else { Rights::EXECUTE }, None);
        }
        match (self.contains(Self::EXECUTABLE), self.contains(Self::USER_EXECUTABLE)) {
            (false, true) => (Rights::EXECUTE, None),
            (true, false) => (Rights::USER_EXECUTE, None),
            _ => (Rights::EXECUTE, Some(Rights::USER_EXECUTE)),
        }
    }

    /// Whether the translation permits any access, and so exists.
    pub const fn permits_something(self) -> bool {
        self.intersects(Self::PERMITTED)
    }

    /// The qualification of the same access to other tables, which permit `rights`.
    pub const fn against(self, rights: Rights) -> Self {
        let permitted = (rights.bits() & Rights::ALL.bits()) << Self::RIGHTS_SHIFT;
        let user = if rights.contain(Rights::USER_EXECUTE) { Self::USER_EXECUTABLE.0 } else { 0 };
        Self(self.0 & !Self::PERMITTED.0 | permitted | user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEATURES: Features =
        Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };

    #[test]
    fn what_is_permitted_is_replaced_and_the_rest_stays() {
        let nmi_unblocking = 1 << 12;
        let hardware = EptViolation(nmi_unblocking | 0x1fa);
        assert!(hardware.contains(EptViolation::NMI_UNBLOCKING));
        assert_eq!(hardware.needs(ExecuteControl::BY_MODE, &FEATURES), (Rights::WRITE, None));
        assert_eq!(hardware.against(Rights::READ), EptViolation(nmi_unblocking | 0x18a));
        assert_eq!(hardware.against(Rights::USER_EXECUTE), EptViolation(nmi_unblocking | 0x1c2));
        let of_walk = EptViolation(0x8b);
        let read_and_written = EptViolation::READ | EptViolation::WRITE;
        assert_eq!(of_walk, read_and_written | EptViolation::READABLE | EptViolation::LINEAR_ADDRESS_IS_VALID);
    }

    #[test]
    fn a_fetch_needs_the_right_of_its_mode_as_far_as_that_is_known() {
        let needs = |permitted: u64| EptViolation(0x184 | permitted).needs(ExecuteControl::BY_MODE, &FEATURES);
        assert_eq!(needs(0x20), (Rights::USER_EXECUTE, None));
        assert_eq!(needs(0x40), (Rights::EXECUTE, None));
        assert_eq!(needs(0), (Rights::EXECUTE, Some(Rights::USER_EXECUTE)));
        assert_eq!(EptViolation(0x1a4).needs(ExecuteControl::UNIFORM, &FEATURES), (Rights::EXECUTE, None));
        let advanced = Features { advanced_violation: true, ..FEATURES };
        let needs = |word| EptViolation(word).needs(ExecuteControl::BY_MODE, &advanced).0;
        assert_eq!([needs(0x384), needs(0x184)], [Rights::USER_EXECUTE, Rights::EXECUTE]);
    }
}
