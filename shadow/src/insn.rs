//! The VMX instructions as a state machine (SDM chapter 31 "VMX Instruction Reference").
//!
//! The processor has checked the mode (#UD) before the exit; [`VmxOperation::privileged`] and the functions here do the
//! rest, in the SDM's order. Operands arrive as values: the caller fetches them from the guest hypervisor's memory, see
//! [`crate::operand`].

use crate::caps::{VmxCaps, ept_vpid};
use crate::controls::Secondary;
use crate::encoding::{Area, Encoding};
use crate::fields::FieldId;
use crate::hw::GuestMemory;
use crate::index::FieldTable;
use crate::outcome::{Failure, Fault, InsnError, VmFail};
use crate::vmcs12::{LaunchState, SHADOW_INDICATOR, Vmcs12, VmcsKind, clear_region, region_revision};
use ept::{Gpa, PageSize};

const NO_VMCS: Gpa = Gpa(u64::MAX);

/// VMX operation of one of the guest hypervisor's logical processors.
#[derive(Debug)]
pub struct VmxOperation {
    /// The VMXON region while in VMX operation.
    pub vmxon_region: Option<Gpa>,
    /// The current VMCS; meaningful while [`Self::has_current`].
    pub vmcs12: Vmcs12,
}

/// vmcs02 as the place of values that are newer than those in VMCS12.
pub trait SyncStale {
    /// Brings the stale fields up to date. Afterwards only live ones count as stale.
    fn sync_stale(&mut self, vmcs12: &mut Vmcs12);
    /// Brings one stale field up to date, and returns its value. Afterwards the field is stale only if it is live.
    fn sync_field(&mut self, vmcs12: &mut Vmcs12, id: FieldId) -> u64;
    /// Writes a live field.
    fn write_live(&mut self, id: FieldId, word: u64);
}

impl VmxOperation {
    /// The state outside VMX operation.
    pub fn new(caps: &VmxCaps) -> Self {
        Self { vmxon_region: None, vmcs12: Vmcs12::new(NO_VMCS, caps) }
    }

    /// Whether there is a current VMCS.
    #[inline]
    pub fn has_current(&self) -> bool {
        self.vmcs12.pointer != NO_VMCS
    }

    /// The first checks of every VMX instruction but VMXON: #UD outside VMX operation, #GP(0) above CPL 0.
    ///
    /// # Errors
    ///
    /// The fault that the instruction causes.
    pub fn privileged(&self, cpl: u8) -> Result<(), Fault> {
        match self.vmxon_region {
            None => Err(Fault::InvalidOpcode),
            Some(_) if cpl > 0 => Err(Fault::GeneralProtection),
            Some(_) => Ok(()),
        }
    }

    /// VMXON. The caller has checked CR4.VMXE, CPL, the fixed bits of CR0 and CR4, and IA32_FEATURE_CONTROL.
    ///
    /// # Errors
    ///
    /// The processor is in VMX operation, or `region` is not a VMXON region.
    pub fn vmxon(&mut self, memory: &impl GuestMemory, caps: &VmxCaps, region: u64) -> Result<(), Failure> {
        if self.vmxon_region.is_some() {
            return Err(InsnError::VMXON_IN_ROOT.into());
        }
        let region = region_address(caps, region).ok_or(VmFail::Invalid)?;
        if region_revision(memory, region) != caps.revision() {
            return Err(VmFail::Invalid.into());
        }
        self.vmxon_region = Some(region);
        self.vmcs12.pointer = NO_VMCS;
        Ok(())
    }

    /// VMXOFF. The current VMCS is written back to memory, where software that skips VMCLEAR may expect it.
    pub fn vmxoff(&mut self, memory: &impl GuestMemory, sync: &mut impl SyncStale) {
        self.release_current(memory, sync);
        self.vmxon_region = None;
    }

    /// VMCLEAR.
    ///
    /// # Errors
    ///
    /// `region` is no address of a VMCS region, or is the VMXON region.
    pub fn vmclear(
        &mut self,
        memory: &impl GuestMemory,
        caps: &VmxCaps,
        sync: &mut impl SyncStale,
        region: u64,
    ) -> Result<(), Failure> {
        let region = region_address(caps, region).ok_or(InsnError::VMCLEAR_INVALID_ADDRESS)?;
        if Some(region) == self.vmxon_region {
            return Err(InsnError::VMCLEAR_VMXON_POINTER.into());
        }
        if region == self.vmcs12.pointer {
            self.release_current(memory, sync);
        }
        clear_region(memory, region);
        Ok(())
    }

    /// VMPTRLD. Returns whether the current VMCS changed.
    ///
    /// # Errors
    ///
    /// `region` is no address of a VMCS region, is the VMXON region, or has another revision identifier.
    pub fn vmptrld(
        &mut self,
        memory: &impl GuestMemory,
        caps: &VmxCaps,
        sync: &mut impl SyncStale,
        region: u64,
    ) -> Result<bool, Failure> {
        let region = region_address(caps, region).ok_or(InsnError::VMPTRLD_INVALID_ADDRESS)?;
        if Some(region) == self.vmxon_region {
            return Err(InsnError::VMPTRLD_VMXON_POINTER.into());
        }
        let revision = region_revision(memory, region);
        let kind = VmcsKind::of(revision);
        let is_offered = kind == VmcsKind::Ordinary || caps.has_secondary(Secondary::VMCS_SHADOWING);
        if revision & !SHADOW_INDICATOR != caps.revision() || !is_offered {
            return Err(InsnError::VMPTRLD_INCORRECT_REVISION.into());
        }
        if region == self.vmcs12.pointer {
            return Ok(false);
        }
        self.release_current(memory, sync);
        self.vmcs12 = Vmcs12::load(memory, region, caps);
        self.vmcs12.kind = kind;
        Ok(true)
    }

    /// VMPTRST: the current-VMCS pointer, all ones if there is none.
    pub fn vmptrst(&self) -> u64 {
        self.vmcs12.pointer.0
    }

    /// VMREAD of the field that a 64-bit register operand names.
    ///
    /// # Errors
    ///
    /// There is no current VMCS, or the operand names no offered field.
    pub fn vmread(&mut self, offered: &FieldTable, sync: &mut impl SyncStale, encoding: u64) -> Result<u64, Failure> {
        if !self.has_current() {
            return Err(VmFail::Invalid.into());
        }
        let (id, encoding) = supported(offered, encoding)?;
        let word = self.current_word(sync, id);
        Ok(if encoding.is_high() { word >> 32 } else { word })
    }

    /// A field's newest value, from vmcs02 or VMCS12.
    fn current_word(&mut self, sync: &mut impl SyncStale, id: FieldId) -> u64 {
        self.vmcs12.settle();
        if self.vmcs12.stale.contains(id) { sync.sync_field(&mut self.vmcs12, id) } else { self.vmcs12.word(id) }
    }

    /// VMWRITE. `value` has been zero-extended from the operand.
    ///
    /// # Errors
    ///
    /// There is no current VMCS, the operand names no offered field, or the field is read-only.
    pub fn vmwrite(
        &mut self,
        caps: &VmxCaps,
        offered: &FieldTable,
        sync: &mut impl SyncStale,
        encoding: u64,
        value: u64,
    ) -> Result<(), Failure> {
        if !self.has_current() {
            return Err(VmFail::Invalid.into());
        }
        let (id, encoding) = supported(offered, encoding)?;
        if encoding.area() == Area::ExitInfo && !caps.vmwrite_any() {
            return Err(InsnError::VMWRITE_READ_ONLY.into());
        }
        self.vmcs12.settle();
        let word = if encoding.is_high() {
            self.current_word(sync, id) & 0xffff_ffff | value << 32
        } else {
            value & encoding.width().mask()
        };
        if self.vmcs12.live.contains(id) {
            sync.write_live(id, word);
        } else {
            self.vmcs12.set_word(id, word);
        }
        Ok(())
    }

    /// The checks of VMLAUNCH and VMRESUME before the checks of the VMCS's content (SDM 27.1 "Basic VM-Entry Checks").
    ///
    /// # Errors
    ///
    /// There is no ordinary current VMCS in the wanted launch state, or MOV SS blocks events.
    pub fn check_launch(&self, wanted: LaunchState, interruptibility: u32) -> Result<(), Failure> {
        const BLOCKING_BY_MOV_SS: u32 = 1 << 1;
        if !self.has_current() || self.vmcs12.kind == VmcsKind::Shadow {
            return Err(VmFail::Invalid.into());
        }
        if interruptibility & BLOCKING_BY_MOV_SS != 0 {
            return Err(InsnError::ENTRY_BLOCKED_BY_MOV_SS.into());
        }
        match (wanted, self.vmcs12.launch_state) {
            (LaunchState::Clear, LaunchState::Launched) => Err(InsnError::VMLAUNCH_NON_CLEAR.into()),
            (LaunchState::Launched, LaunchState::Clear) => Err(InsnError::VMRESUME_NON_LAUNCHED.into()),
            _ => Ok(()),
        }
    }

    fn release_current(&mut self, memory: &impl GuestMemory, sync: &mut impl SyncStale) {
        if self.has_current() {
            self.vmcs12.settle();
            if !self.vmcs12.stale.is_empty() {
                sync.sync_stale(&mut self.vmcs12);
            }
            self.vmcs12.store(memory);
            self.vmcs12.pointer = NO_VMCS;
        }
    }
}

fn region_address(caps: &VmxCaps, address: u64) -> Option<Gpa> {
    let region = Gpa(address);
    (region.is_aligned(PageSize::Size4K) && caps.is_physical(address)).then_some(region)
}

fn supported(offered: &FieldTable, encoding: u64) -> Result<(FieldId, Encoding), InsnError> {
    let encoding = u32::try_from(encoding).map(Encoding).map_err(|_| InsnError::UNSUPPORTED_COMPONENT)?;
    let id = offered.find(encoding).ok_or(InsnError::UNSUPPORTED_COMPONENT)?;
    Ok((id, encoding))
}

/// The invalidation that an INVEPT or INVVPID with valid operands asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// INVEPT, single-context: translations derived from this EPTP.
    Eptp(u64),
    /// INVEPT, global.
    AllEpt,
    /// INVVPID, individual-address.
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address.
        linear: u64,
    },
    /// INVVPID, single-context.
    Vpid(u16),
    /// INVVPID, all-context.
    AllVpids,
    /// INVVPID, single-context, retaining global translations.
    VpidRetainingGlobals(u16),
}

/// Whether the processor offers this INVEPT type (register operand).
pub fn invept_type_is_valid(caps: &VmxCaps, kind: u64) -> bool {
    match kind {
        1 => caps.ept_vpid & ept_vpid::INVEPT_SINGLE != 0,
        2 => caps.ept_vpid & ept_vpid::INVEPT_ALL != 0,
        _ => false,
    }
}

/// INVEPT with a valid type and the two quadwords of its descriptor.
///
/// # Errors
///
/// The descriptor is not valid.
pub fn invept(caps: &VmxCaps, kind: u64, descriptor: [u64; 2]) -> Result<Invalidation, Failure> {
    match kind {
        1 if crate::check::eptp_is_valid(caps, descriptor[0]) => Ok(Invalidation::Eptp(descriptor[0])),
        2 => Ok(Invalidation::AllEpt),
        _ => Err(InsnError::INVALID_OPERAND.into()),
    }
}

/// Whether the processor offers this INVVPID type (register operand).
pub fn invvpid_type_is_valid(caps: &VmxCaps, kind: u64) -> bool {
    kind < 4 && caps.ept_vpid >> (u64::from(ept_vpid::INVVPID_TYPE_0) + kind) & 1 != 0
}

/// INVVPID with a valid type and the two quadwords of its descriptor.
///
/// # Errors
///
/// The descriptor is not valid.
pub fn invvpid(caps: &VmxCaps, kind: u64, descriptor: [u64; 2]) -> Result<Invalidation, Failure> {
    let [vpid, linear] = descriptor;
    if vpid >> 16 != 0 || kind != 2 && vpid == 0 || kind == 0 && !caps.is_canonical(linear) {
        return Err(InsnError::INVALID_OPERAND.into());
    }
    let vpid = vpid as u16;
    Ok(match kind {
        0 => Invalidation::Address { vpid, linear },
        1 => Invalidation::Vpid(vpid),
        2 => Invalidation::AllVpids,
        _ => Invalidation::VpidRetainingGlobals(vpid),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Policy;
    use crate::controls::Control;
    use crate::fake::{FakeMemory, NoStale, skylake_caps};

    const VMXON_REGION: u64 = 0x1000;
    const REGION: u64 = 0x2000;
    const OTHER: u64 = 0x3000;

    struct Machine {
        memory: FakeMemory,
        caps: VmxCaps,
        fields: FieldTable,
        vmx: VmxOperation,
    }

    impl Machine {
        fn new() -> Self {
            let (memory, caps) = (FakeMemory::new(0x10000), skylake_caps().offered(&Policy::EVERYTHING));
            for region in [VMXON_REGION, REGION, OTHER] {
                memory.write_u32(Gpa(region), Policy::EVERYTHING.revision);
            }
            let mut vmx = VmxOperation::new(&caps);
            vmx.vmxon(&memory, &caps, VMXON_REGION).unwrap();
            Self { fields: FieldTable::of(&caps.fields()), memory, caps, vmx }
        }
        fn vmptrld(&mut self, region: u64) -> Result<bool, Failure> {
            self.vmx.vmptrld(&self.memory, &self.caps, &mut NoStale, region)
        }
        fn vmclear(&mut self, region: u64) -> Result<(), Failure> {
            self.vmx.vmclear(&self.memory, &self.caps, &mut NoStale, region)
        }
        fn vmread(&mut self, encoding: u64) -> Result<u64, Failure> {
            self.vmx.vmread(&self.fields, &mut NoStale, encoding)
        }
        fn vmwrite(&mut self, encoding: u64, value: u64) -> Result<(), Failure> {
            self.vmx.vmwrite(&self.caps, &self.fields, &mut NoStale, encoding, value)
        }
    }

    fn error(number: InsnError) -> Failure {
        number.into()
    }

    #[test]
    fn vmxon_of_a_bad_region_is_vmfailinvalid() {
        let (memory, caps) = (FakeMemory::new(0x10000), skylake_caps().offered(&Policy::EVERYTHING));
        let mut vmx = VmxOperation::new(&caps);
        for region in [0x1001, 1 << caps.physical_bits, 0x4000] {
            assert_eq!(vmx.vmxon(&memory, &caps, region), Err(VmFail::Invalid.into()), "{region:#x}");
        }
        assert_eq!(vmx.privileged(0), Err(Fault::InvalidOpcode));
    }

    #[test]
    fn vmxon_in_root_operation_fails_with_error_15() {
        let mut m = Machine::new();
        assert_eq!(m.vmx.vmxon(&m.memory, &m.caps, REGION), Err(error(InsnError::VMXON_IN_ROOT)));
    }

    #[test]
    fn a_vmx_instruction_above_cpl_0_is_a_general_protection_fault() {
        assert_eq!(Machine::new().vmx.privileged(3), Err(Fault::GeneralProtection));
    }

    #[test]
    fn vmclear_refuses_the_vmxon_region_and_bad_addresses() {
        let mut m = Machine::new();
        assert_eq!(m.vmclear(VMXON_REGION), Err(error(InsnError::VMCLEAR_VMXON_POINTER)));
        assert_eq!(m.vmclear(REGION + 8), Err(error(InsnError::VMCLEAR_INVALID_ADDRESS)));
    }

    #[test]
    fn vmptrld_refuses_the_vmxon_region_bad_addresses_and_foreign_revisions() {
        let mut m = Machine::new();
        assert_eq!(m.vmptrld(VMXON_REGION), Err(error(InsnError::VMPTRLD_VMXON_POINTER)));
        assert_eq!(m.vmptrld(1 << 52), Err(error(InsnError::VMPTRLD_INVALID_ADDRESS)));
        assert_eq!(m.vmptrld(0x4000), Err(error(InsnError::VMPTRLD_INCORRECT_REVISION)));
    }

    #[test]
    fn a_shadow_vmcs_can_be_current_where_it_is_offered_and_never_enters() {
        let mut m = Machine::new();
        m.memory.write_u32(Gpa(REGION), Policy::EVERYTHING.revision | SHADOW_INDICATOR);
        assert_eq!(m.vmptrld(REGION), Ok(true));
        m.vmwrite(0x681e, 0x1234).unwrap();
        assert_eq!(m.vmread(0x681e), Ok(0x1234));
        for wanted in [LaunchState::Clear, LaunchState::Launched] {
            assert_eq!(m.vmx.check_launch(wanted, 1 << 1), Err(VmFail::Invalid.into()));
        }
        assert_eq!(m.vmptrld(OTHER), Ok(true));
        assert_eq!(m.vmx.check_launch(LaunchState::Clear, 0), Ok(()));
        m.caps.remove(Control::Secondary(Secondary::VMCS_SHADOWING));
        assert_eq!(m.vmptrld(REGION), Err(error(InsnError::VMPTRLD_INCORRECT_REVISION)));
    }

    #[test]
    fn without_a_current_vmcs_everything_is_vmfailinvalid() {
        let mut m = Machine::new();
        assert_eq!(m.vmx.vmptrst(), u64::MAX);
        assert_eq!(m.vmread(0x681e), Err(VmFail::Invalid.into()));
        assert_eq!(m.vmwrite(0x681e, 1), Err(VmFail::Invalid.into()));
        assert_eq!(m.vmx.check_launch(LaunchState::Clear, 0), Err(VmFail::Invalid.into()));
    }

    #[test]
    fn fields_survive_a_switch_to_another_vmcs_and_back() {
        let mut m = Machine::new();
        assert_eq!(m.vmptrld(REGION), Ok(true));
        m.vmwrite(0x681e, 0x1234).unwrap();
        assert_eq!(m.vmptrld(OTHER), Ok(true));
        assert_eq!(m.vmread(0x681e), Ok(0));
        assert_eq!(m.vmptrld(REGION), Ok(true));
        assert_eq!(m.vmptrld(REGION), Ok(false));
        assert_eq!(m.vmread(0x681e), Ok(0x1234));
    }

    #[test]
    fn vmwrite_to_an_unsupported_field_fails_with_error_12() {
        let mut m = Machine::new();
        m.vmptrld(REGION).unwrap();
        for encoding in [0x7ffe, 0x681f, 0x1_0000_681e, 0x2812] {
            assert_eq!(m.vmwrite(encoding, 0), Err(error(InsnError::UNSUPPORTED_COMPONENT)), "{encoding:#x}");
        }
    }

    #[test]
    fn vmwrite_to_an_exit_information_field_fails_with_error_13_unless_misc_29_allows_it() {
        let mut m = Machine::new();
        m.vmptrld(REGION).unwrap();
        m.caps.misc &= !(1 << 29);
        assert_eq!(m.vmwrite(0x4402, 1), Err(error(InsnError::VMWRITE_READ_ONLY)));
        m.caps.misc |= 1 << 29;
        assert_eq!(m.vmwrite(0x4402, 1), Ok(()));
        assert_eq!(m.vmread(0x4402), Ok(1));
    }

    #[test]
    fn the_halves_of_a_64_bit_field_are_read_and_written_apart() {
        let mut m = Machine::new();
        m.vmptrld(REGION).unwrap();
        m.vmwrite(0x2010, 0x1111_2222_3333_4444).unwrap();
        m.vmwrite(0x2011, 0xffff_ffff_0000_5555).unwrap();
        assert_eq!(m.vmread(0x2010), Ok(0x0000_5555_3333_4444));
        assert_eq!(m.vmread(0x2011), Ok(0x5555));
    }

    #[test]
    fn launch_states_follow_vmclear() {
        let mut m = Machine::new();
        m.vmptrld(REGION).unwrap();
        assert_eq!(m.vmx.check_launch(LaunchState::Launched, 0), Err(error(InsnError::VMRESUME_NON_LAUNCHED)));
        m.vmx.vmcs12.launch_state = LaunchState::Launched;
        assert_eq!(m.vmx.check_launch(LaunchState::Clear, 0), Err(error(InsnError::VMLAUNCH_NON_CLEAR)));
        assert_eq!(m.vmx.check_launch(LaunchState::Launched, 2), Err(error(InsnError::ENTRY_BLOCKED_BY_MOV_SS)));
        m.vmclear(REGION).unwrap();
        assert!(!m.vmx.has_current());
        m.vmptrld(REGION).unwrap();
        assert_eq!(m.vmx.check_launch(LaunchState::Clear, 0), Ok(()));
    }

    #[test]
    fn invalidation_descriptors_are_validated() {
        let caps = skylake_caps().offered(&Policy::EVERYTHING);
        let bad: Failure = InsnError::INVALID_OPERAND.into();
        assert_eq!(invept(&caps, 1, [0x1000 | 0x5e, 0]), Ok(Invalidation::Eptp(0x105e)));
        assert_eq!(invept(&caps, 1, [0x1000 | 0x5f, 0]), Err(bad));
        assert!(!invept_type_is_valid(&caps, 0) && !invept_type_is_valid(&caps, 3));
        assert_eq!(invvpid(&skylake_caps(), 0, [1, 0x8000_0000_0000]), Err(bad));
        assert_eq!(invvpid(&skylake_caps(), 1, [0, 0]), Err(bad));
        assert_eq!(invvpid(&skylake_caps(), 1, [1 << 16 | 1, 0]), Err(bad));
        assert_eq!(invvpid(&skylake_caps(), 2, [0, 0]), Ok(Invalidation::AllVpids));
    }
}
