//! The machine with the nested logic below its hypervisor: vmcs01 has the hypervisor's registers, vmcs02 runs on the
//! processor's model.

use std::vec::Vec;

use ept::map::lookup;
use ept::{Eptp02, ExecuteControl, Gpa, NestedGpa, Rights};

use super::bare::visible;
use super::processor::*;
use super::program::{Op, VMCS_REGIONS};
use crate::controls::{Pin, Primary, Secondary};
use crate::event::{BLOCKING_BY_NMI, NMI_INTERRUPTION};
use crate::exit::ExitReason;
use crate::fake::{
    FakeHardware, FakeMachine, FakeVmcs, FakeWatchedMemory, MEMORY_OPERAND, OPERAND, Ram, Tables, Variant, Words,
};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::merge::MsrEntry;
use crate::msr::{Access, IA32_FLUSH_CMD, IA32_FS_BASE, bitmap_bit};
use crate::nested::write_traps::{TrappedWrite, spring};
use crate::nested::*;
use crate::outcome::Fault;
use crate::registers::{RAX, RCX, RDX};

pub struct Stacked {
    machine: FakeMachine,
    pub seen: Vec<Seen>,
    /// Every entry of a nested guest flushes the cache.
    flushes: bool,
}

impl Stacked {
    pub fn new(words: &Words, ram: Ram, variant: Variant) -> Self {
        let flushes = variant.mitigations.cache_flush;
        Self { machine: FakeMachine::new(words, ram, variant), seen: Vec::new(), flushes }
    }

    pub fn memory(&self) -> Vec<u8> {
        self.machine.vcpu.memory.ram.bytes()
    }

    /// Exits that the hypervisor got.
    pub fn reflected(&self) -> u64 {
        self.machine.vcpu.machine.reflected.get()
    }

    pub fn execute(&mut self, op: &Op) {
        match op {
            Op::Write(id, value) => self.access(*id, Some(*value)),
            Op::Read(id) => self.access(*id, None),
            Op::Load(number) => self.instruction(ExitReason::VMPTRLD, MEMORY_OPERAND, VMCS_REGIONS[*number]),
            Op::Clear(number) => self.instruction(ExitReason::VMCLEAR, MEMORY_OPERAND, VMCS_REGIONS[*number]),
            Op::Enter(resume, guest) => {
                let reason = if *resume { ExitReason::VMRESUME } else { ExitReason::VMLAUNCH };
                self.launch(reason);
                let mut guest = guest.clone();
                let is_early = guest.nmi_comes_before_entry() && !self.blocks_nmis();
                if is_early && self.machine.vcpu.running == Running::Entering {
                    guest.nmi = false;
                    self.machine.vcpu.machine.nmi_requested.set(true);
                }
                self.run(&mut guest);
                if self.machine.vcpu.machine.nmi_requested.take() || guest.nmi {
                    self.interrupt_hypervisor();
                }
            }
            Op::Store(address, word) => {
                self.machine.vcpu.memory.unwatch(Gpa(*address));
                self.machine.vcpu.memory.ram.write_u64(Gpa(*address), *word);
            }
            Op::Invept(eptp) => {
                self.machine.vcpu.registers[RCX] = if eptp.is_some() { 1 } else { 2 };
                self.machine.vcpu.memory.write_u64(Gpa(OPERAND + 8), 0);
                self.instruction(ExitReason::INVEPT, MEMORY_OPERAND | (RCX as u32) << 28, eptp.unwrap_or(0));
                self.machine.vcpu.memory.write_u64(Gpa(OPERAND + 8), 0);
            }
            Op::Change(id, value) => self.change(*id, *value),
            Op::HostFlush => drop_what_ept01_forbids(&mut self.machine.vcpu, 0),
        }
    }

    /// An instruction of the hypervisor that writes a register. It exits if a trap is set.
    fn change(&mut self, id: FieldId, value: u64) {
        self.see_host_msrs();
        let vmcs01 = &self.machine.vcpu.vmcs.vmcs01;
        let tables = [GUEST_GDTR_BASE.id(), GUEST_IDTR_BASE.id(), GUEST_TR_BASE.id()].contains(&id);
        let trapping = self.machine.vcpu.msr_bitmaps01[1].0;
        let is_caught = |vmcs01: &FakeVmcs| match id {
            _ if tables => has_secondary(vmcs01, Secondary::DESCRIPTOR_TABLE_EXITING),
            _ if id == GUEST_DR7.id() => vmcs01.read(PRIMARY_CONTROLS).contains(Primary::MOV_DR_EXITING),
            _ => vmcs01.read(MSR_BITMAP) == trapping,
        };
        if is_caught(vmcs01) {
            let what = if tables { TrappedWrite::Tables } else { TrappedWrite::Registers };
            assert_eq!(spring(&mut self.machine.vcpu, what), Action::Resume);
            assert!(!is_caught(&self.machine.vcpu.vmcs.vmcs01), "the instruction exits again");
        }
        self.machine.vcpu.vmcs.vmcs01.poke(id, value);
    }

    fn access(&mut self, id: FieldId, value: Option<u64>) {
        self.see_host_msrs();
        let outcome = match value {
            Some(value) => self.machine.vmwrite(id, value),
            None => self.machine.vmread(id).map(|value| {
                if self.machine.vcpu.vmx.has_current() {
                    self.seen.push(Seen::Value(id, value));
                }
            }),
        };
        self.see(outcome);
    }

    /// An instruction with a memory operand.
    fn instruction(&mut self, reason: ExitReason, info: u32, operand: u64) {
        self.see_host_msrs();
        let outcome = self.machine.instruction(reason, info, operand);
        self.see(outcome);
    }

    /// VMLAUNCH or VMRESUME.
    fn launch(&mut self, reason: ExitReason) {
        self.see_host_msrs();
        if self.machine.exit(reason, 0).is_err() {
            self.seen.push(Seen::Fault);
        }
    }

    fn see(&mut self, outcome: Result<(), Fault>) {
        match outcome {
            Ok(()) => self.see_flags(),
            Err(_) => self.seen.push(Seen::Fault),
        }
    }

    /// Records the MSRs that an entry of vmcs01 loads.
    fn see_host_msrs(&mut self) {
        let loaded = self.machine.load_host_msrs();
        self.seen.extend(loaded.into_iter().map(|entry| Seen::LoadedMsr(entry.index, entry.value)));
    }

    fn see_flags(&mut self) {
        self.seen.push(Seen::Flags(self.machine.vcpu.vmcs.vmcs01.read(GUEST_RFLAGS)));
    }

    /// The run loop, until the hypervisor runs.
    fn run(&mut self, guest: &mut Guest) {
        let host = core::array::from_fn(|row| 0xdead_0000 + row as u64);
        let mut is_first = true;
        let reflected = self.reflected();
        for _ in 0..200 {
            if self.machine.vcpu.running.is_nested() && self.machine.vcpu.machine.nmi_requested.take() {
                nmi::pass_on(&mut self.machine.vcpu);
            }
            if !self.machine.vcpu.running.is_nested() {
                if self.reflected() == reflected {
                    return self.see_flags();
                }
                let words = visible(|id| self.machine.vcpu.vmcs.vmcs01.read_raw(id));
                self.begin_hypervisor();
                return self.seen.push(Seen::Left(words));
            }
            let Vcpu { vmcs, nested, memory, tables, machine, offered_fields, .. } = &mut self.machine.vcpu;
            let run = Run {
                vmcs: &mut vmcs.vmcs02,
                host: &host,
                guest,
                surroundings: &mut Below { nested, memory, tables, machine, flushes: self.flushes },
                seen: &mut self.seen,
                is_first,
                fields: *offered_fields,
                words: &mut [0; FIELD_COUNT],
                ticks: 0,
            };
            let ended = run.run();
            is_first = false;
            match ended {
                Ended::Refused(_) => handle_failed_entry(&mut self.machine.vcpu),
                Ended::Exited => self.exited(),
                Ended::Interrupted { nmi: arrived } => {
                    self.machine.vcpu.machine.is_kicked.set(true);
                    handle(&mut self.machine.vcpu, ExitReason::INIT);
                    if arrived {
                        self.machine.vcpu.machine.nmi_requested.set(true);
                    }
                }
            }
        }
        panic!("the nested guest does not get on: {guest:?}");
    }

    fn blocks_nmis(&self) -> bool {
        let vmcs02 = &self.machine.vcpu.vmcs.vmcs02;
        let blocked = vmcs02.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0;
        blocked && !vmcs02.read(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS)
    }

    /// An NMI arrives when the hypervisor is about to run.
    fn interrupt_hypervisor(&mut self) {
        nmi::pass_on(&mut self.machine.vcpu);
        let vmcs01 = &mut self.machine.vcpu.vmcs.vmcs01;
        if vmcs01.read(ENTRY_INTERRUPTION_INFO) == NMI_INTERRUPTION.0 {
            self.seen.push(Seen::HypervisorNmi);
        }
        let controls = vmcs01.read(PRIMARY_CONTROLS) - Primary::MONITOR_TRAP_FLAG;
        vmcs01.poke(PRIMARY_CONTROLS.id(), controls.bits().into());
        vmcs01.poke(ENTRY_INTERRUPTION_INFO.id(), 0);
    }

    /// The entry of vmcs01 after an exit, up to the hypervisor's first instruction.
    fn begin_hypervisor(&mut self) {
        self.see_host_msrs();
        if self.machine.vcpu.running == Running::GuestHypervisorLoadingMsrs {
            // The hypervisor's next exit has nothing to do with nesting.
            let _ = handle_quickly(&mut self.machine.vcpu, ExitReason::CPUID);
        }
    }

    fn exited(&mut self) {
        let reason = ExitReason(self.machine.vcpu.vmcs.vmcs02.read(EXIT_REASON));
        let msr = self.machine.vcpu.vmcs.vmcs02.read(EXIT_QUALIFICATION);
        if reason == ExitReason::RDMSR {
            self.machine.vcpu.registers[RCX] = msr;
        }
        handle(&mut self.machine.vcpu, reason);
        if reason == ExitReason::RDMSR && self.machine.vcpu.running.is_nested() {
            let value = self.machine.vcpu.registers[RDX] << 32 | self.machine.vcpu.registers[RAX];
            self.seen.push(Seen::Msr(msr as u32, value));
        }
    }
}

struct Below<'a> {
    nested: &'a mut Nested,
    memory: &'a FakeWatchedMemory,
    tables: &'a mut Tables,
    machine: &'a mut FakeHardware,
    flushes: bool,
}

impl Surroundings for Below<'_> {
    const HAS_HOST: bool = true;

    fn translate(&mut self, vmcs: &FakeVmcs, page: u64, write: bool) -> Result<u64, Untranslated> {
        let eptp = vmcs.read(EPT_POINTER);
        let access = if write { Rights::WRITE } else { Rights::READ };
        self.machine.tlb.borrow_mut().access(eptp, page, write, || {
            let found = lookup(self.tables, Eptp02::from_bits(eptp), NestedGpa(page << 12));
            let rights = found.map_or(Rights::NONE, |found| found.leaf.rights(ExecuteControl::UNIFORM));
            match found {
                Some(found) if rights.contain(access) => {
                    Ok(found.leaf.address().0 | page << 12 & (found.size.bytes() - 1))
                }
                _ => Err(Untranslated::Violation(access.bits() | (rights.bits() & 7) << 3 | 0x180)),
            }
        })
    }

    fn ram(&self) -> &Ram {
        &self.memory.ram
    }

    fn has_valid_link(&self, vmcs: &FakeVmcs) -> bool {
        let link = vmcs.read(VMCS_LINK_POINTER);
        link == u64::MAX || link.is_multiple_of(4096)
    }

    fn intercepts_rdmsr(&self, vmcs: &FakeVmcs, msr: u32) -> bool {
        let Some((byte, bit)) = bitmap_bit(msr, Access::Read) else { return true };
        if !vmcs.read(PRIMARY_CONTROLS).contains(Primary::USE_MSR_BITMAPS) {
            return true;
        }
        let address = vmcs.read(MSR_BITMAP);
        let merged =
            self.nested.msr_bitmaps.iter().find(|bitmap| bitmap.address.0 == address).expect("a merged bitmap");
        merged.bytes[byte] >> bit & 1 != 0
    }

    fn read_msr(&self, msr: u32) -> u64 {
        self.machine.msrs.borrow().get(&msr).copied().unwrap_or(0)
    }

    fn entry_load(&self, vmcs: &FakeVmcs) -> Vec<MsrEntry> {
        let mut entries = self.nested.areas.entry_load.entries[..vmcs.read(ENTRY_MSR_LOAD_COUNT) as usize].to_vec();
        // A command to the processor is the host's own, and comes last where the entry does not fail before.
        if entries.last().is_some_and(|last| last.index == IA32_FLUSH_CMD) {
            entries.pop();
        } else {
            let fails = entries.iter().any(|entry| entry.index == IA32_FS_BASE);
            assert!(fails || !self.flushes, "an entry without a flush");
        }
        entries
    }

    fn load_msr(&mut self, msr: u32, value: u64) {
        self.machine.msrs.borrow_mut().insert(msr, value);
    }
}
