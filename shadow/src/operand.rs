//! The memory operand of a VMX instruction: its segmentation checks (SDM Volume 3A, chapters 5.3 "Limit Checking" and
//! 5.4 "Type Checking").

pub use crate::exit::{Gpr, InsnInfo};

use crate::hw::VmcsAccess;
use crate::msr::Access;
use crate::outcome::Fault;
use crate::registers::{CR4_LASS, CR4_SMAP, RFLAGS_AC, SS, SegmentFields, access_rights, is_canonical, linear_bits_of};

/// A segment register's hidden part, as in the VMCS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Access rights in the VMCS format (SDM 25.4.1 "Guest Register State").
    pub access_rights: u32,
}

impl Segment {
    const CODE: u32 = 1 << 3;
    const EXPAND_DOWN: u32 = 1 << 2;
    const READABLE_OR_WRITABLE: u32 = 1 << 1;
    const BIG: u32 = 1 << 14;

    /// The hidden part that a VMCS has for a segment register.
    pub fn read(vmcs: &impl VmcsAccess, register: &SegmentFields) -> Self {
        Self {
            base: vmcs.read(register.base),
            limit: vmcs.read(register.limit),
            access_rights: vmcs.read(register.access_rights),
        }
    }

    /// Gives a VMCS this hidden part for a segment register, together with a selector.
    pub fn load(&self, vmcs: &mut impl VmcsAccess, register: &SegmentFields, selector: u16) {
        vmcs.write(register.selector, selector);
        vmcs.write(register.base, self.base);
        vmcs.write(register.limit, self.limit);
        vmcs.write(register.access_rights, self.access_rights);
    }

    fn permits(&self, access: Access) -> bool {
        let readable_or_writable = self.access_rights & Self::READABLE_OR_WRITABLE != 0;
        let code = self.access_rights & Self::CODE != 0;
        self.access_rights & access_rights::UNUSABLE == 0
            && match access {
                Access::Read => !code || readable_or_writable,
                Access::Write => !code && readable_or_writable,
            }
    }

    /// The linear address of an operand outside 64-bit mode; `None` if the segment does not permit the access.
    pub fn linear(&self, offset: u64, bytes: u64, access: Access) -> Option<u64> {
        let is_permitted = self.permits(access) && self.contains(offset, bytes);
        is_permitted.then(|| self.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// The bits of ESP that a push onto this stack segment uses.
    pub const fn stack_pointer_mask(&self) -> u32 {
        if self.access_rights & Self::BIG != 0 { 0xffff_ffff } else { 0xffff }
    }

    fn contains(&self, offset: u64, bytes: u64) -> bool {
        let last = offset + bytes - 1;
        let expand_down = self.access_rights & (Self::CODE | Self::EXPAND_DOWN) == Self::EXPAND_DOWN;
        if expand_down {
            let top = if self.access_rights & Self::BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > self.limit.into() && last <= top
        } else {
            last <= self.limit.into()
        }
    }
}

/// The linear addresses that the operand of a supervisor-mode access may have in 64-bit mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSpace {
    linear_bits: u32,
    /// Linear-address space separation keeps data accesses out of the user's half (SDM Volume 3A, 4.4 "Linear-Address
    /// Separation").
    supervisor_half_only: bool,
}

impl AddressSpace {
    /// The address space that these registers select.
    pub const fn of(cr4: u64, rflags: u64) -> Self {
        let separated = cr4 & CR4_LASS != 0 && cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0;
        Self { linear_bits: linear_bits_of(cr4), supervisor_half_only: separated }
    }

    fn contains(self, address: u64) -> bool {
        is_canonical(address, self.linear_bits) && (!self.supervisor_half_only || address >> 63 != 0)
    }
}

/// The linear address of an operand of `bytes` bytes, or the fault that its segment causes. An address space is given
/// in 64-bit mode only.
///
/// # Errors
///
/// #SS(0) for SS, #GP(0) for other segments.
pub fn linear_address(
    info: InsnInfo,
    offset: u64,
    bytes: u64,
    access: Access,
    segment: &Segment,
    space: Option<AddressSpace>,
) -> Result<u64, Fault> {
    const FS: usize = 4;
    let fault = if info.segment() == SS { Fault::StackSegment } else { Fault::GeneralProtection };
    if let Some(space) = space {
        let base = if info.segment() >= FS { segment.base } else { 0 };
        let linear = base.wrapping_add(offset);
        let last = linear.wrapping_add(bytes - 1);
        return if space.contains(linear) && space.contains(last) { Ok(linear) } else { Err(fault) };
    }
    segment.linear(offset, bytes, access).ok_or(fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::CR4_LA57;

    const DATA: Segment = Segment { base: 0x1000, limit: 0xffff, access_rights: 0xc093 };

    const SPACE: Option<AddressSpace> = Some(AddressSpace::of(0, 2));

    /// DS:[RBX + RSI * 4 + displacement], 64-bit addressing.
    const RBX_RSI_4: InsnInfo = InsnInfo(2 | 2 << 7 | 3 << 15 | 6 << 18 | 3 << 23);

    #[test]
    fn base_index_scale_and_displacement_add_up() {
        let registers = |gpr| [0, 0, 0, 0x100, 0, 0, 0x10, 0][gpr];
        assert_eq!(RBX_RSI_4.effective_address(0x3, registers), 0x143);
        assert_eq!(RBX_RSI_4.effective_address(u64::MAX, registers), 0x13f);
        let addr16 = InsnInfo(RBX_RSI_4.0 & !(7 << 7));
        assert_eq!(addr16.effective_address(0xffff, registers), 0x13f);
    }

    #[test]
    fn a_non_canonical_operand_faults_by_its_segment() {
        let ss = InsnInfo(2 << 15);
        let hole = 0x8000_0000_0000;
        assert_eq!(linear_address(ss, hole, 8, Access::Read, &DATA, SPACE), Err(Fault::StackSegment));
        assert_eq!(linear_address(RBX_RSI_4, hole, 8, Access::Read, &DATA, SPACE), Err(Fault::GeneralProtection));
        assert_eq!(
            linear_address(RBX_RSI_4, hole, 8, Access::Read, &DATA, Some(AddressSpace::of(CR4_LA57, 2))),
            Ok(hole)
        );
        assert_eq!(linear_address(RBX_RSI_4, hole - 8, 8, Access::Read, &DATA, SPACE), Ok(hole - 8));
        assert_eq!(linear_address(RBX_RSI_4, hole - 7, 8, Access::Read, &DATA, SPACE), Err(Fault::GeneralProtection));
    }

    #[test]
    fn with_lass_an_operand_is_in_the_supervisors_half_unless_ac_is_set() {
        let separated = |rflags| Some(AddressSpace::of(CR4_LASS | CR4_SMAP, rflags));
        let at = |offset, space| linear_address(RBX_RSI_4, offset, 8, Access::Read, &DATA, space);
        assert_eq!(at(0x20, separated(2)), Err(Fault::GeneralProtection));
        assert_eq!(at(0x20, separated(RFLAGS_AC)), Ok(0x20));
        assert_eq!(at(0x20, Some(AddressSpace::of(CR4_LASS, 2))), Ok(0x20), "LASS for data needs SMAP");
        assert_eq!(at(!0xffff, separated(2)), Ok(!0xffff));
    }

    #[test]
    fn long_mode_ignores_the_base_of_all_but_fs_and_gs() {
        assert_eq!(linear_address(RBX_RSI_4, 0x20, 8, Access::Read, &DATA, SPACE), Ok(0x20));
        assert_eq!(linear_address(InsnInfo(5 << 15), 0x20, 8, Access::Read, &DATA, SPACE), Ok(0x1020));
    }

    #[test]
    fn protected_mode_checks_type_and_limit() {
        let at = |segment: &Segment, offset, access| linear_address(RBX_RSI_4, offset, 8, access, segment, None);
        assert_eq!(at(&DATA, 0xfff8, Access::Write), Ok(0x10ff8));
        assert_eq!(at(&DATA, 0xfff9, Access::Write), Err(Fault::GeneralProtection));
        let read_only = Segment { access_rights: 0xc091, ..DATA };
        assert_eq!(at(&read_only, 0, Access::Write), Err(Fault::GeneralProtection));
        assert_eq!(at(&read_only, 0, Access::Read), Ok(0x1000));
        let execute_only = Segment { access_rights: 0xc099, ..DATA };
        assert_eq!(at(&execute_only, 0, Access::Read), Err(Fault::GeneralProtection));
        let unusable = Segment { access_rights: 0x1c093, ..DATA };
        assert_eq!(at(&unusable, 0, Access::Read), Err(Fault::GeneralProtection));
        let expand_down = Segment { access_rights: 0xc097, ..DATA };
        assert_eq!(at(&expand_down, 0xffff, Access::Read), Err(Fault::GeneralProtection));
        assert_eq!(at(&expand_down, 0x1_0000, Access::Read), Ok(0x11000));
    }
}
