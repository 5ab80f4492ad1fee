//! A model of a processor in VMX non-root operation: what an entry loads from a VMCS, what a guest does, what an exit
//! saves (SDM 27, 28).
//!
//! The bare machine of [`super::bare`] runs VMCS12s on it, the machine of [`super::stacked`] vmcs02.

use std::vec::Vec;

use crate::controls::{EntryControls, Exists, ExitControls, Pin, Primary, Secondary};
use crate::encoding::Area;
use crate::event::{BLOCKING_BY_NMI, NMI_INTERRUPTION};
use crate::exit::entry_failure_qualification::LINK_POINTER;
use crate::exit::{ExitReason, InterruptionInfo, interruption_type};
use crate::fake::{FakeVmcs, Ram, Words};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldSet;
use crate::merge::MsrEntry;
use crate::msr::IA32_FS_BASE;
use crate::outcome::InsnError;
use crate::registers::{CR0_PG, EFER_LMA, EFER_LME};
use ept::Gpa;

/// What a guest does next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Changes a register.
    Set(FieldId, u64),
    /// Reads or writes the first word of a page.
    Touch { page: u64, write: Option<u64> },
    /// Executes RDMSR.
    Rdmsr(u32),
    /// Exits, whatever the controls.
    Exit(ExitReason, u64),
    /// Causes an exception that exits.
    Exception(u8),
    /// An NMI arrives.
    Nmi,
    /// The host interrupts the guest, if there is a host.
    Kick,
}

/// A guest from a VM entry by its hypervisor to the next exit that the hypervisor gets.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The guest's steps, followed by HLT.
    pub steps: Vec<Step>,
    /// The page that the delivery of an event writes to.
    pub stack: Option<u64>,
    /// Whether an NMI has arrived when the guest is entered.
    pub nmi: bool,
}

impl Guest {
    /// Whether the guest's NMI comes before the entry: not if the first instruction may cause an exit to the host.
    pub fn nmi_comes_before_entry(&self) -> bool {
        self.nmi && !matches!(self.steps.first(), Some(Step::Touch { .. }))
    }
}

/// An observation from outside the VMCS.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    /// The hypervisor's instruction ended with this RFLAGS.
    Flags(u64),
    /// The hypervisor's instruction faulted.
    Fault,
    /// VMREAD returned this.
    Value(FieldId, u64),
    /// The guest began with these registers.
    Entered(Vec<(FieldId, u64)>),
    /// The guest got an event: information, error code, instruction length.
    Event(u32, u32, u32),
    /// The guest reached this address at a page.
    Touched(u64, u64),
    /// The guest read this word at the page.
    Word(u64),
    /// The guest read this from an MSR.
    Msr(u32, u64),
    /// An entry or an exit loaded an MSR.
    LoadedMsr(u32, u64),
    /// The hypervisor got an NMI.
    HypervisorNmi,
    /// The hypervisor runs again, with these registers.
    Left(Vec<(FieldId, u64)>),
}

/// Why an address cannot be accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Untranslated {
    Violation(u64),
    Misconfiguration,
}

/// The surroundings in which a guest runs.
pub trait Surroundings {
    /// Whether a host can make the guest exit, and gets its NMIs first.
    const HAS_HOST: bool;
    /// The physical address of a page.
    fn translate(&mut self, vmcs: &FakeVmcs, page: u64, write: bool) -> Result<u64, Untranslated>;
    /// The memory at the physical addresses.
    fn ram(&self) -> &Ram;
    /// Whether VM entry accepts the link pointer.
    fn has_valid_link(&self, vmcs: &FakeVmcs) -> bool;
    /// Whether RDMSR exits by the MSR bitmap.
    fn intercepts_rdmsr(&self, vmcs: &FakeVmcs, msr: u32) -> bool;
    /// The value that RDMSR returns.
    fn read_msr(&self, msr: u32) -> u64;
    /// The VM-entry MSR-load area.
    fn entry_load(&self, vmcs: &FakeVmcs) -> Vec<MsrEntry>;
    /// Loads an MSR.
    fn load_msr(&mut self, msr: u32, value: u64);
}

/// How a run of a guest ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// VMfail.
    Refused(InsnError),
    /// The VMCS has an exit, or an entry failure.
    Exited,
    /// The host has made the guest exit, and perhaps an NMI arrived when the guest had exited.
    Interrupted { nmi: bool },
}

/// The registers that entries load and exits save.
pub fn registers(fields: &FieldSet) -> impl Iterator<Item = FieldId> {
    const CONDITIONAL: FieldSet =
        FieldSet::of(&[GUEST_PAT.id(), GUEST_EFER.id(), GUEST_INTERRUPT_STATUS.id(), PML_INDEX.id()]);
    const NONE: FieldSet = FieldSet::of(&[VMCS_LINK_POINTER.id(), PREEMPTION_TIMER_VALUE.id()]);
    let fields = *fields;
    FieldId::all().filter(move |&id| {
        let always = matches!(FIELDS[id.row()].exists, Exists::Always) || CONDITIONAL.contains(id);
        id.encoding().area() == Area::Guest && always && fields.contains(id) && !NONE.contains(id)
    })
}

/// A guest that runs.
pub struct Run<'a, S> {
    pub vmcs: &'a mut FakeVmcs,
    /// The registers before the entry.
    pub host: &'a Words,
    pub guest: &'a mut Guest,
    pub surroundings: &'a mut S,
    pub seen: &'a mut Vec<Seen>,
    /// Whether the hypervisor has asked for this entry. Then the guest's first registers are observed.
    pub is_first: bool,
    pub fields: FieldSet,
    /// The registers of the guest.
    pub words: &'a mut Words,
    /// How far the VMX-preemption timer has counted.
    pub ticks: u64,
}

impl<S: Surroundings> Run<'_, S> {
    fn get<T: FieldValue>(&self, field: Field<T>) -> T {
        self.vmcs.read(field)
    }

    fn entry(&self) -> EntryControls {
        self.get(ENTRY_CONTROLS)
    }

    fn exit_controls(&self) -> ExitControls {
        self.get(EXIT_CONTROLS)
    }

    fn has_pin(&self, control: Pin) -> bool {
        self.get(PIN_CONTROLS).contains(control)
    }

    /// Enters, runs, exits.
    pub fn run(mut self) -> Ended {
        let injected = InterruptionInfo(self.get(ENTRY_INTERRUPTION_INFO));
        let bad_length = injected.needs_instruction_length() && self.get(ENTRY_INSTRUCTION_LENGTH) == 0;
        if injected.is_valid() && (injected.kind() == interruption_type::RESERVED || bad_length) {
            self.vmcs.poke(VM_INSTRUCTION_ERROR.id(), InsnError::ENTRY_INVALID_CONTROL.0.into());
            return Ended::Refused(InsnError::ENTRY_INVALID_CONTROL);
        }
        if self.get(GUEST_RFLAGS) & 2 == 0 {
            return self.fail_late(ExitReason::ENTRY_FAILURE_GUEST_STATE, 0);
        }
        if !self.surroundings.has_valid_link(self.vmcs) {
            return self.fail_late(ExitReason::ENTRY_FAILURE_GUEST_STATE, LINK_POINTER);
        }
        self.load_registers();
        for (number, entry) in (1..).zip(self.surroundings.entry_load(self.vmcs)) {
            if entry.index == IA32_FS_BASE || entry.reserved != 0 {
                return self.fail_late(ExitReason::ENTRY_FAILURE_MSR_LOADING, number);
            }
            self.surroundings.load_msr(entry.index, entry.value);
            self.seen.push(Seen::LoadedMsr(entry.index, entry.value));
        }
        if self.is_first {
            let mut words: Vec<_> = registers(&self.fields).map(|id| (id, self.words[id.row()])).collect();
            if self.has_pin(Pin::ACTIVATE_PREEMPTION_TIMER) {
                words.push((PREEMPTION_TIMER_VALUE.id(), self.get(PREEMPTION_TIMER_VALUE).into()));
            }
            self.seen.push(Seen::Entered(words));
        }
        if injected.is_valid()
            && let Err(why) = self.deliver(injected)
        {
            return self.exit_in_delivery(why, injected);
        }
        let mut is_trapped = injected.is_valid();
        let mut is_late = !injected.is_valid() && self.guest.nmi_comes_before_entry();
        loop {
            if is_trapped && self.get(PRIMARY_CONTROLS).contains(Primary::MONITOR_TRAP_FLAG) {
                return self.exit(ExitReason::MONITOR_TRAP_FLAG, 0);
            }
            is_trapped = true;
            // The moment of the NMI is arbitrary: it comes after the first instruction, if the host executes that
            // first.
            let is_late = core::mem::take(&mut is_late);
            if self.guest.nmi && !self.blocks_nmis() && !is_late {
                self.guest.nmi = false;
                if S::HAS_HOST {
                    self.record(ExitReason::INIT, 0, InterruptionInfo(0), None);
                    return Ended::Interrupted { nmi: true };
                } else if self.has_pin(Pin::NMI_EXITING) {
                    return self.exit_by_event(NMI_INTERRUPTION);
                } else if let Err(why) = self.deliver(NMI_INTERRUPTION) {
                    return self.exit_in_delivery(why, NMI_INTERRUPTION);
                }
            }
            let Some(step) = self.guest.steps.first().cloned() else { return self.exit(ExitReason::HLT, 0) };
            if let Step::Touch { page, write } = step {
                match self.surroundings.translate(self.vmcs, page, write.is_some()) {
                    Err(why) => return self.exit_by_ept(why, page, None),
                    Ok(address) => self.touch(page, address, write),
                }
            }
            self.guest.steps.remove(0);
            self.ticks += u64::from(!matches!(step, Step::Kick));
            match step {
                Step::Touch { .. } => (),
                Step::Set(id, value) => self.words[id.row()] = value & id.encoding().width().mask(),
                Step::Rdmsr(msr) if self.surroundings.intercepts_rdmsr(self.vmcs, msr) => {
                    return self.exit(ExitReason::RDMSR, msr.into());
                }
                Step::Rdmsr(msr) => {
                    self.seen.push(Seen::Msr(msr, self.surroundings.read_msr(msr)));
                    self.words[GUEST_RIP.id().row()] += 2;
                }
                Step::Exit(reason, qualification) => return self.exit(reason, qualification),
                Step::Exception(vector) => {
                    let info = InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, vector);
                    return self.exit_by_event(info);
                }
                Step::Nmi => self.guest.nmi = true,
                Step::Kick if S::HAS_HOST => {
                    self.record(ExitReason::INIT, 0, InterruptionInfo(0), None);
                    return Ended::Interrupted { nmi: false };
                }
                Step::Kick => (),
            }
        }
    }

    /// Whether NMIs are blocked. With virtual NMIs the interruptibility state is about virtual NMIs only.
    fn blocks_nmis(&self) -> bool {
        let blocked = self.words[GUEST_INTERRUPTIBILITY.id().row()] & u64::from(BLOCKING_BY_NMI) != 0;
        blocked && !self.has_pin(Pin::VIRTUAL_NMIS)
    }

    fn touch(&mut self, page: u64, address: u64, write: Option<u64>) {
        self.seen.push(Seen::Touched(page, address));
        match write {
            Some(word) => self.surroundings.ram().write_u64(Gpa(address), word),
            None => self.seen.push(Seen::Word(self.surroundings.ram().read_u64(Gpa(address)))),
        }
    }

    fn load_registers(&mut self) {
        for id in registers(&self.fields) {
            self.words[id.row()] = self.vmcs.read_raw(id);
        }
        let entry = self.entry();
        let mut keep = |field: Field<u64>| self.words[field.id().row()] = self.host[field.id().row()];
        if !entry.contains(EntryControls::LOAD_DEBUG_CONTROLS) {
            keep(GUEST_DEBUGCTL);
            keep(GUEST_DR7);
        }
        if !entry.contains(EntryControls::LOAD_PAT) {
            keep(GUEST_PAT);
        }
        if !entry.contains(EntryControls::LOAD_EFER) {
            keep(GUEST_EFER);
            let paged = self.words[GUEST_CR0.id().row()] & CR0_PG != 0;
            let follow = if paged { EFER_LMA | EFER_LME } else { EFER_LMA };
            let efer = &mut self.words[GUEST_EFER.id().row()];
            *efer = if entry.contains(EntryControls::IA32E_MODE_GUEST) { *efer | follow } else { *efer & !follow };
        }
    }

    /// Delivers an event, which writes to the guest's stack. An NMI blocks further NMIs before the write.
    fn deliver(&mut self, info: InterruptionInfo) -> Result<(), Untranslated> {
        if info.is_nmi() {
            self.words[GUEST_INTERRUPTIBILITY.id().row()] |= u64::from(BLOCKING_BY_NMI);
        }
        if let Some(page) = self.guest.stack {
            self.surroundings.translate(self.vmcs, page, true)?;
        }
        let code = if info.has_error_code() { self.get(ENTRY_EXCEPTION_ERROR_CODE) } else { 0 };
        let length = if info.needs_instruction_length() { self.get(ENTRY_INSTRUCTION_LENGTH) } else { 0 };
        self.seen.push(Seen::Event(info.0, code, length));
        Ok(())
    }

    fn exit_in_delivery(self, why: Untranslated, info: InterruptionInfo) -> Ended {
        let page = self.guest.stack.unwrap_or_default();
        self.exit_by_ept(why, page, Some(info))
    }

    /// An entry failure of the late kind saves nothing.
    fn fail_late(self, reason: ExitReason, qualification: u64) -> Ended {
        self.vmcs.poke(EXIT_REASON.id(), reason.of_failed_entry().0.into());
        self.vmcs.poke(EXIT_QUALIFICATION.id(), qualification);
        Ended::Exited
    }

    fn exit(mut self, reason: ExitReason, qualification: u64) -> Ended {
        self.record(reason, qualification, InterruptionInfo(0), None);
        Ended::Exited
    }

    fn exit_by_event(mut self, info: InterruptionInfo) -> Ended {
        self.record(ExitReason::EXCEPTION_OR_NMI, 0, info, None);
        Ended::Exited
    }

    fn exit_by_ept(mut self, why: Untranslated, page: u64, delivering: Option<InterruptionInfo>) -> Ended {
        match why {
            Untranslated::Violation(qualification) => {
                self.record(ExitReason::EPT_VIOLATION, qualification, InterruptionInfo(0), delivering);
            }
            Untranslated::Misconfiguration => {
                self.record(ExitReason::EPT_MISCONFIGURATION, 0, InterruptionInfo(0), delivering);
            }
        }
        self.vmcs.poke(GUEST_PHYSICAL_ADDRESS.id(), page << 12);
        self.vmcs.poke(GUEST_LINEAR_ADDRESS.id(), page << 12);
        Ended::Exited
    }

    fn record(
        &mut self,
        reason: ExitReason,
        qualification: u64,
        info: InterruptionInfo,
        delivering: Option<InterruptionInfo>,
    ) {
        let length = match delivering {
            Some(info) if info.needs_instruction_length() => self.get(ENTRY_INSTRUCTION_LENGTH),
            _ => 2,
        };
        let code = self.get(ENTRY_EXCEPTION_ERROR_CODE);
        self.save();
        for (field, value) in [
            (EXIT_REASON, reason.0),
            (EXIT_INTERRUPTION_INFO, info.0),
            (EXIT_INTERRUPTION_ERROR_CODE, 0),
            (IDT_VECTORING_INFO, delivering.map_or(0, |info| info.0)),
            (IDT_VECTORING_ERROR_CODE, code),
            (EXIT_INSTRUCTION_LENGTH, length),
        ] {
            self.vmcs.poke(field.id(), value.into());
        }
        self.vmcs.poke(EXIT_QUALIFICATION.id(), qualification);
    }

    /// Saves and clears the fields that every exit saves and clears.
    pub fn save(&mut self) {
        let exit = self.exit_controls();
        for id in registers(&self.fields) {
            let saved = match id {
                _ if id == GUEST_DEBUGCTL.id() || id == GUEST_DR7.id() => {
                    exit.contains(ExitControls::SAVE_DEBUG_CONTROLS)
                }
                _ if id == GUEST_PAT.id() => exit.contains(ExitControls::SAVE_PAT),
                _ if id == GUEST_EFER.id() => exit.contains(ExitControls::SAVE_EFER),
                _ => true,
            };
            if saved {
                self.vmcs.poke(id, self.words[id.row()]);
            }
        }
        if self.has_pin(Pin::ACTIVATE_PREEMPTION_TIMER) && exit.contains(ExitControls::SAVE_PREEMPTION_TIMER) {
            let value = u64::from(self.get(PREEMPTION_TIMER_VALUE)).saturating_sub(self.ticks);
            self.vmcs.poke(PREEMPTION_TIMER_VALUE.id(), value);
        }
        let lma = self.words[GUEST_EFER.id().row()] & EFER_LMA != 0;
        let mut entry = self.entry();
        entry.set(EntryControls::IA32E_MODE_GUEST, lma);
        self.vmcs.poke(ENTRY_CONTROLS.id(), entry.bits().into());
        let injected = InterruptionInfo(self.get(ENTRY_INTERRUPTION_INFO));
        self.vmcs.poke(ENTRY_INTERRUPTION_INFO.id(), injected.invalidated().0.into());
    }
}

/// Whether a VMCS has a secondary control.
pub fn has_secondary(vmcs: &FakeVmcs, control: Secondary) -> bool {
    vmcs.read(PRIMARY_CONTROLS).contains(Primary::ACTIVATE_SECONDARY) && vmcs.read(SECONDARY_CONTROLS).contains(control)
}
