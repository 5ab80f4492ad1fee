//! Segment descriptors in memory (SDM Volume 3A, 3.4.5 "Segment Descriptors", 3.5 "System Descriptor Types").

use crate::operand::Segment;

/// A descriptor of eight bytes: of a code or data segment, or of a system segment outside IA-32e mode.
///
/// ```
/// use shadow::descriptor::Descriptor;
///
/// let flat = Descriptor(0x00cf_9b00_0000_ffff).segment();
/// assert_eq!((flat.base, flat.limit, flat.access_rights), (0, 0xffff_ffff, 0xc09b));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// The byte with the type, the DPL and the P flag.
    pub const ACCESS_BYTE: u64 = 5;
    /// The accessed flag of a code or data segment, in [`Self::ACCESS_BYTE`].
    pub const ACCESSED: u8 = 1 << 0;
    /// The busy flag of a TSS, in [`Self::ACCESS_BYTE`].
    pub const BUSY: u8 = 1 << 1;

    /// The segment, with access rights in the VMCS format.
    pub const fn segment(self) -> Segment {
        let base = self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000;
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        let is_granular = self.0 >> 55 & 1 != 0;
        Segment {
            base,
            limit: if is_granular { limit << 12 | 0xfff } else { limit },
            access_rights: (self.0 >> 40 & 0xf0ff) as u32,
        }
    }

    /// The type, which also depends on [`Self::is_system`].
    pub const fn kind(self) -> u8 {
        (self.0 >> 40 & 0xf) as u8
    }

    /// Whether it describes a system segment or a gate.
    pub const fn is_system(self) -> bool {
        self.0 >> 44 & 1 == 0
    }

    /// The descriptor's privilege level.
    pub const fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }

    /// The P flag.
    pub const fn is_present(self) -> bool {
        self.0 >> 47 & 1 != 0
    }

    /// Whether it describes a code segment.
    pub const fn is_code(self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    /// Whether it describes a code segment that runs at the privilege level of its caller.
    pub const fn is_conforming_code(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    /// Whether data can be read from the segment.
    pub const fn is_readable(self) -> bool {
        !self.is_system() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }

    /// Whether it describes a data segment that can be written.
    pub const fn is_writable(self) -> bool {
        !self.is_system() && self.kind() & 8 == 0 && self.kind() & 2 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_and_limit_are_put_together() {
        let segment = Descriptor(0x12c5_9234_5678_9abc).segment();
        assert_eq!((segment.base, segment.limit, segment.access_rights), (0x1234_5678, 0x59ab_cfff, 0xc092));
        assert_eq!(Descriptor(0x1245_9234_5678_9abc).segment().limit, 0x5_9abc);
    }

    #[test]
    fn types_say_what_a_segment_is_for() {
        let of = |access: u64| Descriptor(access << 40);
        assert!(of(0x9a).is_code() && of(0x9a).is_readable() && !of(0x9a).is_conforming_code());
        assert!(of(0x9c).is_conforming_code() && !of(0x9c).is_readable() && !of(0x9c).is_writable());
        assert!(of(0xf3).is_writable() && of(0xf3).dpl() == 3 && of(0xf3).is_present());
        assert!(!of(0x90).is_writable() && of(0x90).is_readable());
        assert!(of(0x89).is_system() && !of(0x8b).is_code() && !of(0x82).is_writable() && !of(0x82).is_readable());
    }
}
