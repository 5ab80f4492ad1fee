//! The machine with the nested logic below its hypervisor: vmcs01 has the hypervisor's registers, vmcs02 runs on the processor's model.

use core::fmt;
use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use ept::entry::Features;
use ept::map::{OutOfTables, lookup, map_range, set_rights};
use ept::nested::NestedPaging;
use ept::table::TableMemory;
use ept::{Caching, Entry, Eptp01, Eptp02, ExecuteControl, Gpa, Hpa, Levels, MemoryType, NestedGpa, PageSize, Rights};

use super::bare::visible;
use super::memory::{Ram, Tables};
use super::processor::*;
use super::program::{OPERAND, Op, VMCS_REGIONS, VMXON_REGION};
use crate::check::HostMode;
use crate::controls::{EntryControls, Pin, Primary, Secondary};
use crate::event::{BLOCKING_BY_NMI, NMI_INTERRUPTION};
use crate::exit::ExitReason;
use crate::fake::{FakeVmcs, skylake_caps};
use crate::fields::*;
use crate::host_load::HostImage;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldTable;
use crate::insn::VmxOperation;
use crate::merge::{MSR_AREA_ENTRIES, MsrEntry};
use crate::msr::{Access, BITMAP_BYTES, bitmap_bit};
use crate::nested::write_traps::{TrappedWrite, kept_at_first, spring};
use crate::nested::*;
use crate::passing;
use crate::permission::{Access as FieldAccess, Permissions};
use crate::registers::{RAX, RCX, RDX};
use crate::sync::SyncSets;
use crate::watch::{MergedAs, SLOTS, WatchedPages, Watches};

/// The VMCSs. Nothing is cached, so that the form of vmcs02 is all that is to be remembered.
pub struct Vmcss {
    vmcs01: FakeVmcs,
    vmcs02: FakeVmcs,
    shadow02: FakeVmcs,
    vmcs02_shadows: bool,
}

impl VmcsPair for Vmcss {
    type Current = FakeVmcs;

    fn vmcs01(&mut self) -> &mut FakeVmcs {
        &mut self.vmcs01
    }

    fn vmcs02(&mut self) -> &mut FakeVmcs {
        &mut self.vmcs02
    }

    fn access_vmcs02<T>(&mut self, access: impl FnOnce(&mut FakeVmcs) -> T) -> T {
        access(&mut self.vmcs02)
    }

    fn access_shadow02<T>(&mut self, access: impl FnOnce(&mut FakeVmcs) -> T) -> T {
        access(&mut self.shadow02)
    }

    fn set_vmcs02_shadows(&mut self, shadows: bool) {
        self.vmcs02_shadows = shadows;
    }

    fn vmcs02_address(&self) -> Hpa {
        Hpa(0x60_0000_0000)
    }

    fn note_entry_of_vmcs02(&mut self) {}
}

pub struct Memory {
    ram: Ram,
    tables: Tables,
    ept01: Eptp01,
    watched: &'static [WatchedPages; MergedAs::COUNT],
    watches: [Watches; MergedAs::COUNT],
}

fn is_protected(tables: &Tables, ept01: Eptp01, page: Gpa) -> bool {
    lookup(tables, ept01, page).is_some_and(|found| !found.leaf.rights(ExecuteControl::UNIFORM).contain(Rights::WRITE))
}

impl GuestMemory for Memory {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        self.ram.read(from, to);
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        self.unwatch(to);
        self.ram.write(to, from);
    }

    fn translate(&self, address: Gpa) -> Hpa {
        Hpa(address.0)
    }
}

impl WatchedMemory for Memory {
    fn watches(&self, kind: MergedAs) -> &Watches {
        &self.watches[kind as usize]
    }

    fn unwatch(&self, address: Gpa) {
        let page = address.align_down(PageSize::Size4K);
        if is_protected(&self.tables, self.ept01, page) {
            self.watched.iter().for_each(|watched| watched.strike(page));
            set_rights(&mut self.tables.clone(), self.ept01, page, Rights::ALL).expect("nothing is left to split");
        }
    }

    fn is_host(&self, _: Gpa) -> bool {
        false
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        let is_seen = self.ram.read_u64(at) == seen;
        if is_seen {
            self.ram.write_u64(at, new);
        }
        is_seen
    }
}

/// The processor and its surroundings.
pub struct Hardware {
    ept01: Eptp01,
    tlb: RefCell<Tlb>,
    msrs: RefCell<BTreeMap<u32, u64>>,
    flushes: Cell<u64>,
    flushed: Cell<u64>,
    /// Looks at a flush until another processor has taken part in it.
    lag: Cell<u32>,
    is_kicked: Cell<bool>,
    nmi_requested: Cell<bool>,
    reflected: Cell<u64>,
    watched: &'static [WatchedPages; MergedAs::COUNT],
}

impl Machine for Hardware {
    type Registers = Vec<u64>;
    type Vmcss = Vmcss;
    type Memory = Memory;
    type Tables = Tables;

    fn invept(&self, what: Invept) {
        self.tlb.borrow_mut().drop(match what {
            Invept::Single(eptp) => Some(eptp.bits()),
            Invept::Global => None,
        });
    }

    fn invvpid(&self, _: Invvpid) {}

    fn read_msr(&self, msr: u32) -> Option<u64> {
        Some(self.msrs.borrow().get(&msr).copied().unwrap_or(0))
    }

    fn write_msr(&self, msr: u32, value: u64) -> Option<()> {
        self.msrs.borrow_mut().insert(msr, value);
        Some(())
    }

    fn pkru(&self) -> u32 {
        0
    }

    fn set_cr2(&self, _: u64) {}

    fn ept01(&self) -> Eptp01 {
        self.ept01
    }

    fn map_beyond(&self, _: &mut Tables, _: Gpa) -> Result<bool, OutOfTables> {
        Ok(false)
    }

    fn protect(&self, tables: &mut Tables, watches: &Watches, page: Gpa, wanted: bool) -> (usize, Protection) {
        let was_protected = is_protected(tables, self.ept01, page);
        let (slot, loser) = watches.assign(page);
        if let Some(loser) = loser
            && !self.watched.iter().any(|watched| watched.contains(loser))
        {
            set_rights(tables, self.ept01, loser, Rights::ALL).expect("nothing is left to split");
        }
        if !wanted {
            return (slot, Protection::Impossible);
        }
        if was_protected {
            return (slot, Protection::Already(self.flushes.get()));
        }
        if set_rights(tables, self.ept01, page, Rights::READ.or(Rights::EXECUTE)).is_err() {
            return (slot, Protection::Impossible);
        }
        self.flushes.set(self.flushes.get() + 1);
        self.lag.set(2);
        (slot, Protection::New(self.flushes.get()))
    }

    fn all_have_flushed(&self, flush: u64) -> bool {
        let lag = self.lag.get();
        self.lag.set(lag.saturating_sub(1));
        lag == 0 && self.flushed.get() >= flush
    }

    fn note_flush(&self, flush: u64) {
        self.flushed.set(flush);
    }

    fn request_nmi(&self) {
        self.nmi_requested.set(true);
    }

    fn waits_for_sipi(&self) -> bool {
        false
    }

    fn take_kick(&self) -> bool {
        self.is_kicked.take()
    }

    fn send_init_to_self(&self) -> bool {
        true
    }

    fn count_reflected(&self, _: ExitReason) {
        self.reflected.set(self.reflected.get() + 1);
    }

    fn count_field_access(&self, _: u64, _: FieldAccess) {}

    fn warn(&self, line: fmt::Arguments<'_>) {
        panic!("{line}");
    }

    fn stop(&self, why: Stop<'_>) -> ! {
        panic!("{why:?}");
    }
}

/// What is different from one machine to another, and no hypervisor can see.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// VMCS shadowing for the hypervisor.
    pub shadowing: bool,
    /// Tables for EPT01 and EPT02s.
    pub tables: u64,
}

pub struct Stacked {
    vcpu: Vcpu<Hardware>,
    pub seen: Vec<Seen>,
}

fn leak<T>(value: T) -> &'static mut T {
    Box::leak(Box::new(value))
}

fn msr_area(address: u64) -> MsrArea {
    MsrArea { entries: leak([MsrEntry::default(); MSR_AREA_ENTRIES]), address: Hpa(address) }
}

fn bitmap(address: u64) -> MergedBitmap {
    MergedBitmap { bytes: vec![0; BITMAP_BYTES].leak(), address: Hpa(address) }
}

impl Stacked {
    pub fn new(words: &Words, ram: Ram, variant: Variant) -> Self {
        let caps = skylake_caps();
        let offered = caps.offered();
        let permissions = match variant.shadowing {
            true => Permissions::widest(&offered),
            false => Permissions::without_shadowing(&offered.fields()),
        };
        let live = *permissions.live();
        let mut tables = Tables::new(variant.tables);
        let ept01 = Eptp01::new(tables.allocate().expect("a table"), Levels::Four);
        map_range(&mut tables, ept01, Gpa(0)..Gpa(1 << 30), PageSize::Size1G, |address, size| {
            Entry::leaf(Hpa(address.0), size, Rights::ALL, Caching::new(MemoryType::WRITE_BACK))
        })
        .expect("tables");
        let watched = leak([const { WatchedPages::new() }; MergedAs::COUNT]);
        let watched: &'static _ = watched;
        let features = Features {
            physical_bits: caps.physical_bits,
            execute_only: true,
            page_2m: true,
            page_1g: true,
            advanced_violation: false,
        };
        let msr_bitmaps: [MergedBitmap; SLOTS] =
            core::array::from_fn(|slot| bitmap(0x61_0000_0000 + slot as u64 * 4096));
        let (first_bitmap, table) = (msr_bitmaps[0].address, leak(FieldTable::of(&offered.fields())));
        let mut vcpu = Vcpu {
            registers: vec![0; 16],
            vmcs: Vmcss {
                vmcs01: FakeVmcs::new(&caps),
                vmcs02: FakeVmcs::new(&caps),
                shadow02: FakeVmcs::new(&caps),
                vmcs02_shadows: false,
            },
            running: Running::GuestHypervisor,
            offered_fields: offered.fields(),
            live_fields: live,
            field_table: table,
            quick_table: table,
            sync_sets: SyncSets::new(&offered, &live),
            vmx: VmxOperation::new(&offered),
            mode: HostMode::Legacy,
            nested: Nested {
                shortcut: Shortcut::default(),
                host_image: HostImage::default(),
                kept: kept_at_first(&caps),
                nmi_waits: false,
                displaced: None,
                ept: NestedEpt {
                    eptp02: ept01.without_ept12(),
                    ept12: None,
                    converts_violations: false,
                    logs_pages: false,
                    violation: None,
                    cache: NestedPaging::new(features),
                },
                vpid12: 0,
                msr_bitmaps,
                msr_bitmap_slot: 0,
                areas: MsrAreas {
                    entry_load: msr_area(0x62_0000_0000),
                    entry_load_count: 0,
                    exit_store: msr_area(0x63_0000_0000),
                    exit_store_count: 0,
                    host_load: msr_area(0x64_0000_0000),
                },
                shadowing: None,
                displaced_registers: passing::Values::new(),
                loading_registers: false,
            },
            memory: Memory {
                ram,
                tables: tables.clone(),
                ept01,
                watched,
                watches: core::array::from_fn(|kind| Watches::new(&watched[kind])),
            },
            tables,
            msr_bitmaps01: [Hpa(0x65_0000_0000), Hpa(0x65_0000_1000)],
            undo: None,
            init_blocked: false,
            machine: Hardware {
                ept01,
                tlb: RefCell::default(),
                msrs: RefCell::default(),
                flushes: Cell::new(0),
                flushed: Cell::new(0),
                lag: Cell::new(0),
                is_kicked: Cell::new(false),
                nmi_requested: Cell::new(false),
                reflected: Cell::new(0),
                watched,
            },
            caps,
            offered,
        };
        for id in registers(&vcpu.offered_fields) {
            vcpu.vmcs.vmcs01.poke(id, words[id.row()]);
        }
        for (shadow, field) in [(CR0_READ_SHADOW, GUEST_CR0), (CR4_READ_SHADOW, GUEST_CR4)] {
            vcpu.vmcs.vmcs01.write(shadow, words[field.id().row()]);
        }
        vcpu.vmcs.vmcs01.write(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
        vcpu.vmcs.vmcs01.write(PRIMARY_CONTROLS, Primary::ACTIVATE_SECONDARY);
        vcpu.vmcs.vmcs01.write(MSR_BITMAP, vcpu.msr_bitmaps01[0].0);
        vcpu.vmcs.vmcs02.write(EPT_POINTER, ept01.bits());
        vcpu.vmcs.vmcs02.write(MSR_BITMAP, first_bitmap.0);
        let mut stacked = Self { vcpu, seen: Vec::new() };
        stacked.instruction(ExitReason::VMXON, MEMORY_OPERAND, VMXON_REGION);
        assert!(stacked.vcpu.vmx.vmxon_region.is_some(), "VMXON: {:?}", stacked.seen);
        for id in [GUEST_RIP.id(), GUEST_RFLAGS.id()] {
            stacked.vcpu.vmcs.vmcs01.poke(id, words[id.row()]);
        }
        stacked.seen.clear();
        stacked
    }

    pub fn memory(&self) -> Vec<u8> {
        self.vcpu.memory.ram.bytes()
    }

    /// Exits that the hypervisor got.
    pub fn reflected(&self) -> u64 {
        self.vcpu.machine.reflected.get()
    }

    pub fn execute(&mut self, op: &Op) {
        match op {
            Op::Write(id, value) => self.access(*id, Some(*value)),
            Op::Read(id) => self.access(*id, None),
            Op::Load(number) => self.instruction(ExitReason::VMPTRLD, MEMORY_OPERAND, VMCS_REGIONS[*number]),
            Op::Clear(number) => self.instruction(ExitReason::VMCLEAR, MEMORY_OPERAND, VMCS_REGIONS[*number]),
            Op::Enter(resume, guest) => {
                let reason = if *resume { ExitReason::VMRESUME } else { ExitReason::VMLAUNCH };
                self.dispatch(reason, 0);
                let mut guest = guest.clone();
                let is_early = guest.nmi_comes_before_entry() && !self.blocks_nmis();
                if is_early && self.vcpu.running == Running::Entering {
                    guest.nmi = false;
                    self.vcpu.machine.nmi_requested.set(true);
                }
                self.run(&mut guest);
                if self.vcpu.machine.nmi_requested.take() || guest.nmi {
                    self.interrupt_hypervisor();
                }
            }
            Op::Store(address, word) => {
                self.vcpu.memory.unwatch(Gpa(*address));
                self.vcpu.memory.ram.write_u64(Gpa(*address), *word);
            }
            Op::Invept(eptp) => {
                self.vcpu.registers[RCX] = if eptp.is_some() { 1 } else { 2 };
                self.vcpu.memory.write_u64(Gpa(OPERAND + 8), 0);
                self.instruction(ExitReason::INVEPT, MEMORY_OPERAND | (RCX as u32) << 28, eptp.unwrap_or(0));
                self.vcpu.memory.write_u64(Gpa(OPERAND + 8), 0);
            }
            Op::Change(id, value) => self.change(*id, *value),
            Op::HostFlush => drop_what_ept01_forbids(&mut self.vcpu, 0),
        }
    }

    /// An instruction of the hypervisor that writes a register, with the exit that a trap makes of it.
    fn change(&mut self, id: FieldId, value: u64) {
        self.enter_hypervisor();
        let vmcs01 = &self.vcpu.vmcs.vmcs01;
        let tables = [GUEST_GDTR_BASE.id(), GUEST_IDTR_BASE.id(), GUEST_TR_BASE.id()].contains(&id);
        let trapping = self.vcpu.msr_bitmaps01[1].0;
        let is_caught = |vmcs01: &FakeVmcs| match id {
            _ if tables => has_secondary(vmcs01, Secondary::DESCRIPTOR_TABLE_EXITING),
            _ if id == GUEST_DR7.id() => vmcs01.read(PRIMARY_CONTROLS).contains(Primary::MOV_DR_EXITING),
            _ => vmcs01.read(MSR_BITMAP) == trapping,
        };
        if is_caught(vmcs01) {
            let what = if tables { TrappedWrite::Tables } else { TrappedWrite::Registers };
            assert_eq!(spring(&mut self.vcpu, what), Action::Resume);
            assert!(!is_caught(&self.vcpu.vmcs.vmcs01), "the instruction exits again");
        }
        self.vcpu.vmcs.vmcs01.poke(id, value);
    }

    /// VMREAD or VMWRITE. A live field of a current VMCS is accessed in vmcs02, without an exit.
    fn access(&mut self, id: FieldId, value: Option<u64>) {
        if self.vcpu.vmcs.vmcs02_shadows && self.vcpu.live_fields.contains(id) {
            self.enter_hypervisor();
            assert!(has_secondary(&self.vcpu.vmcs.vmcs01, Secondary::VMCS_SHADOWING));
            match value {
                Some(value) => self.vcpu.vmcs.vmcs02.poke(id, value),
                None => self.seen.push(Seen::Value(id, self.vcpu.vmcs.vmcs02.read_raw(id))),
            }
            self.vcpu.vmcs.vmcs01.poke(EXIT_INSTRUCTION_LENGTH.id(), 3);
            self.vcpu.advance_with_flags(crate::outcome::rflags_succeed);
            return self.see_flags();
        }
        let info = REGISTER_OPERANDS | (RAX as u32) << 3 | (RCX as u32) << 28;
        self.vcpu.registers[RCX] = id.encoding().0.into();
        self.vcpu.registers[RAX] = value.unwrap_or(0x5555);
        let had_current = self.vcpu.vmx.has_current();
        self.dispatch(if value.is_some() { ExitReason::VMWRITE } else { ExitReason::VMREAD }, info);
        if value.is_none() && had_current {
            self.seen.insert(self.seen.len() - 1, Seen::Value(id, self.vcpu.registers[RAX]));
        }
    }

    /// An instruction with a memory operand.
    fn instruction(&mut self, reason: ExitReason, info: u32, operand: u64) {
        self.vcpu.memory.ram.write_u64(Gpa(OPERAND), operand);
        self.vcpu.vmcs.vmcs01.poke(EXIT_QUALIFICATION.id(), OPERAND);
        self.dispatch(reason, info);
        self.vcpu.memory.ram.write_u64(Gpa(OPERAND), 0);
    }

    /// What an entry of vmcs01 does to MSRs.
    fn enter_hypervisor(&mut self) {
        let count = self.vcpu.vmcs.vmcs01.read(ENTRY_MSR_LOAD_COUNT) as usize;
        for entry in &self.vcpu.nested.areas.host_load.entries[..count] {
            self.vcpu.machine.msrs.borrow_mut().insert(entry.index, entry.value);
            self.seen.push(Seen::LoadedMsr(entry.index, entry.value));
        }
    }

    /// An exit of the hypervisor for a VMX instruction.
    fn dispatch(&mut self, reason: ExitReason, info: u32) {
        self.enter_hypervisor();
        let vmcs01 = &mut self.vcpu.vmcs.vmcs01;
        vmcs01.poke(EXIT_REASON.id(), reason.0.into());
        vmcs01.poke(EXIT_INSTRUCTION_INFO.id(), info.into());
        vmcs01.poke(EXIT_INSTRUCTION_LENGTH.id(), 3);
        if !handle_quickly(&mut self.vcpu, reason) {
            let action = match reason {
                ExitReason::VMLAUNCH | ExitReason::VMRESUME => instructions::launch(&mut self.vcpu, reason),
                _ => instructions::handle(&mut self.vcpu, reason),
            };
            match action {
                Action::Resume => (),
                Action::Advance => self.vcpu.advance(),
                Action::Inject(_) => self.seen.push(Seen::Fault),
            }
        }
        if self.vcpu.running == Running::GuestHypervisor
            && !matches!(reason, ExitReason::VMLAUNCH | ExitReason::VMRESUME)
        {
            self.see_flags();
        }
    }

    fn see_flags(&mut self) {
        self.seen.push(Seen::Flags(self.vcpu.vmcs.vmcs01.read(GUEST_RFLAGS)));
    }

    /// The run loop, until the hypervisor runs.
    fn run(&mut self, guest: &mut Guest) {
        let host = core::array::from_fn(|row| 0xdead_0000 + row as u64);
        let mut is_first = true;
        let reflected = self.reflected();
        for _ in 0..200 {
            if self.vcpu.running.is_nested() && self.vcpu.machine.nmi_requested.take() {
                nmi::pass_on(&mut self.vcpu);
            }
            if !self.vcpu.running.is_nested() {
                if self.reflected() == reflected {
                    return self.see_flags();
                }
                let words = visible(|id| self.vcpu.vmcs.vmcs01.read_raw(id));
                self.enter_hypervisor_early();
                return self.seen.push(Seen::Left(words));
            }
            let Vcpu { vmcs, nested, memory, tables, machine, offered_fields, .. } = &mut self.vcpu;
            let run = Run {
                vmcs: &mut vmcs.vmcs02,
                host: &host,
                guest,
                surroundings: &mut Below { nested, memory, tables, machine },
                seen: &mut self.seen,
                is_first,
                fields: *offered_fields,
                words: &mut [0; FIELD_COUNT],
                ticks: 0,
            };
            let ended = run.run();
            is_first = false;
            match ended {
                Ended::Refused(_) => handle_failed_entry(&mut self.vcpu),
                Ended::Exited => self.exited(),
                Ended::Interrupted { nmi: arrived } => {
                    self.store_msrs();
                    self.vcpu.machine.is_kicked.set(true);
                    handle(&mut self.vcpu, ExitReason::INIT);
                    if arrived {
                        self.vcpu.machine.nmi_requested.set(true);
                    }
                }
            }
        }
        panic!("the nested guest does not get on: {guest:?}");
    }

    fn blocks_nmis(&self) -> bool {
        let vmcs02 = &self.vcpu.vmcs.vmcs02;
        let blocked = vmcs02.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0;
        blocked && !vmcs02.read(PIN_CONTROLS).contains(Pin::VIRTUAL_NMIS)
    }

    /// An NMI is there when the hypervisor is about to run.
    fn interrupt_hypervisor(&mut self) {
        nmi::pass_on(&mut self.vcpu);
        let vmcs01 = &mut self.vcpu.vmcs.vmcs01;
        if vmcs01.read(ENTRY_INTERRUPTION_INFO) == NMI_INTERRUPTION.0 {
            self.seen.push(Seen::HypervisorNmi);
        }
        let controls = vmcs01.read(PRIMARY_CONTROLS) - Primary::MONITOR_TRAP_FLAG;
        vmcs01.poke(PRIMARY_CONTROLS.id(), controls.bits().into());
        vmcs01.poke(ENTRY_INTERRUPTION_INFO.id(), 0);
    }

    /// The entry of vmcs01 that follows an exit, seen before the hypervisor's first instruction.
    fn enter_hypervisor_early(&mut self) {
        self.enter_hypervisor();
        if self.vcpu.running == Running::GuestHypervisorLoadingMsrs {
            // The hypervisor's next exit is for something that nesting has no part in.
            let _ = handle_quickly(&mut self.vcpu, ExitReason::CPUID);
        }
    }

    /// What an exit of vmcs02 does to its VM-exit MSR-store area.
    fn store_msrs(&mut self) {
        let count = self.vcpu.vmcs.vmcs02.read(EXIT_MSR_STORE_COUNT) as usize;
        for entry in &mut self.vcpu.nested.areas.exit_store.entries[..count] {
            entry.value = self.vcpu.machine.msrs.borrow().get(&entry.index).copied().unwrap_or(0);
        }
    }

    fn exited(&mut self) {
        let reason = ExitReason(self.vcpu.vmcs.vmcs02.read(EXIT_REASON));
        let msr = self.vcpu.vmcs.vmcs02.read(EXIT_QUALIFICATION);
        if !reason.is_entry_failure() {
            self.store_msrs();
        }
        if reason == ExitReason::RDMSR {
            self.vcpu.registers[RCX] = msr;
        }
        handle(&mut self.vcpu, reason);
        if reason == ExitReason::RDMSR && self.vcpu.running.is_nested() {
            let value = self.vcpu.registers[RDX] << 32 | self.vcpu.registers[RAX];
            self.seen.push(Seen::Msr(msr as u32, value));
        }
    }
}

/// Registers as both operands.
const REGISTER_OPERANDS: u32 = 1 << 10;
/// DS with a displacement and 64-bit addresses.
const MEMORY_OPERAND: u32 = 1 << 27 | 1 << 22 | 3 << 15 | 2 << 7;

struct Below<'a> {
    nested: &'a mut Nested,
    memory: &'a Memory,
    tables: &'a mut Tables,
    machine: &'a mut Hardware,
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
        self.nested.areas.entry_load.entries[..vmcs.read(ENTRY_MSR_LOAD_COUNT) as usize].to_vec()
    }

    fn load_msr(&mut self, msr: u32, value: u64) {
        self.machine.msrs.borrow_mut().insert(msr, value);
    }
}
