//! Exit qualification of an EPT violation (SDM Table 28-7).

use crate::Rights;

/// The qualification. Bits that are not named pass through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Qualification(pub u64);

impl Qualification {
    const RIGHTS_SHIFT: u32 = 3;
    /// Bits 5:3: what the translation permits, and bit 6: user-mode execute permission.
    const PERMITTED: u64 = 0xf << Self::RIGHTS_SHIFT;
    const LINEAR_VALID: u64 = 1 << 7;
    const FINAL_TRANSLATION: u64 = 1 << 8;
    const NMI_UNBLOCKING: u64 = 1 << 12;

    /// Bits 2:0: the access. With accessed and dirty flags enabled, an access to the guest's paging structures counts as a write.
    pub const fn access(self) -> Rights {
        Rights::from_bits(self.0)
    }

    /// Whether the access was to a guest paging-structure entry, not to the operand itself.
    pub const fn is_page_walk(self) -> bool {
        self.0 & (Self::LINEAR_VALID | Self::FINAL_TRANSLATION) == Self::LINEAR_VALID
    }

    /// Bit 12: NMI unblocking due to IRET.
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & Self::NMI_UNBLOCKING != 0
    }

    /// A data read in place of a write.
    pub const fn as_read(self) -> Self {
        let writes = self.access().contain(Rights::WRITE);
        if writes { Self(self.0 & !Rights::WRITE.bits() | Rights::READ.bits()) } else { self }
    }

    /// The same access, against other tables that permit `rights`.
    pub const fn against(self, rights: Rights) -> Self {
        Self(self.0 & !Self::PERMITTED | rights.bits() << Self::RIGHTS_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_permitted_is_replaced_and_the_rest_stays() {
        let nmi_unblocking = 1 << 12;
        let hardware = Qualification(nmi_unblocking | 0x1fa);
        assert!(hardware.nmi_unblocking());
        assert_eq!(hardware.access(), Rights::WRITE);
        assert_eq!(hardware.as_read().access(), Rights::READ);
        assert_eq!(hardware.against(Rights::READ), Qualification(nmi_unblocking | 0x18a));
        assert!(
            Qualification(0x82).is_page_walk()
                && !Qualification(0x182).is_page_walk()
                && !Qualification(0x2).is_page_walk()
        );
    }
}
