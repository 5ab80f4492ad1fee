//! Allowed settings of control words, and their conflicts with wanted settings (SDM A.2 "Reserved Controls and Default
//! Settings").

use super::ControlWord;
use bitflags::parser::to_writer;
use core::fmt;

/// Which settings of a 32-bit control word the processor allows (SDM A.3.1 "Pin-Based VM-Execution Controls").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    /// Allowed 0-settings: a bit that is 1 here must be 1.
    pub must_be_1: u32,
    /// Allowed 1-settings: a bit that is 0 here must be 0.
    pub may_be_1: u32,
}

impl Allowed {
    /// From a capability MSR: allowed 0-settings in the low half, allowed 1-settings in the high half.
    pub const fn from_msr(value: u64) -> Self {
        Self { must_be_1: value as u32, may_be_1: (value >> 32) as u32 }
    }

    /// The capability MSR.
    pub const fn to_msr(self) -> u64 {
        self.must_be_1 as u64 | (self.may_be_1 as u64) << 32
    }

    /// Whether VM entry accepts this value.
    pub const fn permits(self, value: u32) -> bool {
        value & self.must_be_1 == self.must_be_1 && value & !self.may_be_1 == 0
    }

    /// These settings, with both settings allowed for bits of `offered` only. The other bits keep the setting of a
    /// processor that lacks their controls: 1 in the default1 class and where they must be 1, else 0.
    pub const fn only(self, offered: u32, default1: u32) -> Self {
        let must_be_1 = self.must_be_1 | self.may_be_1 & default1 & !offered;
        Self { must_be_1, may_be_1: self.may_be_1 & (offered | must_be_1) }
    }

    /// These settings without the bits of `hidden`, except those that must be 1.
    pub const fn without(self, hidden: u32) -> Self {
        Self { must_be_1: self.must_be_1, may_be_1: self.may_be_1 & (!hidden | self.must_be_1) }
    }
}

/// Why there is no control word with the wanted bits. Every bit at fault is in one of the three sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conflict<W> {
    /// Bits wanted to be 1, where the processor allows only 0.
    pub unavailable: W,
    /// Bits wanted to be 0, where the processor allows only 1.
    pub compulsory: W,
    /// Bits wanted to be both 0 and 1.
    pub contradictory: W,
}

impl<W: ControlWord> fmt::Display for Conflict<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(W::NAME)?;
        for (what, bits) in [
            ("cannot be 1", &self.unavailable),
            ("cannot be 0", &self.compulsory),
            ("wanted to be 0 and 1", &self.contradictory),
        ] {
            if !bits.is_empty() {
                write!(f, "; {what}: ")?;
                to_writer(bits, &mut *f)?;
            }
        }
        Ok(())
    }
}

impl<W: ControlWord> core::error::Error for Conflict<W> {}
