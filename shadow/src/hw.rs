//! The interface of the machine that this crate needs.

use crate::fields::{Field, FieldId, FieldValue};
use ept::{Gpa, Hpa};

/// The current VMCS of a logical processor.
///
/// Law: `read_raw` after `write_raw` of a field that the processor has returns the value, truncated to the field's
/// width. Accessing a field that the processor lacks is a bug of the caller, not an error to handle.
pub trait VmcsAccess {
    /// VMREAD.
    fn read_raw(&self, id: FieldId) -> u64;
    /// VMWRITE.
    fn write_raw(&mut self, id: FieldId, value: u64);

    /// VMWRITE of one word of a block. The index is a constant, so that VMWRITE can take the word directly from memory.
    #[inline(always)]
    fn write_from<const INDEX: usize, const LENGTH: usize>(&mut self, id: FieldId, words: &[u64; LENGTH]) {
        self.write_raw(id, words[INDEX]);
    }

    /// VMREAD with the field's own type.
    #[inline(always)]
    fn read<T: FieldValue>(&self, field: Field<T>) -> T {
        T::from_word(self.read_raw(field.id()))
    }

    /// VMWRITE with the field's own type.
    #[inline(always)]
    fn write<T: FieldValue>(&mut self, field: Field<T>, value: T) {
        self.write_raw(field.id(), value.into_word());
    }
}

/// The guest hypervisor's physical memory, as it sees it: the host's own pages are not in it.
///
/// Law: no method faults or panics, whatever the address; an address without memory reads as ones and ignores writes,
/// like a bus.
pub trait GuestMemory {
    /// Copies bytes out.
    fn read(&self, from: Gpa, to: &mut [u8]);
    /// Copies bytes in.
    fn write(&self, to: Gpa, from: &[u8]);
    /// Replaces eight aligned bytes in one access if they are `seen`. Returns whether they were.
    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool;
    /// Where EPT01 puts an address: an address in the host's memory comes out as that of a page of no consequence.
    fn translate(&self, address: Gpa) -> Hpa;

    /// Reads eight bytes in one access.
    fn read_u64(&self, from: Gpa) -> u64 {
        let mut bytes = [0; 8];
        self.read(from, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Reads four bytes in one access.
    fn read_u32(&self, from: Gpa) -> u32 {
        let mut bytes = [0; 4];
        self.read(from, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes eight bytes in one access.
    fn write_u64(&self, to: Gpa, value: u64) {
        self.write(to, &value.to_le_bytes());
    }

    /// Writes four bytes in one access.
    fn write_u32(&self, to: Gpa, value: u32) {
        self.write(to, &value.to_le_bytes());
    }
}
