//! From an encoding to a dense field number, and sets of fields.

use crate::encoding::{Encoding, Width};
use crate::fields::{Accessed, FIELD_COUNT, FIELD_ROWS, FieldId, Merge};

/// Encodings have 15 bits, the lowest of which is the access type.
const ENCODINGS: u32 = 0x8000;
const NO_FIELD: u8 = u8::MAX;

/// The fields of a set by their encodings. VMREAD and VMWRITE look their operand up in it. Large, and fast.
#[derive(Clone, Debug)]
pub struct FieldTable([u8; ENCODINGS as usize / 2]);

static ALL: FieldTable = FieldTable::of(&FieldSet::ALL);

impl FieldTable {
    /// The fields of `set`.
    ///
    /// # Panics
    ///
    /// Two fields of the table have one encoding.
    pub const fn of(set: &FieldSet) -> Self {
        let mut table = [NO_FIELD; ENCODINGS as usize / 2];
        let mut row = 0;
        while row < FIELD_COUNT {
            let id = FieldId(row as u8);
            let slot = id.encoding().0 as usize / 2;
            assert!(table[slot] == NO_FIELD, "two fields with one encoding");
            if set.contains(id) {
                table[slot] = id.0;
            }
            row += 1;
        }
        Self(table)
    }

    /// The field that an encoding names, whichever half it accesses. Only 64-bit fields have an upper half.
    #[inline(always)]
    pub fn find(&self, encoding: Encoding) -> Option<FieldId> {
        let id = *self.0.get(encoding.0 as usize / 2)?;
        let exists = id != NO_FIELD && (!encoding.is_high() || matches!(encoding.width(), Width::W64));
        exists.then_some(FieldId(id))
    }
}

/// The field that an encoding names, whichever half it accesses. `None` where the SDM defines none.
pub fn lookup(encoding: Encoding) -> Option<FieldId> {
    ALL.find(encoding)
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
    pub const fn is_empty(&self) -> bool {
        let (mut any, mut word) = (0, 0);
        while word < WORDS {
            any |= self.0[word];
            word += 1;
        }
        any == 0
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

/// The fields with a merge class.
pub const fn with_merge(class: Merge) -> FieldSet {
    let mut set = FieldSet::EMPTY;
    let mut id = 0;
    while id < FIELD_COUNT {
        if FIELD_ROWS[id].merge as u8 == class as u8 {
            set = set.with(FieldId(id as u8));
        }
        id += 1;
    }
    set
}

/// The fields that a guest hypervisor accesses on most exits.
pub const OFTEN_ACCESSED: FieldSet = {
    let mut set = FieldSet::EMPTY;
    let mut id = 0;
    while id < FIELD_COUNT {
        if matches!(FIELD_ROWS[id].accessed, Accessed::Often) {
            set = set.with(FieldId(id as u8));
        }
        id += 1;
    }
    set
};

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn every_field_is_found_by_its_encoding_and_nothing_else_is() {
        let mut found = 0;
        for raw in 0..0x2_0000 {
            let encoding = Encoding(raw);
            if let Some(id) = lookup(encoding) {
                assert_eq!(id.encoding(), encoding.full());
                assert!(!encoding.is_high() || encoding.width() == Width::W64, "{encoding:?}");
                found += usize::from(!encoding.is_high());
            }
        }
        assert_eq!(found, FIELD_COUNT);
        assert_eq!(lookup(Encoding(u32::MAX)), None);
    }

    #[test]
    fn a_table_has_the_fields_of_its_set_and_no_others() {
        let set = FieldSet::of(&[FieldId(0), FieldId(17), FieldId(FIELD_COUNT as u8 - 1)]);
        let table = FieldTable::of(&set);
        for id in FieldId::all() {
            assert_eq!(table.find(id.encoding()).is_some(), set.contains(id), "{id:?}");
        }
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
