//! The MTRRs of a guest hypervisor (SDM Volume 3A, 13.11 "Memory Type Range Registers (MTRRs)").
//!
//! They mean nothing to guests: where EPT translates an address, the memory type is that of the EPT entry and of the PAT
//! (SDM 29.3.7.2 "Memory Type Used for Translated Guest-Physical Addresses"). To the host they mean much: its own memory
//! could become uncacheable, or write combining, which keeps no order between processors. So a guest writes to copies,
//! and the processor keeps what the firmware has set up.

use core::cell::Cell;

const VARIABLE: core::ops::RangeInclusive<u32> = 0x200..=0x21f;
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

const VARIABLE_COUNT: usize = (*VARIABLE.end() - *VARIABLE.start() + 1) as usize;
const COUNT: usize = VARIABLE_COUNT + FIXED.len() + 1;

/// The MTRRs of one processor, as far as its guest has written to them.
#[derive(Debug)]
pub struct Mtrrs {
    /// IA32_MTRRCAP.
    capability: u64,
    physical_bits: u32,
    written: [Cell<Option<u64>>; COUNT],
}

/// What a register holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Base,
    Mask,
    /// Eight types.
    Fixed,
    Default,
}

/// The place of a register, and its kind.
fn find(msr: u32) -> Option<(usize, Kind)> {
    if VARIABLE.contains(&msr) {
        let kind = if msr.is_multiple_of(2) { Kind::Base } else { Kind::Mask };
        return Some(((msr - VARIABLE.start()) as usize, kind));
    }
    if msr == IA32_MTRR_DEF_TYPE {
        return Some((COUNT - 1, Kind::Default));
    }
    let fixed = FIXED.iter().position(|&fixed| fixed == msr)?;
    Some((VARIABLE_COUNT + fixed, Kind::Fixed))
}

impl Mtrrs {
    /// As the firmware has left them. `capability` is IA32_MTRRCAP, 0 if there is none, and `physical_bits` the width
    /// that guests know of.
    pub const fn new(capability: u64, physical_bits: u32) -> Self {
        Self { capability, physical_bits, written: [const { Cell::new(None) }; COUNT] }
    }

    /// Whether an MSR is one of them.
    pub fn has(msr: u32) -> bool {
        find(msr).is_some()
    }

    /// What the guest has written; nothing if it has not, so that the processor's value counts.
    pub fn read(&self, msr: u32) -> Option<u64> {
        find(msr).and_then(|(place, _)| self.written[place].get())
    }

    /// A write; nothing if it is #GP.
    pub fn write(&self, msr: u32, value: u64) -> Option<()> {
        let (place, kind) = find(msr)?;
        if !self.exists(place, kind) || !self.is_valid(kind, value) {
            return None;
        }
        self.written[place].set(Some(value));
        Some(())
    }

    fn exists(&self, place: usize, kind: Kind) -> bool {
        const FIXED_RANGES: u64 = 1 << 8;
        match kind {
            Kind::Base | Kind::Mask => place < 2 * (self.capability & 0xff) as usize,
            Kind::Fixed => self.capability & FIXED_RANGES != 0,
            Kind::Default => self.capability != 0,
        }
    }

    /// Whether a register takes a value: reserved bits are 0, and types are known (SDM Table 13-8 "Memory Types That Can
    /// Be Encoded in MTRRs").
    fn is_valid(&self, kind: Kind, value: u64) -> bool {
        const BASE_RESERVED: u64 = 0xf00;
        const MASK_RESERVED: u64 = 0x7ff;
        const DEFAULT_RESERVED: u64 = !0xcff;
        let is_type = |value: u64| matches!(value & 0xff, 0 | 1 | 4..=6);
        let is_physical = value >> self.physical_bits == 0;
        match kind {
            Kind::Base => is_type(value) && value & BASE_RESERVED == 0 && is_physical,
            Kind::Mask => value & MASK_RESERVED == 0 && is_physical,
            Kind::Fixed => value.to_le_bytes().into_iter().all(|byte| is_type(byte.into())),
            Kind::Default => is_type(value) && value & DEFAULT_RESERVED == 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msr::{Held, held};
    use std::vec::Vec;

    /// Eight variable ranges, fixed ranges and write combining.
    const CAPABILITY: u64 = 0x508;

    #[test]
    fn each_of_them_is_held_and_no_other_msr_is_one() {
        let of_a_processor: Vec<u32> = (0x200..0x220).chain(FIXED).chain([IA32_MTRR_DEF_TYPE]).collect();
        for msr in 0..0x2000 {
            assert_eq!(Mtrrs::has(msr), of_a_processor.contains(&msr), "{msr:x}");
            assert!(!Mtrrs::has(msr) || held(msr) == Some(Held::Emulated), "{msr:x}");
        }
    }

    #[test]
    fn a_guest_reads_what_it_wrote_and_each_register_is_its_own() {
        let mtrrs = Mtrrs::new(CAPABILITY, 40);
        assert_eq!(mtrrs.read(0x200), None);
        let value = |msr: u32| match find(msr).unwrap().1 {
            Kind::Base => u64::from(msr) << 12 | 6,
            Kind::Mask => u64::from(msr) << 12 | 1 << 11,
            Kind::Fixed => 0x0606_0606_0606_0600 + u64::from(msr == 0x26f),
            Kind::Default => 0xc06,
        };
        let all: Vec<u32> = (0x200..0x210).chain(FIXED).chain([IA32_MTRR_DEF_TYPE]).collect();
        for &msr in &all {
            assert_eq!(mtrrs.write(msr, value(msr)), Some(()), "{msr:x}");
        }
        for &msr in &all {
            assert_eq!(mtrrs.read(msr), Some(value(msr)), "{msr:x}");
        }
    }

    #[test]
    fn what_a_processor_refuses_is_refused() {
        let mtrrs = Mtrrs::new(CAPABILITY, 40);
        let refused = [
            (0x200, 2),
            (0x200, 7),
            (0x200, 1 << 8 | 6),
            (0x200, 1 << 40),
            (0x201, 1 << 10),
            (0x201, 1 << 40),
            (0x210, 6),
            (0x250, 0x0606_0606_0206_0606),
            (0x2ff, 3),
            (0x2ff, 1 << 8),
            (0x2ff, 1 << 12),
            (0xfe, 0),
        ];
        for (msr, value) in refused {
            assert_eq!((mtrrs.write(msr, value), mtrrs.read(msr)), (None, None), "{msr:x} {value:x}");
        }
        let without = Mtrrs::new(0, 40);
        assert!([0x200, 0x250, 0x2ff].iter().all(|&msr| without.write(msr, 0).is_none()));
    }
}
