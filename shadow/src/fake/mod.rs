//! The fakes behind the seams of [`crate::hw`]: they enforce the SDM's rules and remember what was done to them.

mod machine;
mod memory;
mod tlb;

pub use machine::{
    FakeHardware, FakeMachine, FakeVmcss, FakeWatchedMemory, MEMORY_OPERAND, OPERAND, REGISTER_OPERANDS, VMXON_REGION,
    Variant, Words, hypervisor_registers,
};
pub use memory::{Ram, Tables};
pub use tlb::Tlb;

use crate::caps::{Policy, VmxCaps};
use crate::controls::{
    Allowed, EntryControls, ExitControls, Pin, Primary, Secondary, SecondaryExitControls, Tertiary, VmFunctions,
};
use crate::fields::{FIELD_COUNT, FieldId};
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldSet;
use crate::insn::SyncStale;
use crate::vmcs12::Vmcs12;
use ept::{Gpa, Hpa};
use std::cell::RefCell;
use std::vec;
use std::vec::Vec;

/// Capabilities like those of the processor that the tests run on: Bochs' corei7_skylake_x.
pub fn skylake_caps() -> VmxCaps {
    VmxCaps {
        basic: 0x00d8_1000_0000_0000 | u64::from(Policy::EVERYTHING.revision) ^ 1,
        pin: Allowed { must_be_1: 0x16, may_be_1: 0xff },
        primary: Allowed { must_be_1: 0x0400_6172, may_be_1: 0xfff9_fffe },
        secondary: Allowed { must_be_1: 0, may_be_1: 0x021f_7fff },
        tertiary: 0,
        secondary_exit: 0,
        exit: Allowed { must_be_1: 0x0003_6dfb, may_be_1: 0x01ff_ffff },
        entry: Allowed { must_be_1: 0x11fb, may_be_1: 0x3_ffff },
        misc: 0x2004_01e0,
        cr0_fixed0: 0x8000_0021,
        cr0_fixed1: 0xffff_ffff,
        cr4_fixed0: 0x2000,
        cr4_fixed1: 0x0077_2fff,
        ept_vpid: 0x0f01_0673_4141,
        vmfunc: 1,
        physical_bits: 40,
        linear_bits: 48,
        missing: FieldSet::EMPTY,
    }
}

/// A processor that allows every control that can be offered to a guest hypervisor. No real model is like it.
pub fn all_offered_caps() -> VmxCaps {
    let allow = |allowed: Allowed, offered: u32| Allowed { may_be_1: allowed.may_be_1 | offered, ..allowed };
    let caps = skylake_caps();
    VmxCaps {
        pin: allow(caps.pin, Pin::OFFERED.bits()),
        primary: allow(caps.primary, Primary::OFFERED.bits()),
        secondary: allow(caps.secondary, Secondary::OFFERED.bits()),
        tertiary: Tertiary::OFFERED.bits(),
        secondary_exit: SecondaryExitControls::OFFERED.bits(),
        exit: allow(caps.exit, ExitControls::OFFERED.bits()),
        entry: allow(caps.entry, EntryControls::OFFERED.bits()),
        vmfunc: VmFunctions::OFFERED.bits(),
        ..caps
    }
}

/// A VMCS that accepts only fields its processor has and keeps a journal of writes.
#[derive(Debug)]
pub struct FakeVmcs {
    words: [u64; FIELD_COUNT],
    fields: FieldSet,
    /// Every write, in order.
    pub journal: Vec<(FieldId, u64)>,
}

impl FakeVmcs {
    /// A VMCS with all fields 0.
    pub fn new(caps: &VmxCaps) -> Self {
        Self { words: [0; FIELD_COUNT], fields: caps.fields(), journal: Vec::new() }
    }

    /// Changes a field as the processor does: without an entry in the journal.
    pub fn poke(&mut self, id: FieldId, value: u64) {
        self.words[id.row()] = value & id.encoding().width().mask();
    }

    /// The fields that were written since the last call.
    pub fn written(&mut self) -> Vec<FieldId> {
        self.journal.drain(..).map(|(id, _)| id).collect()
    }
}

impl VmcsAccess for FakeVmcs {
    fn read_raw(&self, id: FieldId) -> u64 {
        assert!(self.fields.contains(id), "VMREAD of {id:?}: error 12");
        self.words[id.row()]
    }

    fn write_raw(&mut self, id: FieldId, value: u64) {
        assert!(self.fields.contains(id), "VMWRITE of {id:?}: error 12");
        self.poke(id, value);
        self.journal.push((id, value));
    }
}

/// Memory from address 0; translation adds [`FakeMemory::OFFSET`] so that an untranslated address is noticed.
#[derive(Debug)]
pub struct FakeMemory(RefCell<Vec<u8>>);

impl FakeMemory {
    /// The offset that translation adds.
    pub const OFFSET: u64 = 0x10_0000_0000;

    /// Memory of `bytes` bytes, all 0.
    pub fn new(bytes: usize) -> Self {
        Self(RefCell::new(vec![0; bytes]))
    }
}

impl GuestMemory for FakeMemory {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        let bytes = self.0.borrow();
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = usize::try_from(from.0).ok().and_then(|at| bytes.get(at.checked_add(i)?)).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        let mut bytes = self.0.borrow_mut();
        for (i, byte) in from.iter().enumerate() {
            if let Some(slot) = bytes.get_mut(to.0 as usize + i) {
                *slot = *byte;
            }
        }
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        compare_exchange_alone(self, at, seen, new)
    }

    fn translate(&self, address: Gpa) -> Hpa {
        Hpa(address.0 + Self::OFFSET)
    }
}

/// A compare-exchange of memory that nobody else accesses meanwhile.
pub fn compare_exchange_alone(memory: &impl GuestMemory, at: Gpa, seen: u64, new: u64) -> bool {
    let is_seen = memory.read_u64(at) == seen;
    if is_seen {
        memory.write_u64(at, new);
    }
    is_seen
}

/// For tests in which nothing is ever stale.
#[derive(Debug)]
pub struct NoStale;

impl SyncStale for NoStale {
    fn sync_stale(&mut self, _: &mut Vmcs12) {
        panic!("nothing is stale here");
    }

    fn sync_field(&mut self, _: &mut Vmcs12, id: FieldId) -> u64 {
        panic!("{id:?} is not stale here");
    }

    fn write_live(&mut self, id: FieldId, _: u64) {
        panic!("{id:?} is not live here");
    }
}
