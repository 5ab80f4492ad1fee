//! A logical processor as the guest hypervisor sees it: its registers, its VMCSs, its VMX operation.

use boot::cmdline::TripleFault;
use ept::nested::NestedPaging;
use ept::violation::EptViolation;
use ept::walk::Ept12;
use ept::{Eptp, Hpa, NestedGpa};
use shadow::check::HostMode;
use shadow::controls::EntryControls;
use shadow::cpuid::CpuidView;
use shadow::event::{BLOCKING_BY_MOV_SS, BLOCKING_BY_STI};
use shadow::fields::*;
use shadow::host_load::{HostImage, Kept};
use shadow::hw::VmcsAccess;
use shadow::index::FieldTable;
use shadow::insn::{SyncStale, VmxOperation};
use shadow::linear::Paging;
use shadow::merge::{MSR_AREA_ENTRIES, MsrEntry};
use shadow::msr::IA32_PKRS;
use shadow::passing;
use shadow::registers::{CR4_PKE, CR4_PKS, RFLAGS_TF, access_rights};
use shadow::sync::{SyncSets, save_stale, save_stale_field};
use shadow::{Field, FieldId, FieldSet, Vmcs12, VmxCaps};

use crate::arch::enter::GuestRegisters;
use crate::arch::vmx::VmcsPair;
use crate::arch::{cpu, msr};
use crate::ept01::Ept01;
use crate::exit::Undo;
use crate::hw::GuestPhysical;
use crate::nested::{Displaced, Onward};
use crate::processor::Processor;
use crate::shadow_fields::ShadowFields;
use crate::tables::TablePool;
use crate::watch::SLOTS;

/// Who runs in VMX non-root operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// The guest hypervisor, on vmcs01.
    GuestHypervisor,
    /// The nested guest, on vmcs02.
    Nested,
}

/// The VPID of the guest hypervisor.
pub const VPID01: u16 = 1;
/// The VPID of nested guests that have none of their own: without VPID12, or with one of the two highest.
pub const SHARED_VPID02: u16 = u16::MAX;

/// The VPID of nested guests with a VPID12; 0 is none.
pub const fn vpid02(vpid12: u16) -> u16 {
    match vpid12 {
        0 | u16::MAX => SHARED_VPID02,
        _ => vpid12 + VPID01,
    }
}

/// An MSR area of the host's own that the processor works through, and its address.
#[derive(Debug)]
pub struct MsrArea {
    /// The entries.
    pub entries: &'static mut [MsrEntry; MSR_AREA_ENTRIES],
    /// Where they are.
    pub address: Hpa,
}

/// A bitmap of the host's, merged from one of the guest hypervisor's.
#[derive(Debug)]
pub struct MergedBitmap {
    /// Its content.
    pub bytes: &'static mut [u8],
    /// Where it is.
    pub address: Hpa,
}

/// What vmcs02 holds now of the things that its merge does not track by field.
#[derive(Debug)]
pub struct Nested {
    /// Its EPTP field.
    pub eptp02: Eptp,
    /// The EPT12 that this stands for; none if it is EPT01's.
    pub ept12: Option<Ept12>,
    /// VMCS12 wants #VE for what EPT12 refuses.
    pub converts_violations: bool,
    /// VMCS12 has page-modification logging.
    pub logs_pages: bool,
    /// The VPID12 that its VPID stands for; 0 is none.
    pub vpid12: u16,
    /// The last merge found that entries need no more than `merge::prepare_unchanged` as long as VMCS12 is unchanged.
    pub short_entry: bool,
    /// And that exits need no more than VMCS12's host state.
    pub short_exit: bool,
    /// VMCS12's host state as vmcs01 gets it.
    pub host_image: HostImage,
    /// What vmcs01 still has of it.
    pub kept: Kept,
    /// The mode of the guest hypervisor, which cannot change in VMX operation.
    pub host_mode: HostMode,
    /// The bits of a register operand in that mode.
    pub operand_mask: u64,
    /// The EPT violation that was reflected last: when the guest hypervisor has repaired EPT12, EPT02 gets the translation before the
    /// nested guest runs again.
    pub violation: Option<(NestedGpa, EptViolation)>,
    /// VMLAUNCH or VMRESUME was carried out, and the processor has not said yet what it thinks of the VMCS.
    pub entering: bool,
    /// VMCS12's injection fields while vmcs02 has the host's.
    pub displaced: Option<Displaced>,
    /// Entries of the VM-exit MSR-store area that the processor stores.
    pub exit_store_count: u32,
    /// The cache of EPT02s.
    pub paging: NestedPaging,
    /// Merged MSR bitmaps, by the slot of the watched page that they were merged from.
    pub msr_bitmaps: [MergedBitmap; SLOTS],
    /// The one that vmcs02 has.
    pub msr_bitmap_slot: usize,
    /// VMCS shadowing of nested hypervisors, where it is offered.
    pub onward: Option<&'static mut Onward>,
    /// Entries of vmcs02's VM-entry MSR-load area in use.
    pub entry_load_count: u32,
    /// vmcs01's next entry loads the MSRs of VMCS12's VM-exit MSR-load area.
    pub loading_host_msrs: bool,
    /// VMCS12's values of guest-state fields in which vmcs02 has registers that the nested guest inherits: an entry that fails saves none.
    pub displaced_registers: passing::Values,
    /// vmcs01 loads passing registers, until the next VMLAUNCH or VMRESUME.
    pub loading_registers: bool,
    /// VM-entry MSR-load area of vmcs02.
    pub entry_load: MsrArea,
    /// VM-exit MSR-store area of vmcs02.
    pub exit_store: MsrArea,
    /// VM-entry MSR-load area of vmcs01: the VM-exit MSR-load area of VMCS12.
    pub exit_load: MsrArea,
}

/// The processor.
#[derive(Debug)]
pub struct Vcpu {
    /// General-purpose registers.
    pub registers: GuestRegisters,
    /// Its VMCSs.
    pub vmcs: VmcsPair,
    /// Who runs.
    pub level: Level,
    /// What the processor has.
    pub caps: VmxCaps,
    /// What the guest hypervisor is offered.
    pub offered: VmxCaps,
    /// The fields that go with that.
    pub offered_fields: FieldSet,
    /// What CPUID tells it.
    pub cpuid: &'static CpuidView,
    /// Those that it accesses without an exit.
    pub shadow_fields: &'static ShadowFields,
    /// Those that [`crate::exit::short`] may handle.
    pub short_table: &'static FieldTable,
    /// The field sets that go with it.
    pub sync_sets: SyncSets,
    /// VMX operation of the guest hypervisor.
    pub vmx: VmxOperation,
    /// The state of nesting.
    pub nested: Nested,
    /// The guest hypervisor's memory.
    pub memory: GuestPhysical,
    /// The tables of EPT01 and EPT02.
    pub tables: TablePool,
    /// MSR bitmaps of vmcs01: without and with the writes that a trap catches.
    pub msr_bitmaps01: [Hpa; 2],
    /// EPT01.
    pub ept01: &'static Ept01,
    /// What the last emulated access to CR0 or CR4 changed.
    pub undo: Option<Undo>,
    /// An INIT arrived in VMX root operation and waits for VM entry or VMXOFF.
    pub init_blocked: bool,
    /// What it shows the other processors, counters included.
    pub processor: &'static Processor,
    /// Whether a guest may have them printed: the option `stats`.
    pub prints_stats: bool,
    /// What a triple fault does: the option `triple-fault`.
    pub on_triple_fault: TripleFault,
    /// Whether VMCALL may be a hypercall: the option `hypercalls`.
    pub takes_hypercalls: bool,
}

/// vmcs02 as the source of stale guest state.
pub struct StaleIn<'a>(pub &'a mut VmcsPair);

impl SyncStale for StaleIn<'_> {
    #[cold]
    fn sync_stale(&mut self, vmcs12: &mut Vmcs12) {
        self.0.access_vmcs02(|vmcs02| save_stale(vmcs02, vmcs12));
    }

    #[cold]
    fn sync_field(&mut self, vmcs12: &mut Vmcs12, id: FieldId) -> u64 {
        self.0.access_vmcs02(|vmcs02| save_stale_field(vmcs02, vmcs12, id))
    }

    #[cold]
    fn write_live(&mut self, id: FieldId, word: u64) {
        self.0.access_vmcs02(|vmcs02| vmcs02.write_raw(id, word));
    }
}

/// The number of RSP, whose value is in the VMCS.
pub const RSP: usize = 4;

impl Vcpu {
    /// A general-purpose register of the guest hypervisor.
    #[inline]
    pub fn gpr(&mut self, number: usize) -> u64 {
        if number == RSP { self.vmcs.vmcs01().read(GUEST_RSP) } else { self.registers.gpr[number] }
    }

    /// Sets one.
    #[inline]
    pub fn set_gpr(&mut self, number: usize, value: u64) {
        if number == RSP {
            self.vmcs.vmcs01().write(GUEST_RSP, value);
        } else {
            self.registers.gpr[number] = value;
        }
    }

    /// EDX:EAX, as RDMSR, WRMSR and XSETBV have it.
    pub fn edx_eax(&self) -> u64 {
        self.registers.gpr[2] << 32 | self.registers.gpr[0] & 0xffff_ffff
    }

    /// Sets EDX:EAX; the upper halves of RDX and RAX become 0.
    pub fn set_edx_eax(&mut self, value: u64) {
        self.registers.gpr[0] = value & 0xffff_ffff;
        self.registers.gpr[2] = value >> 32;
    }

    /// ECX.
    pub fn ecx(&self) -> u32 {
        self.registers.gpr[1] as u32
    }

    /// The guest hypervisor's current privilege level: SS.DPL.
    pub fn cpl(&mut self) -> u8 {
        (self.vmcs.vmcs01().read(GUEST_SS_ACCESS_RIGHTS) >> 5 & 3) as u8
    }

    /// Whether the guest hypervisor is in IA-32e mode.
    pub fn in_ia32e_mode(&mut self) -> bool {
        self.vmcs.vmcs01().read(ENTRY_CONTROLS) & EntryControls::IA32E_MODE_GUEST.bits() != 0
    }

    /// The guest hypervisor's paging, for the operands of its VMX instructions.
    pub fn paging(&mut self) -> Paging {
        let physical_bits = self.caps.physical_bits;
        let vmcs01 = self.vmcs.vmcs01();
        let cr4 = vmcs01.read(GUEST_CR4);
        Paging {
            cr0: vmcs01.read(GUEST_CR0),
            cr3: vmcs01.read(GUEST_CR3),
            cr4,
            efer: vmcs01.read(GUEST_EFER),
            rflags: vmcs01.read(GUEST_RFLAGS),
            physical_bits,
            pkru: if cr4 & CR4_PKE != 0 { cpu::pkru() } else { 0 },
            pkrs: if cr4 & CR4_PKS != 0 { msr::try_read(IA32_PKRS).unwrap_or(0) as u32 } else { 0 },
        }
    }

    /// A field of VMCS12 right after an exit of its nested guest, while vmcs02 is current anyway.
    #[inline]
    pub fn vmcs12_field<T: FieldValue>(&mut self, field: Field<T>) -> T {
        if self.vmx.vmcs12.stale.contains(field.id()) {
            self.vmcs.vmcs02().read(field)
        } else {
            self.vmx.vmcs12.get(field)
        }
    }

    /// Sets exit information, wherever the guest hypervisor will look for it.
    #[inline]
    pub fn set_exit_info<T: FieldValue>(&mut self, field: Field<T>, value: T) {
        if self.vmx.vmcs12.live.contains(field.id()) {
            self.vmcs.vmcs02().write(field, value);
        } else {
            self.vmx.vmcs12.set_synced(field.id(), value.into_word());
        }
    }

    /// Moves the guest of the current level over the instruction that exited.
    pub fn advance(&mut self) {
        match self.level {
            Level::GuestHypervisor => advance(&mut self.vmcs.vmcs01(), |rflags| rflags),
            Level::Nested => advance(&mut self.vmcs.vmcs02(), |rflags| rflags),
        }
    }

    /// The same for an instruction of the guest hypervisor that changes RFLAGS, but not TF.
    pub fn advance_with_flags(&mut self, change: impl FnOnce(u64) -> u64) {
        advance(&mut self.vmcs.vmcs01(), change);
    }
}

/// Completes an instruction in software: RIP moves on, the instruction's shadow ends, and a single step traps.
#[inline(always)]
fn advance(vmcs: &mut impl VmcsAccess, change_flags: impl FnOnce(u64) -> u64) {
    const BLOCKING_BY_STI_OR_MOV_SS: u32 = BLOCKING_BY_STI | BLOCKING_BY_MOV_SS;
    const PENDING_BS: u64 = 1 << 14;
    let rip = vmcs.read(GUEST_RIP);
    let mut next = rip.wrapping_add(vmcs.read(EXIT_INSTRUCTION_LENGTH).into());
    if next >> 32 != rip >> 32 && vmcs.read(GUEST_CS_ACCESS_RIGHTS) & access_rights::LONG == 0 {
        next &= 0xffff_ffff;
    }
    vmcs.write(GUEST_RIP, next);
    let interruptibility = vmcs.read(GUEST_INTERRUPTIBILITY);
    if interruptibility & BLOCKING_BY_STI_OR_MOV_SS != 0 {
        vmcs.write(GUEST_INTERRUPTIBILITY, interruptibility & !BLOCKING_BY_STI_OR_MOV_SS);
    }
    let rflags = vmcs.read(GUEST_RFLAGS);
    let changed = change_flags(rflags);
    if changed != rflags {
        vmcs.write(GUEST_RFLAGS, changed);
    }
    if rflags & RFLAGS_TF != 0 {
        let pending = vmcs.read(GUEST_PENDING_DEBUG);
        vmcs.write(GUEST_PENDING_DEBUG, pending | PENDING_BS);
    }
}
