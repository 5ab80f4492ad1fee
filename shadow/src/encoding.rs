//! The encoding of a VMCS field (SDM 25.11.2 "VMREAD, VMWRITE, and Encodings of VMCS Fields").

use core::fmt;

/// What a field belongs to: bits 11:10 of its encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Area {
    /// VM-execution, VM-exit and VM-entry control fields.
    Control = 0,
    /// VM-exit information fields, read-only unless IA32_VMX_MISC\[29\] is 1.
    ExitInfo = 1,
    /// Guest-state area.
    Guest = 2,
    /// Host-state area.
    Host = 3,
}

/// The width of a field: bits 14:13 of its encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Width {
    /// 16 bits.
    W16 = 0,
    /// 64 bits; the only width with a second encoding, for the upper half.
    W64 = 1,
    /// 32 bits.
    W32 = 2,
    /// Natural width: 64 bits on a processor with Intel 64 architecture.
    Nat = 3,
}

impl Width {
    /// The bits that a field of this width holds.
    pub const fn mask(self) -> u64 {
        match self {
            Self::W16 => 0xffff,
            Self::W32 => 0xffff_ffff,
            Self::W64 | Self::Nat => u64::MAX,
        }
    }
}

/// A field encoding as VMREAD and VMWRITE take it in a register. Any 32-bit value is representable; most name no field.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Encoding(pub u32);

impl Encoding {
    /// The encoding of the field with this width, area and index (full access).
    ///
    /// # Panics
    ///
    /// `index` has more than nine bits.
    pub const fn new(width: Width, area: Area, index: u16) -> Self {
        assert!(index < 0x200, "a field index has nine bits");
        Self((width as u32) << 13 | (area as u32) << 10 | (index as u32) << 1)
    }

    /// Bit 0: access to the upper 32 bits of a 64-bit field.
    pub const fn is_high(self) -> bool {
        self.0 & 1 != 0
    }

    /// The encoding without its access-type bit.
    pub const fn full(self) -> Self {
        Self(self.0 & !1)
    }

    /// Bits 9:1.
    pub const fn index(self) -> u16 {
        (self.0 >> 1 & 0x1ff) as u16
    }

    /// Bits 11:10.
    pub const fn area(self) -> Area {
        match self.0 >> 10 & 3 {
            0 => Area::Control,
            1 => Area::ExitInfo,
            2 => Area::Guest,
            _ => Area::Host,
        }
    }

    /// Bits 14:13.
    pub const fn width(self) -> Width {
        match self.0 >> 13 & 3 {
            0 => Width::W16,
            1 => Width::W64,
            2 => Width::W32,
            _ => Width::Nat,
        }
    }

    /// Bits that every encoding has clear: 12 and 31:15.
    pub const fn reserved(self) -> u32 {
        self.0 & 0xffff_9000
    }
}

impl fmt::Debug for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let half = if self.is_high() { " high" } else { "" };
        write!(f, "{:#06x} ({:?} {:?} {}{half})", self.0, self.area(), self.width(), self.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_an_encoding_come_back_out() {
        let guest_rip = Encoding(0x681e);
        assert_eq!(Encoding::new(Width::Nat, Area::Guest, 15), guest_rip);
        assert_eq!((guest_rip.width(), guest_rip.area(), guest_rip.index()), (Width::Nat, Area::Guest, 15));
        assert!(Encoding(0x2801).is_high());
        assert_eq!(Encoding(0x2801).full(), Encoding(0x2800));
        assert_ne!(Encoding(0x1_2800).reserved(), 0);
    }
}
