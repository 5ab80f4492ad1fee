//! A logical processor of the guest hypervisor: its registers, its VMCSs, its VMX operation.

use ept::nested::NestedPaging;
use ept::violation::EptViolation;
use ept::walk::Ept12;
use ept::{Eptp01, Eptp02, Gpa, Hpa, NestedGpa};

use super::held_ports::HeldPorts;
use super::machine::{Machine, VmcsPair};
use crate::check::HostMode;
use crate::controls::EntryControls;
use crate::event::{BLOCKING_BY_MOV_SS, BLOCKING_BY_STI};
use crate::fields::*;
use crate::host_load::{HostImage, Kept};
use crate::hw::VmcsAccess;
use crate::index::FieldTable;
use crate::insn::{SyncStale, VmxOperation};
use crate::linear::{AccessMode, Paging};
use crate::merge::{MSR_AREA_ROOM, MsrEntry};
use crate::mitigations::Mitigations;
use crate::msr::IA32_PKRS;
use crate::outcome::Fault;
use crate::passing;
use crate::policy::IoExits;
use crate::registers::{CR4_PKE, CR4_PKS, RAX, RCX, RDX, RFLAGS_TF, RSP, access_rights};
use crate::sync::{SyncSets, save_stale, save_stale_field};
use crate::vmcs12::LaunchState;
use crate::watch::{MergedBitmap, SLOTS};
use crate::{Field, FieldId, FieldSet, Vmcs12, VmxCaps};

/// Which VMCS the processor enters next, and what the last transition left to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Running {
    /// vmcs01.
    GuestHypervisor,
    /// vmcs01, whose next entry also loads the MSRs of VMCS12's VM-exit MSR-load area.
    GuestHypervisorLoadingMsrs,
    /// vmcs02, for VMLAUNCH or VMRESUME: the processor has not accepted the entry yet.
    Entering,
    /// vmcs02: the nested guest has run since its hypervisor entered it.
    NestedGuest,
}

impl Running {
    /// Whether the nested guest runs next.
    #[inline(always)]
    pub const fn is_nested(self) -> bool {
        matches!(self, Self::Entering | Self::NestedGuest)
    }
}

/// The VPID of the guest hypervisor.
pub const VPID01: u16 = 1;
/// The VPID that nested guests share if they have no VPID12, or one of the two highest VPID12s.
pub const SHARED_VPID02: u16 = u16::MAX;

/// The VPID of nested guests with this VPID12; 0 stands for none.
pub const fn vpid02(vpid12: u16) -> u16 {
    match vpid12 {
        0 | u16::MAX => SHARED_VPID02,
        _ => vpid12 + VPID01,
    }
}

/// A VM-entry or VM-exit MSR area in the host's memory, which the processor loads from or stores to.
#[derive(Debug)]
pub struct MsrArea {
    /// The entries.
    pub entries: &'static mut [MsrEntry; MSR_AREA_ROOM],
    /// Their address.
    pub address: Hpa,
}

/// What the run loop does after an exit of the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Runs the guest again at the same RIP.
    Resume,
    /// Runs the guest after the instruction that exited.
    Advance,
    /// Gives the guest an exception.
    Inject(Fault),
}

/// Fields that an emulated access to CR0 or CR4 changes.
pub(super) const UNDO_FIELDS: usize = 14;

/// What the last emulated access to CR0 or CR4 changed. VM entry checks more of the result than the host does: if it
/// fails, the access is undone.
#[derive(Clone, Copy, Debug)]
pub struct Undo {
    pub(super) before: [u64; UNDO_FIELDS],
    pub(super) after: [u64; UNDO_FIELDS],
}

/// VMCS12's values of the injection fields, as an exit leaves the fields.
#[derive(Clone, Copy, Debug)]
pub struct Displaced {
    pub(super) info: u32,
    pub(super) error_code: u32,
    pub(super) instruction_length: u32,
}

/// Work that transitions may skip, as the last full merge found. Both flags are valid as long as VMCS12 is unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shortcut {
    /// Entries need no more than [`crate::merge::rewrite`].
    pub entry: bool,
    /// Exits need no more than to load VMCS12's host state.
    pub exit: bool,
    /// Whose the exits of I/O instructions are.
    pub io: IoExits,
}

/// The host's state for VMCS shadowing of hypervisors that run as nested guests.
#[derive(Debug)]
pub struct NestedShadowing {
    /// The host's shadow VMCS.
    pub(super) shadow02: Hpa,
    /// The region whose content the host's shadow VMCS has.
    pub(super) content: Option<Gpa>,
    /// Fields that the processor has and the guest hypervisor is not offered, in the format of a VMREAD bitmap.
    pub(super) hidden: &'static [u8],
    /// Merged VMREAD bitmaps and merged VMWRITE bitmaps, by the slots of the watched pages that they were merged from.
    pub(super) bitmaps: [[MergedBitmap; SLOTS]; 2],
}

/// EPT of the nested guest: the EPTP of vmcs02, and the cache of EPT02s.
#[derive(Debug)]
pub struct NestedEpt {
    /// vmcs02's EPTP.
    pub eptp02: Eptp02,
    /// The EPT12 that vmcs02's EPTP stands for; `None` if it is EPT01's.
    pub ept12: Option<Ept12>,
    /// VMCS12 enables #VE for violations of EPT12.
    pub converts_violations: bool,
    /// VMCS12 enables page-modification logging.
    pub logs_pages: bool,
    /// The EPT violation that was reflected last. If the guest hypervisor repairs EPT12, EPT02 gets the translation
    /// before the nested guest runs again.
    pub violation: Option<(NestedGpa, EptViolation)>,
    /// The cache.
    pub cache: NestedPaging,
}

impl NestedEpt {
    /// The state in which vmcs02 has EPT01.
    pub const fn new(ept01: Eptp01, cache: NestedPaging) -> Self {
        Self {
            eptp02: ept01.without_ept12(),
            ept12: None,
            converts_violations: false,
            logs_pages: false,
            violation: None,
            cache,
        }
    }
}

/// MSR areas that the processor uses in place of VMCS12's.
#[derive(Debug)]
pub struct MsrAreas {
    /// VM-entry MSR-load area of vmcs02: a copy of VMCS12's, and the host's own entries behind it.
    pub entry_load: MsrArea,
    /// Its entries in use.
    pub entry_load_count: u32,
    /// Its entries that are the host's own, for every entry.
    own: &'static [MsrEntry],
    /// VM-entry MSR-load area of vmcs01: the VM-exit MSR-load area of VMCS12.
    pub host_load: MsrArea,
}

impl MsrAreas {
    /// No area has an entry of VMCS12.
    pub fn new(entry_load: MsrArea, host_load: MsrArea, mitigations: &Mitigations) -> Self {
        let mut areas = Self { entry_load, entry_load_count: 0, own: mitigations.at_entry(), host_load };
        areas.put_own_behind(0);
        areas
    }

    /// The host's own entries of the VM-entry load area follow the first `count`, which are copies of VMCS12's.
    pub fn put_own_behind(&mut self, count: u32) {
        for (entry, own) in self.entry_load.entries[count as usize..].iter_mut().zip(self.own) {
            *entry = *own;
        }
        self.entry_load_count = count + self.own.len() as u32;
    }

    /// Whether the VM-entry load area has nothing of VMCS12's.
    pub const fn has_only_own(&self) -> bool {
        self.entry_load_count == self.own.len() as u32
    }
}

/// The state of vmcs01 and vmcs02 that the merge does not track by field.
#[derive(Debug)]
pub struct Nested {
    /// The work that the next exit and the next entry may skip.
    pub shortcut: Shortcut,
    /// VMCS12's host state as vmcs01 gets it.
    pub host_image: HostImage,
    /// The parts of the image that vmcs01 still holds.
    pub kept: Kept,
    /// An NMI waits until the nested guest exits by the monitor trap flag, which the host has then set. The injection
    /// fields are displaced.
    pub nmi_waits: bool,
    /// VMCS12's injection fields while vmcs02's hold the host's values.
    pub displaced: Option<Displaced>,
    /// EPT of the nested guest.
    pub ept: NestedEpt,
    /// The VPID12 that vmcs02's VPID stands for; 0 is none.
    pub vpid12: u16,
    /// vmcs02's link pointer.
    pub link02: u64,
    /// Merged MSR bitmaps, by the slot of the watched page that they were merged from.
    pub msr_bitmaps: [MergedBitmap; SLOTS],
    /// The slot of the merged MSR bitmap that vmcs02 has.
    pub msr_bitmap_slot: usize,
    /// MSR areas.
    pub areas: MsrAreas,
    /// Ports that the host looks at, where there are any.
    pub ports: Option<&'static mut HeldPorts>,
    /// VMCS shadowing of nested hypervisors, where it is offered.
    pub shadowing: Option<&'static mut NestedShadowing>,
    /// VMCS12's values of the guest-state fields in which vmcs02 holds registers that the nested guest inherits: an
    /// entry that fails saves no registers.
    pub displaced_registers: passing::Values,
}

impl Nested {
    /// The state before the first entry. vmcs02 has the first of the MSR bitmaps.
    pub fn new(
        kept: Kept,
        ept: NestedEpt,
        msr_bitmaps: [MergedBitmap; SLOTS],
        areas: MsrAreas,
        shadowing: Option<&'static mut NestedShadowing>,
    ) -> Self {
        Self {
            shortcut: Shortcut::default(),
            host_image: HostImage::default(),
            kept,
            nmi_waits: false,
            displaced: None,
            ept,
            vpid12: 0,
            link02: u64::MAX,
            msr_bitmaps,
            msr_bitmap_slot: 0,
            areas,
            ports: None,
            shadowing,
            displaced_registers: passing::Values::new(),
        }
    }
}

/// A logical processor.
#[derive(Debug)]
pub struct Vcpu<M: Machine> {
    /// General-purpose registers of the guest that runs.
    pub registers: M::Registers,
    /// The VMCSs.
    pub vmcs: M::Vmcss,
    /// Which guest runs.
    pub running: Running,
    /// The processor's capabilities.
    pub caps: VmxCaps,
    /// The capabilities that the guest hypervisor is offered.
    pub offered: VmxCaps,
    /// The fields that the guest hypervisor is offered.
    pub offered_fields: FieldSet,
    /// Fields that the guest hypervisor accesses in vmcs02 itself, by VMCS shadowing.
    pub live_fields: FieldSet,
    /// The offered fields by their encodings.
    pub field_table: &'static FieldTable,
    /// The offered fields that the short way of VMREAD and VMWRITE may handle.
    pub quick_table: &'static FieldTable,
    /// The field sets of the synchronisation.
    pub sync_sets: SyncSets,
    /// VMX operation of the guest hypervisor.
    pub vmx: VmxOperation,
    /// The mode of the guest hypervisor, which cannot change in VMX operation.
    pub mode: HostMode,
    /// The state of nesting.
    pub nested: Nested,
    /// The guest hypervisor's memory.
    pub memory: M::Memory,
    /// The tables of EPT01 and EPT02.
    pub tables: M::Tables,
    /// MSR bitmaps of vmcs01: without and with the writes that a trap catches.
    pub msr_bitmaps01: [Hpa; 2],
    /// What the last emulated access to CR0 or CR4 changed.
    pub undo: Option<Undo>,
    /// An INIT arrived in VMX root operation and waits for VM entry or VMXOFF.
    pub init_blocked: bool,
    /// The rest of the processor and its surroundings.
    pub machine: M,
}

/// vmcs02 as the source of stale guest state.
pub struct StaleIn<'a, Vmcss>(pub &'a mut Vmcss);

impl<Vmcss: VmcsPair> SyncStale for StaleIn<'_, Vmcss> {
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

impl<M: Machine> Vcpu<M> {
    /// A general-purpose register of the guest hypervisor.
    #[inline]
    pub fn gpr(&mut self, number: usize) -> u64 {
        if number == RSP { self.vmcs.vmcs01().read(GUEST_RSP) } else { self.registers[number] }
    }

    /// Sets a general-purpose register of the guest hypervisor.
    #[inline]
    pub fn set_gpr(&mut self, number: usize, value: u64) {
        if number == RSP {
            self.vmcs.vmcs01().write(GUEST_RSP, value);
        } else {
            self.registers[number] = value;
        }
    }

    /// EDX:EAX, as RDMSR, WRMSR and XSETBV use it.
    pub fn edx_eax(&self) -> u64 {
        self.registers[RDX] << 32 | self.registers[RAX] & 0xffff_ffff
    }

    /// Sets EDX:EAX; the upper halves of RDX and RAX become 0.
    pub fn set_edx_eax(&mut self, value: u64) {
        self.registers[RAX] = value & 0xffff_ffff;
        self.registers[RDX] = value >> 32;
    }

    /// ECX.
    pub fn ecx(&self) -> u32 {
        self.registers[RCX] as u32
    }

    /// The guest hypervisor's current privilege level: SS.DPL.
    pub fn cpl(&mut self) -> u8 {
        (self.vmcs.vmcs01().read(GUEST_SS_ACCESS_RIGHTS) >> 5 & 3) as u8
    }

    /// Whether the guest hypervisor is in IA-32e mode.
    pub fn in_ia32e_mode(&mut self) -> bool {
        self.vmcs.vmcs01().read(ENTRY_CONTROLS).contains(EntryControls::IA32E_MODE_GUEST)
    }

    /// The guest hypervisor's paging, for the operands of its VMX instructions.
    pub fn paging(&mut self) -> Paging {
        let (machine, physical_bits) = (&self.machine, self.caps.physical_bits);
        let vmcs01 = self.vmcs.vmcs01();
        let cr4 = vmcs01.read(GUEST_CR4);
        Paging {
            cr0: vmcs01.read(GUEST_CR0),
            cr3: vmcs01.read(GUEST_CR3),
            cr4,
            efer: vmcs01.read(GUEST_EFER),
            rflags: vmcs01.read(GUEST_RFLAGS),
            physical_bits,
            pkru: if cr4 & CR4_PKE != 0 { machine.pkru() } else { 0 },
            pkrs: if cr4 & CR4_PKS != 0 { machine.read_msr(IA32_PKRS).unwrap_or(0) as u32 } else { 0 },
            mode: AccessMode::Supervisor,
        }
    }

    /// A field of VMCS12 right after an exit of its nested guest. Reads vmcs02, which is current then, if the field is
    /// stale.
    #[inline]
    pub fn vmcs12_field<T: FieldValue>(&mut self, field: Field<T>) -> T {
        if self.vmx.vmcs12.stale.contains(field.id()) {
            self.vmcs.vmcs02().read(field)
        } else {
            self.vmx.vmcs12.get(field)
        }
    }

    /// Sets exit information where the guest hypervisor will read it: in vmcs02 or in VMCS12.
    #[inline]
    pub fn set_exit_info<T: FieldValue>(&mut self, field: Field<T>, value: T) {
        if self.vmx.vmcs12.live.contains(field.id()) {
            self.vmcs.vmcs02().write(field, value);
        } else {
            self.vmx.vmcs12.set_synced(field.id(), value.into_word());
        }
    }

    /// Notes that VMLAUNCH or VMRESUME is carried out: vmcs02 is entered next.
    #[inline(always)]
    pub fn begin_entry(&mut self) {
        self.running = Running::Entering;
    }

    /// Notes that the processor has entered vmcs02 and left it again. VMCS12 is launched from now on.
    #[inline(always)]
    pub fn entry_accepted(&mut self) {
        self.running = Running::NestedGuest;
        self.vmx.vmcs12.launch_state = LaunchState::Launched;
    }

    /// Notes that the nested guest is left, or was not entered: the guest hypervisor runs next.
    #[inline(always)]
    pub fn leave_to_hypervisor(&mut self) {
        self.running = Running::GuestHypervisor;
    }

    /// Moves the guest that runs over the instruction that exited.
    pub fn advance(&mut self) {
        if self.running.is_nested() {
            advance(self.vmcs.vmcs02(), |rflags| rflags);
        } else {
            advance(self.vmcs.vmcs01(), |rflags| rflags);
        }
    }

    /// Moves the guest hypervisor over an instruction that changes RFLAGS, but not TF.
    pub fn advance_with_flags(&mut self, change: impl FnOnce(u64) -> u64) {
        advance(self.vmcs.vmcs01(), change);
    }
}

/// Completes an instruction in software: RIP moves on, blocking by STI or MOV SS ends, and a single step traps.
#[inline(always)]
fn advance(vmcs: &mut impl VmcsAccess, change_flags: impl FnOnce(u64) -> u64) {
    const BLOCKING_BY_STI_OR_MOV_SS: u32 = BLOCKING_BY_STI | BLOCKING_BY_MOV_SS;
    const PENDING_BS: u64 = 1 << 14;
    const DEBUGCTL_BTF: u64 = 1 << 1;
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
    // With IA32_DEBUGCTL.BTF only branches trap, and none of these instructions is one.
    if rflags & RFLAGS_TF != 0 && vmcs.read(GUEST_DEBUGCTL) & DEBUGCTL_BTF == 0 {
        let pending = vmcs.read(GUEST_PENDING_DEBUG);
        vmcs.write(GUEST_PENDING_DEBUG, pending | PENDING_BS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeVmcs, skylake_caps};

    #[test]
    fn a_single_step_over_an_emulated_instruction_traps_unless_only_branches_do() {
        for (rflags, debugctl, pending) in [(2, 0, 0), (2 | RFLAGS_TF, 0, 1 << 14), (2 | RFLAGS_TF, 1 << 1, 0)] {
            let mut vmcs = FakeVmcs::new(&skylake_caps());
            vmcs.poke(GUEST_RFLAGS.id(), rflags);
            vmcs.poke(GUEST_DEBUGCTL.id(), debugctl);
            vmcs.poke(EXIT_INSTRUCTION_LENGTH.id(), 3);
            advance(&mut vmcs, |rflags| rflags);
            assert_eq!((vmcs.read(GUEST_RIP), vmcs.read(GUEST_PENDING_DEBUG)), (3, pending));
        }
    }
}
