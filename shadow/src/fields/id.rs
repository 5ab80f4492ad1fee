//! What a field's number leads to: its row, and its encodings, which are at hand without a look at the row.

use core::fmt;

use super::{FIELD_COUNT, FIELD_ROWS, FIELDS, FieldId, FieldInfo, Merge};
use crate::encoding::{Area, Encoding};

const ENCODINGS: [Encoding; FIELD_COUNT] = {
    let mut encodings = [Encoding(0); FIELD_COUNT];
    let mut id = 0;
    while id < FIELD_COUNT {
        encodings[id] = FIELD_ROWS[id].encoding;
        id += 1;
    }
    encodings
};

const ENCODINGS_BUT_HOST_STATE: [Encoding; FIELD_COUNT] = {
    let mut encodings = ENCODINGS;
    let mut id = 0;
    while id < FIELD_COUNT {
        if matches!(encodings[id].area(), Area::Host) && !matches!(FIELD_ROWS[id].merge, Merge::Passing) {
            // Bits that are reserved (SDM 25.11.2 "VMREAD, VMWRITE, and Encodings of VMCS Fields").
            encodings[id] = Encoding(u32::MAX);
        }
        id += 1;
    }
    encodings
};

impl FieldId {
    /// The field's row.
    pub fn info(self) -> &'static FieldInfo {
        &FIELDS[usize::from(self.0)]
    }

    /// Its encoding for full access.
    #[inline(always)]
    pub const fn encoding(self) -> Encoding {
        ENCODINGS[self.0 as usize]
    }

    /// The field's encoding; for a field of the host-state area, an encoding that no processor has. So VMWRITE by this
    /// encoding fails for such a field, without a test of each field before. The host-state fields of the class
    /// [`Merge::Passing`] have their ordinary encoding.
    #[inline(always)]
    pub const fn encoding_but_host_state(self) -> Encoding {
        ENCODINGS_BUT_HOST_STATE[self.0 as usize]
    }

    /// Its row number, for arrays indexed by field.
    #[inline(always)]
    pub const fn row(self) -> usize {
        self.0 as usize
    }

    /// All fields, in table order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..FIELD_COUNT as u8).map(Self)
    }
}

impl fmt::Debug for FieldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info().name)
    }
}
