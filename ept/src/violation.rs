//! Exit qualification of an EPT violation (SDM Table 28-7 "Exit Qualification for EPT Violations").

use crate::Rights;
use crate::entry::{ExecuteControl, Features};

/// The qualification. Bits 11:9 mean something only where [`Self::linear_address_is_valid`] and [`Self::is_translation`] are both true,
/// and the processor reports advanced information (IA32_VMX_EPT_VPID_CAP\[22\]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct EptViolation(pub u64);

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        $($(#[$doc])* pub const fn $name(self) -> bool { self.0 >> $bit & 1 != 0 })*
    };
}

impl EptViolation {
    const RIGHTS_SHIFT: u32 = 3;
    const USER_EXECUTABLE: u64 = 1 << 6;
    /// Bits 5:3: what the translation permits, and bit 6: user-mode execute permission.
    const PERMITTED: u64 = Rights::ALL.bits() << Self::RIGHTS_SHIFT | Self::USER_EXECUTABLE;
    /// Bit 12, which exit qualifications of other reasons have as well.
    pub const NMI_UNBLOCKING: u64 = 1 << 12;

    bits! {
        /// A data read.
        is_read = 0;
        /// A data write. With accessed and dirty flags enabled, an access to the guest's paging structures counts as one.
        is_write = 1;
        /// An instruction fetch.
        is_fetch = 2;
        /// The guest-physical address is readable.
        readable = 3;
        /// It is writeable.
        writable = 4;
        /// It is executable; with mode-based execute control, from supervisor-mode linear addresses.
        executable = 5;
        /// It is executable from user-mode linear addresses, with mode-based execute control.
        user_executable = 6;
        /// The guest-linear address is valid.
        linear_address_is_valid = 7;
        /// The access was to the translation of a linear address, not to a paging-structure entry.
        is_translation = 8;
        /// Advanced: the linear address is a user-mode one.
        is_user_address = 9;
        /// Advanced: it translates to a writable page.
        is_writable_page = 10;
        /// Advanced: it translates to an execute-disable page.
        is_execute_disable_page = 11;
        /// NMI unblocking due to IRET.
        nmi_unblocking = 12;
        /// A shadow-stack access.
        is_shadow_stack_access = 13;
        /// The guest-physical address has supervisor shadow-stack rights (bit 60 of its EPT entry).
        has_shadow_stack_rights = 14;
        /// Guest-paging verification caused it.
        is_guest_paging_verification = 15;
        /// Asynchronous to instruction execution.
        is_asynchronous = 16;
    }

    /// The rights that the access needs. Where fetches are controlled by mode and nothing tells which mode it was, there are two answers,
    /// of which one is right: what the translation permits already was not refused.
    pub const fn needs(self, execute: ExecuteControl, features: &Features) -> (Rights, Option<Rights>) {
        let data = Rights::from_bits(self.0);
        if !self.is_fetch() || !execute.all().contain(Rights::USER_EXECUTE) {
            return (data, None);
        }
        if features.advanced_violation && self.linear_address_is_valid() && self.is_translation() {
            return (if self.is_user_address() { Rights::USER_EXECUTE } else { Rights::EXECUTE }, None);
        }
        match (self.executable(), self.user_executable()) {
            (false, true) => (Rights::EXECUTE, None),
            (true, false) => (Rights::USER_EXECUTE, None),
            _ => (Rights::EXECUTE, Some(Rights::USER_EXECUTE)),
        }
    }

    /// Whether the translation permits another access, so that it exists.
    pub const fn permits_something(self) -> bool {
        self.0 & Self::PERMITTED != 0
    }

    /// The same access, against other tables that permit `rights`.
    pub const fn against(self, rights: Rights) -> Self {
        let permitted = (rights.bits() & Rights::ALL.bits()) << Self::RIGHTS_SHIFT;
        let user = if rights.contain(Rights::USER_EXECUTE) { Self::USER_EXECUTABLE } else { 0 };
        Self(self.0 & !Self::PERMITTED | permitted | user)
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
        assert!(hardware.nmi_unblocking());
        assert_eq!(hardware.needs(ExecuteControl::BY_MODE, &FEATURES), (Rights::WRITE, None));
        assert_eq!(hardware.against(Rights::READ), EptViolation(nmi_unblocking | 0x18a));
        assert_eq!(hardware.against(Rights::USER_EXECUTE), EptViolation(nmi_unblocking | 0x1c2));
        let of_walk = EptViolation(0x8b);
        assert!(of_walk.is_read() && of_walk.is_write() && of_walk.readable() && !of_walk.writable());
        assert!(of_walk.linear_address_is_valid() && !of_walk.is_translation());
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
