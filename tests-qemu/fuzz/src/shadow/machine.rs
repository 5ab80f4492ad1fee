//! A processor and memory, as far as the targets need them. They are quicker than `shadow::fake`: no allocation, and no
//! journal.

use std::cell::RefCell;
use std::sync::LazyLock;

use ept::{Gpa, Hpa};
use shadow::caps::Policy;
use shadow::fake::{all_offered_caps, compare_exchange_alone, skylake_caps};
use shadow::fields::{FIELD_COUNT, FieldId};
use shadow::hw::{GuestMemory, VmcsAccess};
use shadow::{FieldSet, VmxCaps};

/// A processor, and what a guest hypervisor on it is offered.
#[derive(Debug)]
pub struct Processor {
    pub caps: VmxCaps,
    pub fields: FieldSet,
    pub offered: VmxCaps,
    pub offered_fields: FieldSet,
}

/// Bochs' model Skylake-X, and one that allows every control that can be offered.
pub static PROCESSORS: LazyLock<[Processor; 2]> = LazyLock::new(|| {
    [skylake_caps(), all_offered_caps()].map(|caps| {
        let offered = caps.offered(&Policy::EVERYTHING);
        Processor { fields: caps.fields(), offered_fields: offered.fields(), caps, offered }
    })
});

/// A VMCS that has only the fields of its processor.
#[derive(Clone, Debug)]
pub struct Vmcs {
    words: [u64; FIELD_COUNT],
    fields: FieldSet,
    /// The fields that were written.
    pub written: FieldSet,
}

impl Vmcs {
    pub const fn new(processor: &Processor) -> Self {
        Self { words: [0; FIELD_COUNT], fields: processor.fields, written: FieldSet::EMPTY }
    }

    /// Changes a field as the processor does.
    pub fn poke(&mut self, id: FieldId, word: u64) {
        self.words[id.row()] = word & id.encoding().width().mask();
    }
}

impl VmcsAccess for Vmcs {
    fn read_raw(&self, id: FieldId) -> u64 {
        assert!(self.fields.contains(id), "VMREAD of {id:?}: error 12");
        self.words[id.row()]
    }

    fn write_raw(&mut self, id: FieldId, value: u64) {
        assert!(self.fields.contains(id), "VMWRITE of {id:?}: error 12");
        assert!(value & !id.encoding().width().mask() == 0, "{id:?} is cut: {value:#x}");
        self.poke(id, value);
        self.written.insert(id);
    }
}

const RAM_BYTES: usize = 0x4000;

/// The guest hypervisor's memory: 16 KiB from address 0.
#[derive(Clone, Debug)]
pub struct Ram(RefCell<[u8; RAM_BYTES]>);

impl Ram {
    /// Where the host has it.
    const PLACE: u64 = 1 << 36;
    /// A page of no consequence, in place of all that the guest hypervisor does not have.
    const NOWHERE: u64 = 3 << 36;

    /// All zeros.
    pub const fn new() -> Self {
        Self(RefCell::new([0; RAM_BYTES]))
    }

    /// Its content.
    pub fn bytes(&mut self) -> &mut [u8; RAM_BYTES] {
        self.0.get_mut()
    }
}

impl GuestMemory for Ram {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        let bytes = self.0.borrow();
        let there = &bytes[(from.0 as usize).min(RAM_BYTES)..];
        let (inside, beyond) = to.split_at_mut(there.len().min(to.len()));
        inside.copy_from_slice(&there[..inside.len()]);
        beyond.fill(0xff);
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        let mut bytes = self.0.borrow_mut();
        let there = &mut bytes[(to.0 as usize).min(RAM_BYTES)..];
        let count = there.len().min(from.len());
        there[..count].copy_from_slice(&from[..count]);
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        compare_exchange_alone(self, at, seen, new)
    }

    fn translate(&self, address: Gpa) -> Hpa {
        Hpa(if address.0 < RAM_BYTES as u64 { address.0 + Self::PLACE } else { Self::NOWHERE | address.0 & 0xfff })
    }
}
