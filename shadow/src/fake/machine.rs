//! A processor on which the nested logic runs in tests: it executes no guest, but does everything else of
//! [`Machine`](crate::nested::Machine).

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
use ept::{Caching, Entry, Eptp01, ExecuteControl, Gpa, Hpa, Levels, MemoryType, PageSize, Rights};

use super::memory::{Ram, Tables};
use super::tlb::Tlb;
use super::{FakeVmcs, skylake_caps};
use crate::caps::Policy;
use crate::check::HostMode;
use crate::controls::{EntryControls, Primary};
use crate::encoding::Area;
use crate::exit::{ExitReason, IoAccess};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::FieldTable;
use crate::insn::VmxOperation;
use crate::merge::{MSR_AREA_ROOM, MsrEntry};
use crate::mitigations::Mitigations;
use crate::msr::BITMAP_BYTES;
use crate::nested::write_traps::kept_at_first;
use crate::nested::*;
use crate::outcome::{Fault, rflags_succeed};
use crate::permission::{Access as FieldAccess, Permissions};
use crate::registers::*;
use crate::sync::SyncSets;
use crate::watch::{MergedAs, MergedBitmap, ProcessorWritten, SLOTS, WatchedPages, Watches};

/// Register state: a word for each field that loads and saves it, by row number.
pub type Words = [u64; FIELD_COUNT];

/// The VMXON region of a [`FakeMachine`].
pub const VMXON_REGION: u64 = 0x4000;
/// The address of its memory operands.
pub const OPERAND: u64 = 0x7000;

/// Instruction information of registers as both operands.
pub const REGISTER_OPERANDS: u32 = 1 << 10;
/// Instruction information of a displacement in DS with 64-bit addresses.
pub const MEMORY_OPERAND: u32 = 1 << 27 | 1 << 22 | 3 << 15 | 2 << 7;

/// Registers of a guest hypervisor in 64-bit mode with the paging of [`Ram::with_paging`].
pub fn hypervisor_registers() -> Words {
    let mut words = [0; FIELD_COUNT];
    let mut set = |id: FieldId, value: u64| words[id.row()] = value;
    set(GUEST_CR0.id(), CR0_PE | CR0_PG | CR0_NE);
    set(GUEST_CR3.id(), Ram::PML4);
    set(GUEST_CR4.id(), CR4_PAE | CR4_VMXE);
    set(GUEST_EFER.id(), EFER_LME | EFER_LMA);
    set(GUEST_PAT.id(), 0x0007_0406_0007_0406);
    set(GUEST_RFLAGS.id(), 2);
    set(GUEST_RIP.id(), 0x1000);
    set(GUEST_DR7.id(), 0x400);
    set(GUEST_CS_ACCESS_RIGHTS.id(), access_rights::CODE_64.into());
    for field in [GUEST_DS_ACCESS_RIGHTS, GUEST_ES_ACCESS_RIGHTS, GUEST_SS_ACCESS_RIGHTS] {
        set(field.id(), access_rights::DATA.into());
    }
    words
}

/// The VMCSs. The fake caches no field; all it remembers is whether vmcs02 is a shadow VMCS at the moment.
#[derive(Debug)]
pub struct FakeVmcss {
    /// vmcs01, whose guest-state area has the registers of the guest hypervisor.
    pub vmcs01: FakeVmcs,
    /// vmcs02.
    pub vmcs02: FakeVmcs,
    shadow02: FakeVmcs,
    vmcs02_shadows: bool,
}

impl VmcsPair for FakeVmcss {
    type Current = FakeVmcs;
    type Shadow = FakeVmcs;

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

/// The guest hypervisor's memory behind EPT01.
#[derive(Debug)]
pub struct FakeWatchedMemory {
    /// Its content.
    pub ram: Ram,
    tables: Tables,
    ept01: Eptp01,
    watched: &'static [WatchedPages; MergedAs::COUNT],
    watches: [Watches; MergedAs::COUNT],
    written: &'static ProcessorWritten,
}

fn is_protected(tables: &Tables, ept01: Eptp01, page: Gpa) -> bool {
    lookup(tables, ept01, page).is_some_and(|found| !found.leaf.rights(ExecuteControl::UNIFORM).contain(Rights::WRITE))
}

impl GuestMemory for FakeWatchedMemory {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        self.ram.read(from, to);
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        self.unwatch(to);
        self.ram.write(to, from);
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        self.unwatch(at);
        self.ram.compare_exchange_u64(at, seen, new)
    }

    fn translate(&self, address: Gpa) -> Hpa {
        Hpa(address.0)
    }
}

impl WatchedMemory for FakeWatchedMemory {
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

    fn written(&self) -> &ProcessorWritten {
        self.written
    }

    fn is_host(&self, _: Gpa) -> bool {
        false
    }
}

/// The processor and its surroundings.
#[derive(Debug)]
pub struct FakeHardware {
    ept01: Eptp01,
    /// Guest-physical translations that the processor keeps.
    pub tlb: RefCell<Tlb>,
    /// MSRs; all others read as 0.
    pub msrs: RefCell<BTreeMap<u32, u64>>,
    /// Accesses to ports that the host looks at, with what they write.
    pub port_accesses: RefCell<Vec<(IoAccess, u32)>>,
    flushes: Cell<u64>,
    flushed: Cell<u64>,
    /// How often the logic must ask about a flush until another processor has taken part in it.
    lag: Cell<u32>,
    /// The next INIT is the host's own.
    pub is_kicked: Cell<bool>,
    /// The logic has asked for [`nmi::pass_on`].
    pub nmi_requested: Cell<bool>,
    /// Exits that the guest hypervisor got.
    pub reflected: Cell<u64>,
    watched: &'static [WatchedPages; MergedAs::COUNT],
    written: &'static ProcessorWritten,
}

impl Machine for FakeHardware {
    type Registers = Vec<u64>;
    type Vmcss = FakeVmcss;
    type Memory = FakeWatchedMemory;
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

    fn access_port(&self, access: IoAccess, value: u32) -> u32 {
        self.port_accesses.borrow_mut().push((access, value));
        u32::MAX
    }

    fn pkru(&self) -> u32 {
        0
    }

    fn set_cr2(&self, _: u64) {}

    fn note_task_switch_trap(&self) {}

    fn ept01(&self) -> Eptp01 {
        self.ept01
    }

    fn map_beyond(&self, _: &mut Tables, _: Gpa) -> Result<bool, OutOfTables> {
        Ok(false)
    }

    fn map_to_nothing(&self, _: Gpa) {}

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
        if self.written.contains(page)
            || set_rights(tables, self.ept01, page, Rights::READ.or(Rights::EXECUTE)).is_err()
        {
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

    fn stop(&self, why: Stop) -> ! {
        panic!("{why:?}");
    }
}

/// Properties in which machines differ and that no guest hypervisor can see.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// VMCS shadowing for the hypervisor.
    pub shadowing: bool,
    /// Tables for EPT01 and EPT02s.
    pub tables: u64,
    /// What is done about the processor's speculation.
    pub mitigations: Mitigations,
}

impl Default for Variant {
    /// With VMCS shadowing, tables for hundreds of pages, and no mitigations.
    fn default() -> Self {
        Self { shadowing: true, tables: 400, mitigations: Mitigations::NONE }
    }
}

/// A guest hypervisor on the nested logic.
#[derive(Debug)]
pub struct FakeMachine {
    /// Its processor.
    pub vcpu: Vcpu<FakeHardware>,
}

/// How long each instruction is.
const INSTRUCTION_LENGTH: u64 = 3;

fn leak<T>(value: T) -> &'static mut T {
    Box::leak(Box::new(value))
}

fn msr_area(address: u64) -> MsrArea {
    MsrArea { entries: leak([MsrEntry::default(); MSR_AREA_ROOM]), address: Hpa(address) }
}

fn bitmap(address: u64) -> MergedBitmap {
    MergedBitmap { bytes: vec![0; BITMAP_BYTES].leak(), address: Hpa(address) }
}

impl FakeMachine {
    /// A machine whose guest hypervisor has just executed VMXON: in 64-bit mode at CPL 0, with these registers, in
    /// memory that [`Ram::with_paging`] has made.
    ///
    /// # Panics
    ///
    /// VMXON fails, or `variant` has too few tables.
    pub fn new(words: &Words, ram: Ram, variant: Variant) -> Self {
        let caps = skylake_caps();
        let offered = caps.offered(&Policy::EVERYTHING);
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
        let (watched, written): (&'static _, &'static _) = (watched, leak(ProcessorWritten::new()));
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
            vmcs: FakeVmcss {
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
            nested: Nested::new(
                kept_at_first(&caps),
                NestedEpt::new(ept01, NestedPaging::new(features)),
                msr_bitmaps,
                MsrAreas::new(msr_area(0x62_0000_0000), msr_area(0x64_0000_0000), &variant.mitigations),
                None,
            ),
            memory: FakeWatchedMemory {
                ram,
                tables: tables.clone(),
                ept01,
                watched,
                watches: watched.each_ref().map(Watches::new),
                written,
            },
            tables,
            msr_bitmaps01: [Hpa(0x65_0000_0000), Hpa(0x65_0000_1000)],
            undo: None,
            init_blocked: false,
            machine: FakeHardware {
                ept01,
                tlb: RefCell::default(),
                msrs: RefCell::default(),
                port_accesses: RefCell::default(),
                flushes: Cell::new(0),
                flushed: Cell::new(0),
                lag: Cell::new(0),
                is_kicked: Cell::new(false),
                nmi_requested: Cell::new(false),
                reflected: Cell::new(0),
                watched,
                written,
            },
            caps,
            offered,
        };
        for id in vcpu.offered_fields.iter().filter(|id| id.encoding().area() == Area::Guest) {
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
        vcpu.vmcs.vmcs02.write(ENTRY_MSR_LOAD_COUNT, vcpu.nested.areas.entry_load_count);
        let mut machine = Self { vcpu };
        machine.vcpu.memory.ram.write_u32(Gpa(VMXON_REGION), Policy::EVERYTHING.revision);
        let outcome = machine.instruction(ExitReason::VMXON, MEMORY_OPERAND, VMXON_REGION);
        assert!(outcome.is_ok() && machine.vcpu.vmx.vmxon_region.is_some(), "VMXON");
        for id in [GUEST_RIP.id(), GUEST_RFLAGS.id()] {
            machine.vcpu.vmcs.vmcs01.poke(id, words[id.row()]);
        }
        machine
    }

    /// An instruction with a quadword in memory as its operand: VMXON, VMPTRLD, VMCLEAR; or INVEPT, with its type in
    /// the register that `info` names.
    ///
    /// # Errors
    ///
    /// The instruction faults.
    pub fn instruction(&mut self, reason: ExitReason, info: u32, operand: u64) -> Result<(), Fault> {
        self.vcpu.memory.ram.write_u64(Gpa(OPERAND), operand);
        self.vcpu.vmcs.vmcs01.poke(EXIT_QUALIFICATION.id(), OPERAND);
        let outcome = self.exit(reason, info);
        self.vcpu.memory.ram.write_u64(Gpa(OPERAND), 0);
        outcome
    }

    /// VMPTRLD of a region, which gets the revision identifier.
    ///
    /// # Errors
    ///
    /// The instruction faults. RFLAGS report a VMfail.
    pub fn vmptrld(&mut self, region: u64) -> Result<(), Fault> {
        self.vcpu.memory.ram.write_u32(Gpa(region), Policy::EVERYTHING.revision);
        self.instruction(ExitReason::VMPTRLD, MEMORY_OPERAND, region)
    }

    /// VMWRITE. A live field of a current VMCS is written in vmcs02, without an exit.
    ///
    /// # Errors
    ///
    /// The instruction faults. RFLAGS report a VMfail.
    pub fn vmwrite(&mut self, id: FieldId, value: u64) -> Result<(), Fault> {
        if self.is_live(id) {
            self.vcpu.vmcs.vmcs02.poke(id, value);
            self.complete();
            return Ok(());
        }
        self.vcpu.registers[RAX] = value;
        self.field_access(ExitReason::VMWRITE, id)
    }

    /// VMREAD. Returns RAX, which stays as it was if the instruction fails.
    ///
    /// # Errors
    ///
    /// The instruction faults.
    pub fn vmread(&mut self, id: FieldId) -> Result<u64, Fault> {
        if self.is_live(id) {
            self.complete();
            return Ok(self.vcpu.vmcs.vmcs02.read_raw(id));
        }
        self.field_access(ExitReason::VMREAD, id)?;
        Ok(self.vcpu.registers[RAX])
    }

    fn is_live(&self, id: FieldId) -> bool {
        self.vcpu.vmcs.vmcs02_shadows && self.vcpu.live_fields.contains(id)
    }

    /// Completes an instruction that does not exit.
    fn complete(&mut self) {
        self.vcpu.vmcs.vmcs01.poke(EXIT_INSTRUCTION_LENGTH.id(), INSTRUCTION_LENGTH);
        self.vcpu.advance_with_flags(rflags_succeed);
    }

    fn field_access(&mut self, reason: ExitReason, id: FieldId) -> Result<(), Fault> {
        self.vcpu.registers[RCX] = id.encoding().0.into();
        self.exit(reason, REGISTER_OPERANDS | (RAX as u32) << 3 | (RCX as u32) << 28)
    }

    /// An exit of vmcs01 for a VMX instruction.
    ///
    /// # Errors
    ///
    /// The instruction faults.
    pub fn exit(&mut self, reason: ExitReason, info: u32) -> Result<(), Fault> {
        let vmcs01 = &mut self.vcpu.vmcs.vmcs01;
        vmcs01.poke(EXIT_REASON.id(), reason.0.into());
        vmcs01.poke(EXIT_INSTRUCTION_INFO.id(), info.into());
        vmcs01.poke(EXIT_INSTRUCTION_LENGTH.id(), INSTRUCTION_LENGTH);
        if handle_quickly(&mut self.vcpu, reason) {
            return Ok(());
        }
        let action = match reason {
            ExitReason::VMLAUNCH | ExitReason::VMRESUME => instructions::launch(&mut self.vcpu, reason),
            _ => instructions::handle(&mut self.vcpu, reason),
        };
        match action {
            Action::Resume => Ok(()),
            Action::Advance => {
                self.vcpu.advance();
                Ok(())
            }
            Action::Inject(fault) => Err(fault),
        }
    }

    /// An exit of vmcs02 with this qualification.
    pub fn nested_exit(&mut self, reason: ExitReason, qualification: u64) {
        let vmcs02 = &mut self.vcpu.vmcs.vmcs02;
        vmcs02.poke(EXIT_REASON.id(), reason.0.into());
        vmcs02.poke(EXIT_QUALIFICATION.id(), qualification);
        handle(&mut self.vcpu, reason);
    }

    /// Loads the MSRs that the next entry of vmcs01 loads, and returns them.
    pub fn load_host_msrs(&mut self) -> Vec<MsrEntry> {
        let count = self.vcpu.vmcs.vmcs01.read(ENTRY_MSR_LOAD_COUNT) as usize;
        let entries = self.vcpu.nested.areas.host_load.entries[..count].to_vec();
        self.vcpu.machine.msrs.borrow_mut().extend(entries.iter().map(|entry| (entry.index, entry.value)));
        entries
    }
}
