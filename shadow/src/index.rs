//! From an encoding to a dense field number, and sets of fields.

use crate::encoding::Encoding;
use crate::fields::{FIELD_COUNT, FieldId};

/// Indexes per width and area that the lookup table has room for; the highest one of the SDM is below.
const INDEXES: usize = 64;
const NO_FIELD: u8 = u8::MAX;

const fn slot(encoding: Encoding) -> usize {
    ((encoding.width() as usize) << 2 | encoding.area() as usize) * INDEXES + encoding.index() as usize
}

static LOOKUP: [u8; 16 * INDEXES] = {
    let mut table = [NO_FIELD; 16 * INDEXES];
    let mut id = 0;
    while id < FIELD_COUNT {
        let encoding = FieldId(id as u8).encoding();
        assert!((encoding.index() as usize) < INDEXES);
        assert!(table[slot(encoding)] == NO_FIELD, "two fields with one encoding");
        table[slot(encoding)] = id as u8;
        id += 1;
    }
    table
};

/// The field that an encoding names, whichever half it accesses. `None` where the SDM defines none.
#[inline]
pub fn lookup(encoding: Encoding) -> Option<FieldId> {
    if encoding.reserved() != 0 || encoding.index() as usize >= INDEXES {
        return None;
    }
    let id = LOOKUP[slot(encoding)];
    (id != NO_FIELD).then_some(FieldId(id))
}

const WORDS: usize = FIELD_COUNT.div_ceil(64);

/// A set of fields, one bit each. Operations are a few instructions; iteration costs per member, not per field.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FieldSet([u64; WORDS]);

impl FieldSet {
    /// The empty set.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// Every field there is.
    pub const ALL: Self = {
        let mut set = Self::EMPTY;
        let mut id = 0;
        while id < FIELD_COUNT {
            set = set.with(FieldId(id as u8));
            id += 1;
        }
        set
    };

    /// This set and one more field.
    pub const fn with(mut self, id: FieldId) -> Self {
        self.0[id.0 as usize / 64] |= 1 << (id.0 % 64);
        self
    }

    /// The set of the listed fields.
    pub const fn of(ids: &[FieldId]) -> Self {
        let mut set = Self::EMPTY;
        let mut i = 0;
        while i < ids.len() {
            set = set.with(ids[i]);
            i += 1;
        }
        set
    }

    /// Adds a field.
    #[inline]
    pub fn insert(&mut self, id: FieldId) {
        *self = self.with(id);
    }

    /// Removes a field.
    #[inline]
    pub fn remove(&mut self, id: FieldId) {
        self.0[id.0 as usize / 64] &= !(1 << (id.0 % 64));
    }

    /// Whether a field is a member.
    #[inline]
    pub const fn contains(&self, id: FieldId) -> bool {
        self.0[id.0 as usize / 64] >> (id.0 % 64) & 1 != 0
    }

    /// Whether there is no member.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// Whether the two sets share a member.
    #[inline]
    pub fn intersects(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }

    /// Members of both sets.
    #[inline]
    pub const fn and(mut self, other: &Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] &= other.0[i];
            i += 1;
        }
        self
    }

    /// Members of either set.
    #[inline]
    pub const fn or(mut self, other: &Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] |= other.0[i];
            i += 1;
        }
        self
    }

    /// Members of this set that the other lacks.
    #[inline]
    pub const fn minus(mut self, other: &Self) -> Self {
        let mut i = 0;
        while i < WORDS {
            self.0[i] &= !other.0[i];
            i += 1;
        }
        self
    }

    /// The members, in table order.
    #[inline]
    pub const fn iter(&self) -> Members {
        Members { words: self.0, word: 0 }
    }
}

/// Iterator over the members of a [`FieldSet`].
#[derive(Clone, Debug)]
pub struct Members {
    words: [u64; WORDS],
    word: usize,
}

impl Iterator for Members {
    type Item = FieldId;

    #[inline(always)]
    fn next(&mut self) -> Option<FieldId> {
        while self.word < WORDS {
            let bits = self.words[self.word];
            if bits != 0 {
                self.words[self.word] = bits & (bits - 1);
                return Some(FieldId((self.word * 64) as u8 + bits.trailing_zeros() as u8));
            }
            self.word += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn every_field_is_found_by_its_encoding_and_nothing_else_is() {
        let mut found = 0;
        for raw in 0..0x8000 {
            if let Some(id) = lookup(Encoding(raw)) {
                assert_eq!(id.encoding(), Encoding(raw).full());
                found += usize::from(!Encoding(raw).is_high());
            }
        }
        assert_eq!(found, FIELD_COUNT);
        assert_eq!(lookup(Encoding(0x1_681e)), None);
    }

    #[test]
    fn a_set_iterates_over_its_members_in_order() {
        let ids = [FieldId(0), FieldId(63), FieldId(64), FieldId(FIELD_COUNT as u8 - 1)];
        let set = FieldSet::of(&ids);
        assert_eq!(set.iter().collect::<Vec<_>>(), ids);
        assert!(set.minus(&set).is_empty());
        assert_eq!(FieldSet::ALL.iter().count(), FIELD_COUNT);
    }
}
