//! The machine without a host: the processor uses the hypervisor's own VMCSs.

use std::collections::BTreeMap;
use std::vec::Vec;

use ept::Gpa;

use super::processor::*;
use super::program::{Op, VMCS_REGIONS};
use crate::check::{self, HostMode};
use crate::controls::{ExitControls, Pin, Primary, Secondary};
use crate::event::BLOCKING_BY_NMI;
use crate::exit::{ExitReason, InterruptionInfo};
use crate::fake::{FakeVmcs, Ram, Tlb, Words};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldSet;
use crate::merge::MsrEntry;
use crate::msr::*;
use crate::outcome::{InsnError, rflags_fail_invalid, rflags_fail_valid, rflags_succeed};
use crate::registers::{CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, access_rights};
use crate::{Vmcs12, VmxCaps};

pub struct Bare {
    caps: VmxCaps,
    /// Each VMCS, whether it is launched, and which of its fields are undefined.
    vmcss: Vec<(FakeVmcs, bool, FieldSet)>,
    current: Option<usize>,
    /// The hypervisor's registers.
    pub words: Words,
    outside: Outside,
    pub seen: Vec<Seen>,
}

struct Outside {
    ram: Ram,
    tlb: Tlb,
    msrs: BTreeMap<u32, u64>,
    link_is_valid: bool,
}

impl Bare {
    pub fn new(caps: &VmxCaps, words: Words, ram: Ram) -> Self {
        Self {
            caps: caps.clone(),
            vmcss: VMCS_REGIONS.iter().map(|_| (FakeVmcs::new(caps), false, FieldSet::EMPTY)).collect(),
            current: None,
            words,
            outside: Outside { ram, tlb: Tlb::default(), msrs: BTreeMap::new(), link_is_valid: true },
            seen: Vec::new(),
        }
    }

    pub fn memory(&self) -> Vec<u8> {
        self.outside.ram.bytes()
    }

    pub fn execute(&mut self, op: &Op) {
        match op {
            Op::Write(id, value) => self.instruction(|bare| {
                let current = bare.current.ok_or(None)?;
                let (vmcs, _, undefined_fields) = &mut bare.vmcss[current];
                vmcs.poke(*id, *value);
                undefined_fields.remove(*id);
                Ok(())
            }),
            Op::Read(id) => self.instruction(|bare| {
                let value = bare.current_vmcs()?.read_raw(*id);
                bare.seen.push(Seen::Value(*id, value));
                Ok(())
            }),
            Op::Load(number) => self.instruction(|bare| {
                bare.current = Some(*number);
                Ok(())
            }),
            Op::Clear(number) => self.instruction(|bare| {
                bare.vmcss[*number].1 = false;
                bare.current = bare.current.filter(|current| current != number);
                Ok(())
            }),
            Op::Enter(resume, guest) => {
                let mut guest = guest.clone();
                self.enter(*resume, &mut guest);
                let blocked = self.words[GUEST_INTERRUPTIBILITY.id().row()] as u32 & BLOCKING_BY_NMI != 0;
                if guest.nmi && !blocked {
                    self.seen.push(Seen::HypervisorNmi);
                }
            }
            Op::Store(address, word) => self.outside.ram.write_u64(Gpa(*address), *word),
            Op::Invept(eptp) => self.instruction(|bare| {
                bare.outside.tlb.drop(*eptp);
                Ok(())
            }),
            Op::Change(id, value) => self.words[id.row()] = *value,
            Op::HostFlush => (),
        }
    }

    fn current_vmcs(&mut self) -> Result<&mut FakeVmcs, Option<InsnError>> {
        let current = self.current.ok_or(None)?;
        Ok(&mut self.vmcss[current].0)
    }

    /// An instruction that ends in VMsucceed, VMfailInvalid or VMfailValid (SDM 31.2).
    fn instruction(&mut self, act: impl FnOnce(&mut Self) -> Result<(), Option<InsnError>>) {
        let outcome = act(self);
        self.end(outcome);
    }

    fn end(&mut self, outcome: Result<(), Option<InsnError>>) {
        let rflags = self.words[GUEST_RFLAGS.id().row()];
        let rflags = match outcome {
            Ok(()) => rflags_succeed(rflags),
            Err(None) => rflags_fail_invalid(rflags),
            Err(Some(error)) => {
                if let Ok(vmcs) = self.current_vmcs() {
                    vmcs.poke(VM_INSTRUCTION_ERROR.id(), error.0.into());
                }
                rflags_fail_valid(rflags)
            }
        };
        self.words[GUEST_RFLAGS.id().row()] = rflags;
        self.words[GUEST_RIP.id().row()] += 3;
        self.seen.push(Seen::Flags(rflags));
    }

    fn enter(&mut self, resume: bool, guest: &mut Guest) {
        let Some(current) = self.current else { return self.end(Err(None)) };
        let (vmcs, launched, undefined_fields) = &mut self.vmcss[current];
        let wrong_state = match (resume, *launched) {
            (true, false) => Some(InsnError::VMRESUME_NON_LAUNCHED),
            (false, true) => Some(InsnError::VMLAUNCH_NON_CLEAR),
            _ => None,
        };
        if let Some(error) = wrong_state {
            return self.end(Err(Some(error)));
        }
        let mut checked = Vmcs12::new(Gpa(VMCS_REGIONS[current]), &self.caps);
        self.caps.fields().iter().for_each(|id| checked.set_word(id, vmcs.read_raw(id)));
        if check::controls(&checked, &self.caps, &self.outside.ram).is_err() {
            return self.end(Err(Some(InsnError::ENTRY_INVALID_CONTROL)));
        }
        if check::host_state(&checked, &self.caps, HostMode::Ia32e).is_err() {
            return self.end(Err(Some(InsnError::ENTRY_INVALID_HOST_STATE)));
        }
        let mut guest_words = self.words;
        self.outside.link_is_valid = check::guest_state(&checked, &self.caps, &self.outside.ram).is_ok();
        let run = Run {
            vmcs,
            host: &self.words,
            guest,
            surroundings: &mut self.outside,
            seen: &mut self.seen,
            is_first: true,
            fields: self.caps.fields(),
            words: &mut guest_words,
            ticks: 0,
        };
        let ended = run.run();
        if let Ended::Refused(error) = ended {
            return self.end(Err(Some(error)));
        }
        let failed = ExitReason(vmcs.read(EXIT_REASON)).is_entry_failure();
        if !failed {
            *launched = true;
            *undefined_fields = undefined(vmcs);
            self.outside.store_msrs(vmcs);
        }
        let vmcs = &self.vmcss[current].0;
        let left = if failed { self.words } else { guest_words };
        load_host_state(&mut self.words, vmcs, &left, failed);
        self.outside.load_msrs(vmcs, &mut self.seen);
        self.seen.push(Seen::Left(visible(|id| self.words[id.row()])));
    }
}

/// Exit information that the last exit of a VMCS has left undefined.
fn undefined(vmcs: &FakeVmcs) -> FieldSet {
    let reason = ExitReason(vmcs.read(EXIT_REASON));
    let info = InterruptionInfo(vmcs.read(EXIT_INTERRUPTION_INFO));
    let vectoring = InterruptionInfo(vmcs.read(IDT_VECTORING_INFO));
    let mut fields = FieldSet::of(&[GUEST_LINEAR_ADDRESS.id(), EXIT_INSTRUCTION_INFO.id()]);
    let is_ept = matches!(reason, ExitReason::EPT_VIOLATION | ExitReason::EPT_MISCONFIGURATION);
    if !is_ept {
        fields.insert(GUEST_PHYSICAL_ADDRESS.id());
    }
    if !vectoring.has_error_code() {
        fields.insert(IDT_VECTORING_ERROR_CODE.id());
    }
    if !info.has_error_code() {
        fields.insert(EXIT_INTERRUPTION_ERROR_CODE.id());
    }
    let is_instruction = !is_ept && reason != ExitReason::EXCEPTION_OR_NMI && reason != ExitReason::EXTERNAL_INTERRUPT;
    if !is_instruction && !vectoring.needs_instruction_length() {
        fields.insert(EXIT_INSTRUCTION_LENGTH.id());
    }
    fields
}

impl Outside {
    fn area(&self, address: u64, count: u32) -> Vec<MsrEntry> {
        let entry = |number: u64| {
            let at = Gpa(address + number * 16);
            let (head, value) = (self.ram.read_u64(at), self.ram.read_u64(at + 8));
            MsrEntry { index: head as u32, reserved: (head >> 32) as u32, value }
        };
        (0..count.into()).map(entry).collect()
    }

    fn store_msrs(&mut self, vmcs: &FakeVmcs) {
        let address = vmcs.read(EXIT_MSR_STORE_ADDRESS);
        for (number, entry) in (0..).zip(self.area(address, vmcs.read(EXIT_MSR_STORE_COUNT))) {
            self.ram.write_u64(Gpa(address + number * 16 + 8), self.read_msr(entry.index));
        }
    }

    fn load_msrs(&mut self, vmcs: &FakeVmcs, seen: &mut Vec<Seen>) {
        for entry in self.area(vmcs.read(EXIT_MSR_LOAD_ADDRESS), vmcs.read(EXIT_MSR_LOAD_COUNT)) {
            self.load_msr(entry.index, entry.value);
            seen.push(Seen::LoadedMsr(entry.index, entry.value));
        }
    }

    fn walk(&self, eptp: u64, page: u64, write: bool) -> Result<u64, Untranslated> {
        const TRANSLATION: u64 = 0x180;
        let access = if write { 2 } else { 1 };
        let (mut table, mut rights, mut path) = (eptp & !0xfff, 7, Vec::new());
        for level in (1..=4).rev() {
            let at = Gpa(table + (page >> (9 * (level - 1)) & 0x1ff) * 8);
            let entry = self.ram.read_u64(at);
            if entry & 7 == 0 {
                return Err(Untranslated::Violation(access | TRANSLATION));
            }
            if entry & 3 == 2 {
                return Err(Untranslated::Misconfiguration);
            }
            rights &= entry;
            path.push((at, entry));
            table = entry & 0xff_ffff_f000;
        }
        if rights & access == 0 {
            return Err(Untranslated::Violation(access | (rights & 7) << 3 | TRANSLATION));
        }
        if eptp & 0x40 != 0 {
            for (level, (at, entry)) in (0..).zip(path.into_iter().rev()) {
                let dirty = if write && level == 0 { 1 << 9 } else { 0 };
                self.ram.write_u64(at, entry | 1 << 8 | dirty);
            }
        }
        Ok(table)
    }
}

impl Surroundings for Outside {
    const HAS_HOST: bool = false;

    fn translate(&mut self, vmcs: &FakeVmcs, page: u64, write: bool) -> Result<u64, Untranslated> {
        if !has_secondary(vmcs, Secondary::ENABLE_EPT) {
            return Ok(page << 12);
        }
        let eptp = vmcs.read(EPT_POINTER);
        let mut tlb = core::mem::take(&mut self.tlb);
        let outcome = tlb.access(eptp, page, write, || self.walk(eptp, page, write));
        self.tlb = tlb;
        outcome
    }

    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn has_valid_link(&self, _: &FakeVmcs) -> bool {
        self.link_is_valid
    }

    fn intercepts_rdmsr(&self, vmcs: &FakeVmcs, msr: u32) -> bool {
        let Some((byte, bit)) = bitmap_bit(msr, Access::Read) else { return true };
        if !vmcs.read(PRIMARY_CONTROLS).contains(Primary::USE_MSR_BITMAPS) {
            return true;
        }
        let mut bits = [0];
        self.ram.read(Gpa(vmcs.read(MSR_BITMAP) + byte as u64), &mut bits);
        bits[0] >> bit & 1 != 0
    }

    fn read_msr(&self, msr: u32) -> u64 {
        match msr {
            IA32_FEATURE_CONTROL => 5,
            _ => self.msrs.get(&msr).copied().unwrap_or(0),
        }
    }

    fn entry_load(&self, vmcs: &FakeVmcs) -> Vec<MsrEntry> {
        self.area(vmcs.read(ENTRY_MSR_LOAD_ADDRESS), vmcs.read(ENTRY_MSR_LOAD_COUNT))
    }

    fn load_msr(&mut self, msr: u32, value: u64) {
        self.msrs.insert(msr, value);
    }
}

/// SDM 28.5 "Loading Host State", for a host in 64-bit mode. `left` holds the guest's values of the registers that are
/// not loaded.
fn load_host_state(words: &mut Words, vmcs: &FakeVmcs, left: &Words, failed: bool) {
    let exit = vmcs.read(EXIT_CONTROLS);
    let was_blocked = words[GUEST_INTERRUPTIBILITY.id().row()] as u32 & BLOCKING_BY_NMI != 0;
    let mut set = |id: FieldId, value: u64| words[id.row()] = value;
    for (to, from) in [
        (GUEST_CR0, HOST_CR0),
        (GUEST_CR3, HOST_CR3),
        (GUEST_RIP, HOST_RIP),
        (GUEST_RSP, HOST_RSP),
        (GUEST_FS_BASE, HOST_FS_BASE),
        (GUEST_GS_BASE, HOST_GS_BASE),
        (GUEST_TR_BASE, HOST_TR_BASE),
        (GUEST_GDTR_BASE, HOST_GDTR_BASE),
        (GUEST_IDTR_BASE, HOST_IDTR_BASE),
        (GUEST_SYSENTER_ESP, HOST_SYSENTER_ESP),
        (GUEST_SYSENTER_EIP, HOST_SYSENTER_EIP),
    ] {
        set(to.id(), vmcs.read(from));
    }
    set(GUEST_CR4.id(), vmcs.read(HOST_CR4) & !CR4_PCIDE | vmcs.read(HOST_CR4) & CR4_PCIDE | CR4_PAE);
    set(GUEST_SYSENTER_CS.id(), vmcs.read(HOST_SYSENTER_CS).into());
    set(GUEST_RFLAGS.id(), 2);
    set(GUEST_DR7.id(), 0x400);
    set(GUEST_DEBUGCTL.id(), 0);
    set(GUEST_PENDING_DEBUG.id(), 0);
    set(GUEST_ACTIVITY_STATE.id(), 0);
    for (selector, from, base, limit, rights, fixed_base) in [
        (GUEST_ES_SELECTOR, HOST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS, true),
        (GUEST_SS_SELECTOR, HOST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS, true),
        (GUEST_DS_SELECTOR, HOST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS, true),
        (GUEST_FS_SELECTOR, HOST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS, false),
        (GUEST_GS_SELECTOR, HOST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS, false),
    ] {
        let value = vmcs.read(from);
        set(selector.id(), value.into());
        if fixed_base {
            set(base.id(), 0);
        }
        set(limit.id(), u32::MAX.into());
        set(rights.id(), if value == 0 { access_rights::UNUSABLE } else { access_rights::DATA }.into());
    }
    set(GUEST_CS_SELECTOR.id(), vmcs.read(HOST_CS_SELECTOR).into());
    set(GUEST_CS_ACCESS_RIGHTS.id(), access_rights::CODE_64.into());
    set(GUEST_TR_SELECTOR.id(), vmcs.read(HOST_TR_SELECTOR).into());
    set(GUEST_TR_LIMIT.id(), 0x67);
    set(GUEST_TR_ACCESS_RIGHTS.id(), access_rights::BUSY_TSS.into());
    set(GUEST_LDTR_SELECTOR.id(), 0);
    set(GUEST_LDTR_ACCESS_RIGHTS.id(), access_rights::UNUSABLE.into());
    set(GUEST_GDTR_LIMIT.id(), 0xffff);
    set(GUEST_IDTR_LIMIT.id(), 0xffff);
    let loads_pat = exit.contains(ExitControls::LOAD_PAT);
    set(GUEST_PAT.id(), if loads_pat { vmcs.read(HOST_PAT) } else { left[GUEST_PAT.id().row()] });
    let loads_efer = exit.contains(ExitControls::LOAD_EFER);
    let efer = if loads_efer { vmcs.read(HOST_EFER) } else { left[GUEST_EFER.id().row()] };
    set(GUEST_EFER.id(), efer | EFER_LMA | EFER_LME);
    let info = InterruptionInfo(vmcs.read(EXIT_INTERRUPTION_INFO));
    let by_nmi = ExitReason(vmcs.read(EXIT_REASON)) == ExitReason::EXCEPTION_OR_NMI && info.is_nmi();
    let virtual_nmis = vmcs.read(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS);
    let guest_blocked = !virtual_nmis && vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0;
    let blocked = if failed { was_blocked } else { by_nmi || guest_blocked };
    set(GUEST_INTERRUPTIBILITY.id(), if blocked { BLOCKING_BY_NMI } else { 0 }.into());
}

/// The registers that a hypervisor can observe. With a null selector a segment is unusable, and base, limit and rights
/// are undefined, apart from the bases of FS and GS.
pub fn visible(word: impl Fn(FieldId) -> u64) -> Vec<(FieldId, u64)> {
    let mut all: Vec<FieldId> = [
        GUEST_CR0,
        GUEST_CR3,
        GUEST_CR4,
        GUEST_RIP,
        GUEST_RSP,
        GUEST_RFLAGS,
        GUEST_DR7,
        GUEST_DEBUGCTL,
        GUEST_PAT,
        GUEST_EFER,
        GUEST_SYSENTER_ESP,
        GUEST_SYSENTER_EIP,
        GUEST_FS_BASE,
        GUEST_GS_BASE,
        GUEST_TR_BASE,
        GUEST_GDTR_BASE,
        GUEST_IDTR_BASE,
        GUEST_PENDING_DEBUG,
    ]
    .map(|field| field.id())
    .to_vec();
    all.extend(
        [
            GUEST_SYSENTER_CS,
            GUEST_TR_LIMIT,
            GUEST_TR_ACCESS_RIGHTS,
            GUEST_GDTR_LIMIT,
            GUEST_IDTR_LIMIT,
            GUEST_CS_ACCESS_RIGHTS,
            GUEST_INTERRUPTIBILITY,
            GUEST_ACTIVITY_STATE,
            GUEST_LDTR_ACCESS_RIGHTS,
        ]
        .map(|field| field.id()),
    );
    all.extend(
        [
            GUEST_ES_SELECTOR,
            GUEST_CS_SELECTOR,
            GUEST_SS_SELECTOR,
            GUEST_DS_SELECTOR,
            GUEST_FS_SELECTOR,
            GUEST_GS_SELECTOR,
            GUEST_TR_SELECTOR,
            GUEST_LDTR_SELECTOR,
        ]
        .map(|field| field.id()),
    );
    for (selector, base, limit, rights) in [
        (GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS),
        (GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
        (GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS),
        (GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS),
        (GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
    ] {
        if word(selector.id()) != 0 {
            all.extend([base.id(), limit.id(), rights.id()]);
        }
    }
    all.into_iter().map(|id| (id, word(id))).collect()
}

impl Bare {
    /// Whether the last exit of the current VMCS has left a field undefined.
    pub fn is_undefined(&self, id: FieldId) -> bool {
        let Some(current) = self.current else { return false };
        self.vmcss[current].2.contains(id)
    }
}
