//! The content of a VMCS, as values by field: what a program writes, before the processor sees it.

use shadow::encoding::Area;
use shadow::fields::{FIELD_COUNT, Field, FieldId, FieldValue};
use shadow::{FieldSet, VmxCaps};

use crate::cpu::vmread;

/// A value for each field.
#[derive(Clone)]
pub struct State([u64; FIELD_COUNT]);

impl State {
    /// The values that the current VMCS has now, of the fields that software writes.
    pub fn of_current_vmcs(fields: &FieldSet) -> Self {
        let mut values = [0; FIELD_COUNT];
        for id in written(fields) {
            values[id.row()] = vmread(id.encoding().0.into()).unwrap_or(0);
        }
        Self(values)
    }

    /// The value of a field.
    pub fn word(&self, id: FieldId) -> u64 {
        self.0[id.row()]
    }

    /// The value of a field.
    pub fn get<T: FieldValue>(&self, field: Field<T>) -> u64 {
        self.word(field.id())
    }

    /// Changes a field; the field's width limits the value.
    pub fn set_word(&mut self, id: FieldId, value: u64) {
        self.0[id.row()] = value & id.encoding().width().mask();
    }

    /// Changes a field.
    pub fn set<T: FieldValue>(&mut self, field: Field<T>, value: u64) -> &mut Self {
        self.set_word(field.id(), value);
        self
    }

    /// Sets bits.
    pub fn or<T: FieldValue>(&mut self, field: Field<T>, bits: u64) -> &mut Self {
        let value = self.get(field) | bits;
        self.set(field, value)
    }

    /// Clears bits.
    pub fn clear<T: FieldValue>(&mut self, field: Field<T>, bits: u64) -> &mut Self {
        let value = self.get(field) & !bits;
        self.set(field, value)
    }

    /// Whether a field has one of these bits.
    pub fn has<T: FieldValue>(&self, field: Field<T>, bits: u64) -> bool {
        self.get(field) & bits != 0
    }
}

/// The fields that software writes, of those that exist.
pub fn written(fields: &FieldSet) -> impl Iterator<Item = FieldId> {
    fields.iter().filter(|id| id.encoding().area() != Area::ExitInfo)
}

/// What this processor offers a guest hypervisor under l1hv: on both sides the same, and the programs consist of it.
pub fn capabilities() -> VmxCaps {
    use shadow::caps::{Policy, usable_physical_bits};
    // SAFETY: CPUID has the leaf where there is 64-bit mode.
    let widths = core::arch::x86_64::__cpuid(0x8000_0008).eax;
    let linear_bits = widths >> 8 & 0xff;
    let read = |msr| crate::cpu::rdmsr(msr).unwrap_or(0);
    VmxCaps::read(read, usable_physical_bits(widths & 0xff, 0), linear_bits).offered(&Policy::EVERYTHING)
}
