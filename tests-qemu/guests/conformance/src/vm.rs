//! A nested guest: a VMCS that enters, changed by a case, run until its first exit.

mod enter;
mod exit;
mod state;

use shadow::Field;
use shadow::controls::{Pin, Secondary};
use shadow::fields::{
    FieldValue, GUEST_RFLAGS, GUEST_RIP, GUEST_RSP, HOST_CR3, HOST_CR4, PIN_CONTROLS, SECONDARY_CONTROLS,
    VM_INSTRUCTION_ERROR,
};

use crate::cpu;
use crate::fault::Outcome;
use crate::memory::{Page, VMCS, guest_stack};

pub use enter::{CR4, CR4_LA57_BIT, CR4_LASS_BIT, Registers, enter, prepare_host};
pub use exit::{Exit, Verdict};

/// The nested guest of one case.
pub struct Vm {
    /// Its general registers.
    pub registers: Registers,
    launched: bool,
    entry_point: u64,
}

impl Vm {
    /// A nested guest in 64-bit mode at `code`; see [`state`] for the rest of its state.
    pub fn new(code: u64) -> Self {
        Self::at(&VMCS, code)
    }

    /// As [`new`](Self::new), in another VMCS region.
    pub fn at(region: &Page, code: u64) -> Self {
        load_fresh(region);
        state::write(code);
        Self { registers: Registers::default(), launched: false, entry_point: code }
    }

    /// As [`new`](Self::new), without VPID: each entry and each exit drop translations.
    pub fn without_vpid(code: u64) -> Self {
        let mut vm = Self::new(code);
        vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VPID);
        vm
    }

    /// As [`new`](Self::new), with NMIs that neither exit nor are virtual.
    pub fn with_physical_nmis(code: u64) -> Self {
        let mut vm = Self::new(code);
        vm.physical_nmis();
        vm
    }

    /// A nested guest in a VMCS that another processor has built and cleared, with this processor's host state.
    pub fn moved_here(region: &Page, registers: Registers) -> Self {
        let _ = cpu::vmptrld(region.address());
        state::host();
        Self { registers, launched: false, entry_point: 0 }
    }

    /// Changes a field. A field that does not exist is ignored: the result of the VM entry counts.
    pub fn set<T: FieldValue>(&mut self, field: Field<T>, value: T) -> &mut Self {
        let _ = cpu::vmwrite(field.id().encoding().0.into(), value.into_word());
        self
    }

    /// Reads a field; all ones if the field does not exist.
    pub fn get<T: FieldValue>(&self, field: Field<T>) -> T {
        T::from_word(cpu::vmread(field.id().encoding().0.into()).unwrap_or(u64::MAX))
    }

    /// NMIs neither exit nor are virtual.
    pub fn physical_nmis(&mut self) -> &mut Self {
        self.clear(PIN_CONTROLS, Pin::NMI_EXITING | Pin::VIRTUAL_NMIS)
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

    /// Enters. The verdict can be printed.
    pub fn run(&mut self) -> Verdict {
        self.run_and_observe(|_| ()).0
    }

    /// Makes the guest begin at `code` the next time.
    pub fn set_entry_point(&mut self, code: u64) {
        self.entry_point = code;
    }

    /// Enters again at the guest's first instruction.
    pub fn rerun(&mut self) -> Verdict {
        self.set(GUEST_RIP, self.entry_point).set(GUEST_RSP, guest_stack()).set(GUEST_RFLAGS, 2);
        self.run()
    }

    /// Notes that the VMCS is clear: the next entry launches it.
    pub fn cleared(&mut self) -> &mut Self {
        self.launched = false;
        self
    }

    /// Notes that the VMCS is launched: the next entry resumes it.
    pub fn launched(&mut self) -> &mut Self {
        self.launched = true;
        self
    }

    /// Enters without restoring the host's state afterwards: for many entries in a row with the image's own host state.
    pub fn run_again(&mut self) -> Verdict {
        match enter(&mut self.registers, self.launched) {
            Outcome::Success => {
                let exit = Exit::read(self.entry_point);
                self.launched |= !exit.is_entry_failure();
                Verdict::Exited(exit)
            }
            outcome => Verdict::NotEntered(outcome),
        }
    }

    /// Enters with exits that load 5-level paging and this CR3, does `work` in that mode, and returns by the next exit,
    /// which loads 4-level paging.
    pub fn with_five_levels(&mut self, cr3: u64, work: impl FnOnce()) -> (Verdict, Verdict) {
        const LA57: u64 = 1 << CR4_LA57_BIT;
        self.or(HOST_CR4, LA57).set(HOST_CR3, cr3);
        let entered = self.run_again();
        if let Verdict::NotEntered(_) = entered {
            return (entered, Verdict::NotEntered(Outcome::Success));
        }
        work();
        state::host();
        self.set(GUEST_RIP, self.entry_point);
        let returned = self.run_again();
        assert!(matches!(returned, Verdict::Exited(_)), "no way back from 5-level paging");
        prepare_host();
        (entered, returned)
    }

    /// Enters, and calls `observe` after the exit, before the host's state is restored.
    pub fn run_and_observe<T>(&mut self, observe: impl FnOnce(&Registers) -> T) -> (Verdict, T) {
        // The error numbers of failed preparations do not count.
        let _ = cpu::vmwrite(VM_INSTRUCTION_ERROR.id().encoding().0.into(), 0);
        let outcome = enter(&mut self.registers, self.launched);
        let observed = observe(&self.registers);
        if outcome != Outcome::Success {
            return (Verdict::NotEntered(outcome), observed);
        }
        prepare_host();
        let exit = Exit::read(self.entry_point);
        self.launched |= !exit.is_entry_failure();
        (Verdict::Exited(exit), observed)
    }
}

/// Makes `region` the current VMCS, clear and with all fields 0.
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
