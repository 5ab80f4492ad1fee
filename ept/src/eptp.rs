//! The EPT pointer (SDM 25.6.11 "Extended-Page-Table Pointer (EPTP)").

use crate::MemoryType;

/// An EPTP. Whether a guest's is valid is for VM entry to check; here it is only taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Eptp(pub u64);

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
    pub const fn reach(self, address: u64) -> bool {
        address >> (12 + 9 * self.root()) == 0
    }
}

impl Eptp {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;
    const FIVE_LEVELS: u64 = 4;

    /// A pointer to the root of tables in write-back memory.
    pub const fn new(root: u64, levels: Levels) -> Self {
        Self(root & Self::ADDRESS | (levels.root() as u64 - 1) << 3 | MemoryType::WRITE_BACK.0 as u64)
    }

    /// The same pointer with accessed and dirty flags enabled.
    pub const fn with_flags(self) -> Self {
        Self(self.0 | Self::ACCESSED_DIRTY)
    }

    /// A pointer to another root, with the same levels and flags.
    pub const fn with_root(self, root: u64) -> Self {
        Self(root & Self::ADDRESS | self.0 & Self::ACCESSED_DIRTY | Self::new(0, self.levels()).0)
    }

    /// Address of the root table.
    pub const fn root(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// Whether accessed and dirty flags are enabled.
    pub const fn has_flags(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }

    /// Number of levels, from the page-walk length. VM entry lets no other length than those of 4 and 5 levels pass.
    #[inline]
    pub const fn levels(self) -> Levels {
        if self.0 >> 3 & 7 == Self::FIVE_LEVELS { Levels::Five } else { Levels::Four }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eptp_comes_apart_again() {
        let eptp = Eptp::new(0x1234_5000, Levels::Four).with_flags();
        assert_eq!(eptp.0, 0x1234_505e);
        assert_eq!((eptp.root(), eptp.levels(), eptp.has_flags()), (0x1234_5000, Levels::Four, true));
        let other = Eptp(0x9000_0066).with_root(0x5000);
        assert_eq!((other.0, other.levels()), (0x5066, Levels::Five));
    }

    #[test]
    fn an_address_beyond_the_levels_is_not_reached() {
        assert!(Levels::Four.reach((1 << 48) - 1) && !Levels::Four.reach(1 << 48));
        assert!(Levels::Five.reach(1 << 48) && !Levels::Five.reach(1 << 57));
    }
}
