//! The EPT pointer (SDM 25.6.11 "Extended-Page-Table Pointer (EPTP)").

use core::fmt;
use core::marker::PhantomData;

use crate::addr::Address;
use crate::{Gpa, Hpa, MemoryType, NestedGpa};

/// An EPTP: the root of tables that lie in address space `T` and translate addresses of `F` to those of `T`. VM entry
/// checks whether a guest's EPTP is valid; the methods here only read its parts.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Eptp<F, T>(u64, PhantomData<(F, T)>);

/// The EPTP of EPT01, the host's tables for the guest hypervisor.
pub type Eptp01 = Eptp<Gpa, Hpa>;

/// The EPTP of an EPT12, the guest hypervisor's tables for a nested guest.
pub type Eptp12 = Eptp<NestedGpa, Gpa>;

/// The EPTP of an EPT02, the host's tables for a nested guest.
pub type Eptp02 = Eptp<NestedGpa, Hpa>;

/// Number of levels of a table tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Levels {
    /// 48 bits are translated.
    Four,
    /// 57 bits are translated.
    Five,
}

impl Levels {
    /// The level of the root table.
    #[inline]
    pub const fn root(self) -> u32 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Whether an address is short enough to be translated.
    #[inline]
    pub fn reach(self, address: impl Address) -> bool {
        address.raw() >> (12 + 9 * self.root()) == 0
    }
}

impl<F: Address, T: Address> Eptp<F, T> {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;
    const FIVE_LEVELS: u64 = 4;

    /// A pointer to the root of tables in write-back memory.
    pub fn new(root: T, levels: Levels) -> Self {
        Self::from_bits(root.raw() & Self::ADDRESS | Self::attributes(levels))
    }

    /// A pointer to another root, which may lie in another address space, with the same levels and flags.
    pub fn with_root<U: Address>(self, root: U) -> Eptp<F, U> {
        Eptp::from_bits(root.raw() & Self::ADDRESS | self.0 & Self::ACCESSED_DIRTY | Self::attributes(self.levels()))
    }

    /// Address of the root table.
    #[inline]
    pub fn root(self) -> T {
        T::from_raw(self.0 & Self::ADDRESS)
    }

    /// The EPTP in a VMCS field, or in the operand of an INVEPT. Every value is representable.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits, PhantomData)
    }

    /// The EPTP as a VMCS field holds it.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The same pointer with accessed and dirty flags enabled.
    pub const fn with_flags(self) -> Self {
        Self::from_bits(self.0 | Self::ACCESSED_DIRTY)
    }

    /// Whether accessed and dirty flags are enabled.
    pub const fn has_flags(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }

    /// Number of levels, from the page-walk length. VM entry accepts only the lengths of 4 and 5 levels.
    #[inline]
    pub const fn levels(self) -> Levels {
        if self.0 >> 3 & 7 == Self::FIVE_LEVELS { Levels::Five } else { Levels::Four }
    }

    /// All bits but address and flags: page-walk length, and write-back memory.
    const fn attributes(levels: Levels) -> u64 {
        (levels.root() as u64 - 1) << 3 | MemoryType::WRITE_BACK.0 as u64
    }
}

impl Eptp01 {
    /// EPT01 in the place of an EPT02, while the guest hypervisor uses no EPT: the nested guest's addresses are then
    /// those of the guest hypervisor.
    pub const fn without_ept12(self) -> Eptp02 {
        Eptp::from_bits(self.0)
    }
}

impl<F, T> fmt::Debug for Eptp<F, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "eptp:{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eptp_comes_apart_again() {
        let eptp = Eptp01::new(Hpa(0x1234_5000), Levels::Four).with_flags();
        assert_eq!(eptp.bits(), 0x1234_505e);
        assert_eq!((eptp.root(), eptp.levels(), eptp.has_flags()), (Hpa(0x1234_5000), Levels::Four, true));
        let eptp02: Eptp02 = Eptp12::from_bits(0x9000_0066).with_root(Hpa(0x5000));
        assert_eq!((eptp02.bits(), eptp02.levels()), (0x5066, Levels::Five));
    }

    #[test]
    fn an_address_beyond_the_levels_is_not_reached() {
        assert!(Levels::Four.reach(Gpa((1 << 48) - 1)) && !Levels::Four.reach(Gpa(1 << 48)));
        assert!(Levels::Five.reach(Gpa(1 << 48)) && !Levels::Five.reach(Gpa(1 << 57)));
    }
}
