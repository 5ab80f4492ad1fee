//! The EPT pointer (SDM 25.6.11 "Extended-Page-Table Pointer (EPTP)").

use crate::MemoryType;

/// An EPTP. Whether a guest's is valid is for VM entry to check; here it is only taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Eptp(pub u64);

impl Eptp {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;

    /// A pointer to the root of 4-level tables in write-back memory.
    pub const fn new(root: u64, accessed_dirty: bool) -> Self {
        let flags = if accessed_dirty { Self::ACCESSED_DIRTY } else { 0 };
        Self(root & Self::ADDRESS | flags | 3 << 3 | MemoryType::WRITE_BACK.0 as u64)
    }

    /// Address of the root table.
    pub const fn root(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// Whether accessed and dirty flags are enabled.
    pub const fn accessed_dirty(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }

    /// Number of levels: the page-walk length.
    pub const fn levels(self) -> u32 {
        (self.0 >> 3 & 7) as u32 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eptp_comes_apart_again() {
        let eptp = Eptp::new(0x1234_5000, true);
        assert_eq!(eptp.0, 0x1234_505e);
        assert_eq!((eptp.root(), eptp.levels(), eptp.accessed_dirty()), (0x1234_5000, 4, true));
    }
}
