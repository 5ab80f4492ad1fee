//! A nested guest: a VMCS that enters, changed by a case, run until its first exit.

mod enter;
mod exit;
mod state;

use shadow::Field;
use shadow::fields::FieldValue;

use crate::cpu;
use crate::fault::Outcome;
use crate::memory::{Page, VMCS};

pub use enter::{Registers, prepare_host};
pub use exit::{Exit, Verdict};

/// The nested guest of one case.
pub struct Vm {
    /// Its general registers.
    pub registers: Registers,
    launched: bool,
    entry_point: u64,
}

impl Vm {
    /// In 64-bit mode at `code`; see [`state`] for the rest.
    pub fn new(code: u64) -> Self {
        load_fresh(&VMCS);
        state::write(code);
        Self { registers: Registers::default(), launched: false, entry_point: code }
    }

    /// Changes a field. One that does not exist stays so: VM entry shows what it makes of that.
    pub fn set<T: FieldValue>(&mut self, field: Field<T>, value: T) -> &mut Self {
        let _ = cpu::vmwrite(field.id().encoding().0.into(), value.into_word());
        self
    }

    /// Reads a field; all ones where there is none.
    pub fn get<T: FieldValue>(&self, field: Field<T>) -> T {
        T::from_word(cpu::vmread(field.id().encoding().0.into()).unwrap_or(u64::MAX))
    }

    /// Sets bits of a field.
    pub fn or<T: FieldValue>(&mut self, field: Field<T>, bits: T) -> &mut Self {
        let value = self.get(field).into_word() | bits.into_word();
        self.set(field, T::from_word(value))
    }

    /// Clears bits of a field.
    pub fn clear<T: FieldValue>(&mut self, field: Field<T>, bits: T) -> &mut Self {
        let value = self.get(field).into_word() & !bits.into_word();
        self.set(field, T::from_word(value))
    }

    /// Enters; the verdict prints itself.
    pub fn run(&mut self) -> Verdict {
        let outcome = enter::enter(&mut self.registers, self.launched);
        if outcome == Outcome::Success {
            self.launched = true;
            Verdict::Exited(Exit::read(self.entry_point))
        } else {
            Verdict::NotEntered(outcome)
        }
    }
}

/// Makes `region` the current VMCS, clear and all zero.
pub fn load_fresh(region: &Page) {
    let _ = cpu::vmclear(region.address());
    region.fill(0);
    region.set(0, revision());
    let _ = cpu::vmclear(region.address());
    let _ = cpu::vmptrld(region.address());
}

/// The VMCS revision identifier.
pub fn revision() -> u64 {
    const IA32_VMX_BASIC: u32 = 0x480;
    const REVISION: u64 = 0x7fff_ffff;
    cpu::rdmsr(IA32_VMX_BASIC).unwrap_or(0) & REVISION
}
