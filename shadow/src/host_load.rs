//! The guest hypervisor's state after an exit that is reflected to it: VMCS12's host state goes into vmcs01's guest
//! state (SDM 28.5 "Loading Host State").

use core::fmt;

use crate::caps::VmxCaps;
use crate::check::{HOST_BASES, load_pdptes};
use crate::controls::ExitControls;
use crate::event::BLOCKING_BY_NMI;
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::{FieldSet, with_merge};
use crate::msr::{IA32_DEBUGCTL, IA32_EFER, IA32_PAT, IA32_SYSENTER_CS, IA32_SYSENTER_EIP, IA32_SYSENTER_ESP};
use crate::registers::{CR4_PAE, CR4_PCIDE, EFER_LMA, EFER_LME, access_rights};
use crate::vmcs12::Vmcs12;
use crate::write_trap::WriteTrap;

/// Reasons of a VMX abort (SDM 28.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum VmxAbort {
    /// 1: a failure while saving guest MSRs.
    SavingGuestMsrs = 1,
    /// 2: host checking of the PDPTEs failed.
    HostPdptes = 2,
    /// 4: a failure on loading host MSRs.
    LoadingHostMsrs = 4,
}

impl fmt::Display for VmxAbort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SavingGuestMsrs => "VMX abort: a failure while saving guest MSRs",
            Self::HostPdptes => "VMX abort: host checking of the PDPTEs failed",
            Self::LoadingHostMsrs => "VMX abort: a failure on loading host MSRs",
        })
    }
}

impl core::error::Error for VmxAbort {}

/// The values that the nested guest left in registers that VMCS12's exit controls do not load.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeftBehind {
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Physical NMIs are blocked.
    pub nmi_blocked: bool,
}

impl LeftBehind {
    /// Reads the values from vmcs02, which must be current. Registers that VMCS12 loads are not read.
    pub fn read(vmcs02: &impl VmcsAccess, vmcs12: &Vmcs12, nmi_blocked: bool) -> Self {
        let exit = vmcs12.get(EXIT_CONTROLS);
        Self {
            pat: if exit.contains(ExitControls::LOAD_PAT) { 0 } else { vmcs02.read(GUEST_PAT) },
            efer: if exit.contains(ExitControls::LOAD_EFER) { 0 } else { vmcs02.read(GUEST_EFER) },
            nmi_blocked,
        }
    }
}

/// Rows of [`HostImage`] that are loaded together.
trait Group {
    /// Loads the rows by straight-line code: an encoding and a word each.
    fn load(image: &HostImage, vmcs01: &mut impl VmcsAccess);
    /// Whether two images agree in these rows.
    fn agree(one: &HostImage, other: &HostImage) -> bool;
}

/// Declares [`HostImage`]: a row for each field of vmcs01, with the value that VMCS12's host state gives it.
macro_rules! host_image {
    (|$vmcs12:ident| $($(#[$doc:meta])* $group:ident { $($field:ident = $value:expr,)+ })+) => {
        #[expect(non_camel_case_types, reason = "the names are the fields'")]
        enum Row { $($($field,)+)+ Count }

        const ROWS: usize = Row::Count as usize;

        fn words_of($vmcs12: &Vmcs12) -> [u64; ROWS] {
            [$($(word($field, $value)),+),+]
        }

        $(
            $(#[$doc])*
            struct $group;

            impl Group for $group {
                #[inline(always)]
                fn load(image: &HostImage, vmcs01: &mut impl VmcsAccess) {
                    $(vmcs01.write_from::<{ Row::$field as usize }, ROWS>($field.id(), &image.words);)+
                }

                fn agree(one: &HostImage, other: &HostImage) -> bool {
                    [$(Row::$field as usize),+].into_iter().all(|row| one.words[row] == other.words[row])
                }
            }
        )+

        impl HostImage {
            /// Loads the whole image. Nothing else needs loading if VMCS12 is self-contained ([`is_self_contained`])
            /// and NMIs are not blocked. vmcs01 must be current.
            pub fn load(&self, vmcs01: &mut impl VmcsAccess) {
                $($group::load(self, vmcs01);)+
            }
        }
    };
}

host_image! { |vmcs12|
    /// Fields that the guest hypervisor changes all the time, or without a trace.
    Always {
        GUEST_CR0 = vmcs12.get(HOST_CR0),
        GUEST_CR3 = vmcs12.get(HOST_CR3),
        // The read shadows stay: they count only for bits that VMX operation fixes, and those are the same in every
        // valid host state.
        GUEST_CR4 = if is_64(vmcs12) { vmcs12.get(HOST_CR4) | CR4_PAE } else { vmcs12.get(HOST_CR4) & !CR4_PCIDE },
        GUEST_RIP = vmcs12.get(HOST_RIP),
        GUEST_RSP = vmcs12.get(HOST_RSP),
        GUEST_RFLAGS = 2,
        GUEST_FS_BASE = vmcs12.get(HOST_FS_BASE),
        GUEST_GS_BASE = vmcs12.get(HOST_GS_BASE),
        GUEST_SS_SELECTOR = vmcs12.get(HOST_SS_SELECTOR),
        GUEST_SS_BASE = 0,
        GUEST_SS_LIMIT = u32::MAX,
    }
    StackRights {
        GUEST_SS_ACCESS_RIGHTS = data_access_rights(vmcs12.get(HOST_SS_SELECTOR)),
    }
    Code {
        GUEST_CS_SELECTOR = vmcs12.get(HOST_CS_SELECTOR),
        GUEST_CS_BASE = 0,
        GUEST_CS_LIMIT = u32::MAX,
        GUEST_CS_ACCESS_RIGHTS = if is_64(vmcs12) { access_rights::CODE_64 } else { access_rights::CODE_32 },
    }
    Data {
        GUEST_ES_SELECTOR = vmcs12.get(HOST_ES_SELECTOR),
        GUEST_ES_BASE = 0,
        GUEST_ES_LIMIT = u32::MAX,
        GUEST_ES_ACCESS_RIGHTS = data_access_rights(vmcs12.get(HOST_ES_SELECTOR)),
        GUEST_DS_SELECTOR = vmcs12.get(HOST_DS_SELECTOR),
        GUEST_DS_BASE = 0,
        GUEST_DS_LIMIT = u32::MAX,
        GUEST_DS_ACCESS_RIGHTS = data_access_rights(vmcs12.get(HOST_DS_SELECTOR)),
        GUEST_FS_SELECTOR = vmcs12.get(HOST_FS_SELECTOR),
        GUEST_FS_LIMIT = u32::MAX,
        GUEST_FS_ACCESS_RIGHTS = data_access_rights(vmcs12.get(HOST_FS_SELECTOR)),
        GUEST_GS_SELECTOR = vmcs12.get(HOST_GS_SELECTOR),
        GUEST_GS_LIMIT = u32::MAX,
        GUEST_GS_ACCESS_RIGHTS = data_access_rights(vmcs12.get(HOST_GS_SELECTOR)),
    }
    /// Fields in which the exit for VMLAUNCH or VMRESUME saved these very values, unless an earlier instruction still
    /// blocks events.
    Blocking {
        GUEST_PENDING_DEBUG = 0,
        // The activity state is active already: the guest hypervisor executed VMLAUNCH or VMRESUME.
        GUEST_INTERRUPTIBILITY = 0,
    }
    /// Fields changed by instructions that can be made to exit: MOV to DR7, and WRMSR of [`TRAPPED_MSRS`].
    Registers {
        GUEST_DR7 = 0x400,
        // vmcs01's "IA-32e mode guest" stays: the host-state checks compare the address-space size with the mode of the
        // guest hypervisor, which cannot leave its mode in VMX operation, where CR0.PG is fixed.
        GUEST_EFER = efer_in_mode(vmcs12, vmcs12.get(HOST_EFER)),
        GUEST_PAT = vmcs12.get(HOST_PAT),
        GUEST_DEBUGCTL = 0,
        GUEST_SYSENTER_CS = vmcs12.get(HOST_SYSENTER_CS),
        GUEST_SYSENTER_ESP = vmcs12.get(HOST_SYSENTER_ESP),
        GUEST_SYSENTER_EIP = vmcs12.get(HOST_SYSENTER_EIP),
    }
    /// Fields changed by instructions that descriptor-table exiting makes exit.
    Tables {
        GUEST_TR_SELECTOR = vmcs12.get(HOST_TR_SELECTOR),
        GUEST_TR_BASE = vmcs12.get(HOST_TR_BASE),
        GUEST_TR_LIMIT = 0x67,
        GUEST_TR_ACCESS_RIGHTS = access_rights::BUSY_TSS,
        GUEST_LDTR_SELECTOR = 0,
        GUEST_LDTR_ACCESS_RIGHTS = access_rights::UNUSABLE,
        GUEST_GDTR_BASE = vmcs12.get(HOST_GDTR_BASE),
        GUEST_GDTR_LIMIT = 0xffff,
        GUEST_IDTR_BASE = vmcs12.get(HOST_IDTR_BASE),
        GUEST_IDTR_LIMIT = 0xffff,
    }
}

/// The MSRs that a VM exit loads or clears, and that only WRMSR changes.
pub const TRAPPED_MSRS: [u32; 6] =
    [IA32_EFER, IA32_PAT, IA32_DEBUGCTL, IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP];

fn word<T: FieldValue>(_: Field<T>, value: T) -> u64 {
    value.into_word()
}

fn is_64(vmcs12: &Vmcs12) -> bool {
    vmcs12.get(EXIT_CONTROLS).contains(ExitControls::HOST_ADDRESS_SPACE_SIZE)
}

/// EFER with LME and LMA as the address-space size demands.
fn efer_in_mode(vmcs12: &Vmcs12, efer: u64) -> u64 {
    if is_64(vmcs12) { efer | (EFER_LME | EFER_LMA) } else { efer & !(EFER_LME | EFER_LMA) }
}

fn data_access_rights(selector: u16) -> u32 {
    if selector == 0 { access_rights::UNUSABLE } else { access_rights::DATA }
}

/// VMCS12's host state as vmcs01 gets it: computed when a host-state field changes, loaded on every reflected exit.
#[derive(Clone, Debug)]
pub struct HostImage {
    words: [u64; ROWS],
    /// The host is in 64-bit mode with null selectors in ES, DS, FS and GS.
    has_null_data_segments: bool,
}

impl Default for HostImage {
    fn default() -> Self {
        Self { words: [0; ROWS], has_null_data_segments: false }
    }
}

/// The parts of the last loaded image that vmcs01 still holds.
#[derive(Clone, Debug)]
pub struct Kept {
    /// DR7 and MSRs.
    pub registers: WriteTrap,
    /// TR, LDTR, GDTR and IDTR.
    pub tables: WriteTrap,
    /// The interruptibility state that the exit for VMLAUNCH or VMRESUME saved.
    pub interruptibility: u32,
    /// The access rights of SS that the same exit saved.
    pub stack_rights: u32,
}

impl Kept {
    /// Call this after a write of other code to these fields of vmcs01.
    pub fn forget(&mut self) {
        self.registers.forget();
        self.tables.forget();
    }
}

impl HostImage {
    /// Fields of VMCS12 from which the image is computed.
    pub const SOURCE: FieldSet = with_merge(Merge::HostState).with(EXIT_CONTROLS.id());

    /// The image of a VMCS12.
    pub fn of(vmcs12: &Vmcs12) -> Self {
        let selectors = [HOST_ES_SELECTOR, HOST_DS_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR];
        let has_null_data_segments = is_64(vmcs12) && selectors.iter().all(|&selector| vmcs12.get(selector) == 0);
        Self { words: words_of(vmcs12), has_null_data_segments }
    }

    /// Updates the image for a VMCS12 of which fields in [`Self::SOURCE`] are dirty.
    pub fn update(&mut self, vmcs12: &Vmcs12, kept: &mut Kept) {
        const OTHERS: FieldSet = HostImage::SOURCE.minus(&HOST_BASES);
        if !vmcs12.dirty.intersects(&OTHERS) {
            self.words[Row::GUEST_FS_BASE as usize] = vmcs12.get(HOST_FS_BASE);
            self.words[Row::GUEST_GS_BASE as usize] = vmcs12.get(HOST_GS_BASE);
            return;
        }
        let new = Self::of(vmcs12);
        if !Registers::agree(self, &new) {
            kept.registers.forget();
        }
        if !Tables::agree(self, &new) {
            kept.tables.forget();
        }
        *self = new;
    }

    /// Loads the fields that may have changed since the image was loaded last, except those that [`Kept`] has traps
    /// for. The guest hypervisor must be in 64-bit mode, its VMCS12 self-contained, and vmcs01 current.
    #[inline(always)]
    pub fn load_changed(&self, vmcs01: &mut impl VmcsAccess, kept: &Kept) {
        Always::load(self, vmcs01);
        if u64::from(kept.stack_rights) != self.words[Row::GUEST_SS_ACCESS_RIGHTS as usize] {
            StackRights::load(self, vmcs01);
        }
        // While CS.L is 1, base and limit have no effect. A change of CS.L comes with a load of CS.
        let same_code = u64::from(vmcs01.read(GUEST_CS_SELECTOR)) == self.words[Row::GUEST_CS_SELECTOR as usize]
            && vmcs01.read(GUEST_CS_ACCESS_RIGHTS) == access_rights::CODE_64;
        if !same_code {
            Code::load(self, vmcs01);
        }
        // In protected mode a null selector makes the segment unusable, and then its other fields are undefined after a
        // VM exit (SDM 28.5.2 "Loading Host Segment and Descriptor-Table Registers").
        let null = |vmcs01: &_| {
            [GUEST_ES_SELECTOR, GUEST_DS_SELECTOR, GUEST_FS_SELECTOR, GUEST_GS_SELECTOR]
                .into_iter()
                .fold(0, |any, selector| any | VmcsAccess::read(vmcs01, selector))
                == 0
        };
        if !(self.has_null_data_segments && null(vmcs01)) {
            Data::load(self, vmcs01);
        }
        if kept.interruptibility != 0 {
            Blocking::load(self, vmcs01);
        }
    }

    /// Loads DR7 and the MSRs.
    pub fn load_registers(&self, vmcs01: &mut impl VmcsAccess) {
        Registers::load(self, vmcs01);
    }

    /// Loads TR, LDTR, GDTR and IDTR.
    pub fn load_tables(&self, vmcs01: &mut impl VmcsAccess) {
        Tables::load(self, vmcs01);
    }
}

/// Whether VMCS12 loads every register that the host state has a field for, and its host's paging has no PDPTEs.
pub fn is_self_contained(vmcs12: &Vmcs12) -> bool {
    let needed = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_PAT | ExitControls::LOAD_EFER;
    vmcs12.get(EXIT_CONTROLS).contains(needed)
}

/// Loads VMCS12's host state, and the values that the nested guest left behind. vmcs01 must be current.
///
/// # Errors
///
/// The PDPTEs of a 32-bit host with PAE paging are bad.
pub fn load_host_state(
    vmcs01: &mut impl VmcsAccess,
    vmcs12: &Vmcs12,
    image: &HostImage,
    caps: &VmxCaps,
    memory: &impl GuestMemory,
    left: &LeftBehind,
) -> Result<(), VmxAbort> {
    image.load(vmcs01);
    let exit = vmcs12.get(EXIT_CONTROLS);
    if !exit.contains(ExitControls::LOAD_PAT) {
        vmcs01.write(GUEST_PAT, left.pat);
    }
    if !exit.contains(ExitControls::LOAD_EFER) {
        vmcs01.write(GUEST_EFER, efer_in_mode(vmcs12, left.efer));
    }
    if left.nmi_blocked {
        vmcs01.write(GUEST_INTERRUPTIBILITY, BLOCKING_BY_NMI);
    }
    if is_64(vmcs12) {
        return Ok(());
    }
    let (cr0, cr3, cr4) = (vmcs12.get(HOST_CR0), vmcs12.get(HOST_CR3), vmcs12.get(HOST_CR4));
    let loaded = load_pdptes(memory, caps, cr0, cr3, cr4, false).map_err(|_| VmxAbort::HostPdptes)?;
    for (field, entry) in GUEST_PDPTES.into_iter().zip(loaded.into_iter().flatten()) {
        vmcs01.write(field, entry);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::CapabilityWord;
    use crate::caps::Policy;
    use crate::fake::{FakeMemory, FakeVmcs, skylake_caps};
    use ept::Gpa;

    fn loaded(change: impl FnOnce(&mut Vmcs12)) -> FakeVmcs {
        let caps = skylake_caps();
        let mut vmcs12 = Vmcs12::new(Gpa(0), &caps.offered(&Policy::EVERYTHING));
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER;
        vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(&caps).0 | exit);
        vmcs12.set(HOST_EFER, 0xd01);
        vmcs12.set(HOST_CR0, 0x8005_0033);
        vmcs12.set(HOST_CR4, 0x2020);
        vmcs12.set(HOST_CS_SELECTOR, 0x10);
        vmcs12.set(HOST_GS_BASE, 0xffff_8880_0000_0000);
        change(&mut vmcs12);
        let mut vmcs01 = FakeVmcs::new(&caps);
        let left = LeftBehind { pat: 0x0007_0406_0007_0406, efer: 0x500, nmi_blocked: true };
        load_host_state(&mut vmcs01, &vmcs12, &HostImage::of(&vmcs12), &caps, &FakeMemory::new(0x1000), &left).unwrap();
        vmcs01
    }

    #[test]
    fn a_64_bit_guest_hypervisor_gets_64_bit_state() {
        let vmcs01 = loaded(|_| ());
        assert_eq!(vmcs01.read(GUEST_CS_ACCESS_RIGHTS), 0xa09b);
        assert_eq!(vmcs01.read(GUEST_SS_ACCESS_RIGHTS), access_rights::UNUSABLE, "a null selector");
        assert_eq!(vmcs01.read(GUEST_GS_BASE), 0xffff_8880_0000_0000);
        assert_eq!(vmcs01.read(GUEST_EFER), 0xd01);
        assert_eq!(vmcs01.read(GUEST_RFLAGS), 2);
        assert_eq!(vmcs01.read(GUEST_DR7), 0x400);
        assert_eq!(vmcs01.read(GUEST_GDTR_LIMIT), 0xffff);
        assert_eq!(vmcs01.read(GUEST_INTERRUPTIBILITY), BLOCKING_BY_NMI);
    }

    #[test]
    fn a_register_that_is_not_loaded_stays_as_the_nested_guest_left_it() {
        let vmcs01 = loaded(|_| ());
        assert_eq!(vmcs01.read(GUEST_PAT), 0x0007_0406_0007_0406);
    }

    #[test]
    fn a_32_bit_guest_hypervisor_gets_32_bit_state() {
        let vmcs01 = loaded(|vmcs12| {
            let exit = vmcs12.get(EXIT_CONTROLS) - ExitControls::HOST_ADDRESS_SPACE_SIZE;
            vmcs12.set(EXIT_CONTROLS, exit & !ExitControls::LOAD_EFER);
        });
        assert_eq!(vmcs01.read(GUEST_CS_ACCESS_RIGHTS), 0xc09b);
        assert_eq!(vmcs01.read(GUEST_EFER), 0, "LMA and LME follow the address-space size");
    }

    /// A guest hypervisor's host state like that of Linux, loaded in full.
    fn long_mode() -> (HostImage, FakeVmcs, Kept) {
        let caps = skylake_caps();
        let mut vmcs12 = Vmcs12::new(Gpa(0), &caps.offered(&Policy::EVERYTHING));
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER | ExitControls::LOAD_PAT;
        vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(&caps).0 | exit);
        vmcs12.set(HOST_CS_SELECTOR, 0x10);
        vmcs12.set(HOST_SS_SELECTOR, 0x18);
        vmcs12.set(HOST_TR_SELECTOR, 0x40);
        let image = HostImage::of(&vmcs12);
        let mut vmcs01 = FakeVmcs::new(&caps);
        image.load(&mut vmcs01);
        let mut kept = Kept {
            registers: WriteTrap::new(),
            tables: WriteTrap::new(),
            interruptibility: 0,
            stack_rights: access_rights::DATA,
        };
        assert!(kept.registers.loaded() && kept.tables.loaded());
        (image, vmcs01, kept)
    }

    /// Leaves the nested guest as the run loop does.
    fn leave(image: &HostImage, vmcs01: &mut FakeVmcs, kept: &mut Kept) {
        kept.stack_rights = vmcs01.read(GUEST_SS_ACCESS_RIGHTS);
        kept.interruptibility = vmcs01.read(GUEST_INTERRUPTIBILITY);
        image.load_changed(vmcs01, kept);
        if !kept.registers.holds() {
            image.load_registers(vmcs01);
            let _ = kept.registers.loaded();
        }
        if !kept.tables.holds() {
            image.load_tables(vmcs01);
            let _ = kept.tables.loaded();
        }
    }

    /// Changes each field that the guest hypervisor can change, alone. Afterwards the field is as the full load leaves
    /// it, or one that the processor leaves undefined.
    #[test]
    fn whatever_the_guest_hypervisor_changes_is_loaded_again() {
        let trapped = |id: FieldId| {
            let name = std::format!("{id:?}");
            ["DR7", "EFER", "PAT", "DEBUGCTL", "SYSENTER", "_TR_", "LDTR", "GDTR", "IDTR"]
                .iter()
                .find(|part| name.contains(**part))
                .copied()
        };
        let (image, mut expected, _) = long_mode();
        expected.written();
        image.load(&mut expected);
        let mut checked = 0;
        for id in expected.written() {
            let (image, mut vmcs01, mut kept) = long_mode();
            let value = expected.read_raw(id) ^ 0x10;
            vmcs01.poke(id, value);
            // The other effects that the processor gives such a change.
            let name = std::format!("{id:?}");
            match trapped(id) {
                Some("_TR_" | "LDTR" | "GDTR" | "IDTR") => kept.tables.sprung(),
                Some(_) => kept.registers.sprung(),
                None if name.contains("PENDING_DEBUG") => vmcs01.poke(GUEST_INTERRUPTIBILITY.id(), 2),
                // Base, limit and rights of a data segment change only with a selector that is not null.
                None => {
                    for segment in ["ES", "DS", "FS", "GS"] {
                        if name.starts_with(&std::format!("GUEST_{segment}_")) && !name.ends_with("SELECTOR") {
                            let selector = FieldId::all()
                                .find(|id| std::format!("{id:?}") == std::format!("GUEST_{segment}_SELECTOR"));
                            vmcs01.poke(selector.unwrap(), 0x23);
                        }
                    }
                    if name.starts_with("GUEST_CS_") && !name.ends_with("SELECTOR") {
                        vmcs01.poke(GUEST_CS_SELECTOR.id(), 0x33);
                    }
                }
            }
            leave(&image, &mut vmcs01, &mut kept);
            for id in skylake_caps().fields().iter() {
                assert_eq!(vmcs01.read_raw(id), expected.read_raw(id), "{id:?} after a change of {name}");
            }
            checked += 1;
        }
        assert!(checked > 40, "only {checked} fields");
    }

    #[test]
    fn what_did_not_change_is_not_written() {
        let (image, mut vmcs01, mut kept) = long_mode();
        leave(&image, &mut vmcs01, &mut kept);
        vmcs01.written();
        leave(&image, &mut vmcs01, &mut kept);
        assert_eq!(vmcs01.written().len(), 11);
    }

    #[test]
    fn another_host_state_is_loaded_although_the_traps_are_set() {
        let (mut image, mut vmcs01, mut kept) = long_mode();
        let caps = skylake_caps();
        let mut vmcs12 = Vmcs12::new(Gpa(0), &caps.offered(&Policy::EVERYTHING));
        vmcs12.set(HOST_IDTR_BASE, 0x5000);
        vmcs12.set(HOST_SYSENTER_EIP, 0x6000);
        image.update(&vmcs12, &mut kept);
        leave(&image, &mut vmcs01, &mut kept);
        assert_eq!((vmcs01.read(GUEST_IDTR_BASE), vmcs01.read(GUEST_SYSENTER_EIP)), (0x5000, 0x6000));
        assert!(kept.tables.is_set() && kept.registers.is_set());
    }
}
