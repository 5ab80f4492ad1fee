//! Control registers and segment registers: their bits, their fields in the VMCS, and the rules that tie them together.
//!
//! Values stay plain words, so that bits without a name here are written back as they were read.

use crate::controls::EntryControls;
use crate::fields::*;
use crate::hw::VmcsAccess;

/// The number of RAX among the general-purpose registers.
pub const RAX: usize = 0;
/// The number of RCX.
pub const RCX: usize = 1;
/// The number of RDX.
pub const RDX: usize = 2;
/// The number of RBX.
pub const RBX: usize = 3;
/// The number of RSP, whose value is in the VMCS.
pub const RSP: usize = 4;
/// The number of RSI.
pub const RSI: usize = 6;

/// RFLAGS.TF.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.NT: IRET returns to another task.
pub const RFLAGS_NT: u64 = 1 << 14;
/// RFLAGS.RF.
pub const RFLAGS_RF: u64 = 1 << 16;
/// RFLAGS.VM: virtual-8086 mode.
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS.AC.
pub const RFLAGS_AC: u64 = 1 << 18;

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.MP.
pub const CR0_MP: u64 = 1 << 1;
/// CR0.EM.
pub const CR0_EM: u64 = 1 << 2;
/// CR0.TS.
pub const CR0_TS: u64 = 1 << 3;
/// CR0.ET, which is 1 on every processor that has VMX.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.AM.
pub const CR0_AM: u64 = 1 << 18;
/// CR0.NW.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// All defined bits of CR0.
pub const CR0_DEFINED: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;

/// CR4.PSE.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57: 5-level paging.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;
/// CR4.PCIDE.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.OSXSAVE.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.SMEP.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.CET.
pub const CR4_CET: u64 = 1 << 23;
/// CR4.PKS.
pub const CR4_PKS: u64 = 1 << 24;
/// CR4.LASS.
pub const CR4_LASS: u64 = 1 << 27;

/// IA32_EFER.SCE.
pub const EFER_SCE: u64 = 1 << 0;
/// IA32_EFER.LME: IA-32e mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// IA32_EFER.LMA: IA-32e mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// IA32_EFER.NXE.
pub const EFER_NXE: u64 = 1 << 11;
/// All defined bits of IA32_EFER.
pub const EFER_DEFINED: u64 = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;

/// Whether the bits of an address from the highest of `linear_bits` on are equal.
///
/// ```
/// use shadow::registers::is_canonical;
///
/// assert!(is_canonical(0xffff_8000_0000_0000, 48) && !is_canonical(1 << 47, 48) && is_canonical(1 << 47, 57));
/// ```
pub const fn is_canonical(address: u64, linear_bits: u32) -> bool {
    let unused = u64::BITS - linear_bits;
    ((address as i64) << unused >> unused) as u64 == address
}

/// The width of linear addresses in IA-32e mode with this CR4.
pub const fn linear_bits_of(cr4: u64) -> u32 {
    if cr4 & CR4_LA57 != 0 { 57 } else { 48 }
}

/// IA32_EFER with the LMA that paging gives it: LME while CR0.PG is 1, else 0.
///
/// ```
/// use shadow::registers::{CR0_PE, CR0_PG, EFER_LMA, EFER_LME, efer_of_paging};
///
/// assert_eq!(efer_of_paging(EFER_LME, CR0_PE | CR0_PG), EFER_LME | EFER_LMA);
/// assert_eq!(efer_of_paging(EFER_LME | EFER_LMA, CR0_PE), EFER_LME);
/// ```
pub const fn efer_of_paging(efer: u64, cr0: u64) -> u64 {
    if cr0 & CR0_PG != 0 && efer & EFER_LME != 0 { efer | EFER_LMA } else { efer & !EFER_LMA }
}

/// VM-entry controls with "IA-32e mode guest" equal to IA32_EFER.LMA: VM entry checks that they agree (SDM 27.3.1.1
/// "Checks on Guest Control Registers, Debug Registers, and MSRs"), so code that changes a guest's IA32_EFER changes
/// both.
///
/// ```
/// use shadow::controls::EntryControls;
/// use shadow::registers::{EFER_LMA, entry_controls_of_efer};
///
/// let legacy = EntryControls::LOAD_EFER;
/// let long = entry_controls_of_efer(legacy, EFER_LMA);
/// assert_eq!(long, legacy | EntryControls::IA32E_MODE_GUEST);
/// assert_eq!(entry_controls_of_efer(long, 0), legacy);
/// ```
pub fn entry_controls_of_efer(controls: EntryControls, efer: u64) -> EntryControls {
    let mut controls = controls;
    controls.set(EntryControls::IA32E_MODE_GUEST, efer & EFER_LMA != 0);
    controls
}

/// CR3 after a MOV of this value, and whether translations are dropped (SDM Volume 2B, MOV: Move to/from Control
/// Registers). `None`: #GP, for a reserved bit.
///
/// ```
/// use shadow::registers::{CR4_PCIDE, EFER_LMA, cr3_after_write};
///
/// const KEEP: u64 = 1 << 63;
/// assert_eq!(cr3_after_write(0x1000, 0, EFER_LMA, 46), Some((0x1000, true)));
/// assert_eq!(cr3_after_write(KEEP | 0x1001, CR4_PCIDE, EFER_LMA, 46), Some((0x1001, false)));
/// assert_eq!(cr3_after_write(KEEP, 0, EFER_LMA, 46), None);
/// assert_eq!(cr3_after_write(1 << 46, 0, EFER_LMA, 46), None);
/// ```
pub const fn cr3_after_write(written: u64, cr4: u64, efer: u64, physical_bits: u32) -> Option<(u64, bool)> {
    const KEEP_TRANSLATIONS: u64 = 1 << 63;
    let choice = if cr4 & CR4_PCIDE != 0 { KEEP_TRANSLATIONS } else { 0 };
    let value = written & !choice;
    if efer & EFER_LMA != 0 && value >> physical_bits != 0 {
        return None;
    }
    Some((value, written & choice == 0))
}

/// CR0 or CR4 of a guest with its guest/host mask and read shadow (SDM 25.6.6 "Guest/Host Masks and Read Shadows for
/// CR0 and CR4"). The host owns the bits of the mask: the guest reads them from the read shadow, and exits when it
/// writes another value.
///
/// ```
/// use shadow::registers::{CR4_PAE, CR4_VMXE, MaskedRegister};
///
/// let cr4 = MaskedRegister { value: CR4_PAE | CR4_VMXE, mask: CR4_VMXE, read_shadow: 0 };
/// assert_eq!(cr4.visible(), CR4_PAE);
/// assert!(!cr4.write_exits(0) && cr4.write_exits(CR4_VMXE));
/// assert_eq!(cr4.after_write(0).value, CR4_VMXE);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MaskedRegister {
    /// The register.
    pub value: u64,
    /// The guest/host mask.
    pub mask: u64,
    /// The read shadow.
    pub read_shadow: u64,
}

impl MaskedRegister {
    /// The value that the guest reads.
    #[inline]
    pub const fn visible(self) -> u64 {
        self.value & !self.mask | self.read_shadow & self.mask
    }

    /// Whether a MOV of this value to the register exits.
    pub const fn write_exits(self, written: u64) -> bool {
        (written ^ self.read_shadow) & self.mask != 0
    }

    /// The register after a MOV that does not exit: the host's bits stay.
    pub const fn after_write(self, written: u64) -> Self {
        Self { value: self.value & self.mask | written & !self.mask, ..self }
    }
}

/// The fields of CR0 or CR4 of a guest whose hypervisor forces the bits of the mask to 1: value, guest/host mask and
/// read shadow.
#[derive(Clone, Copy)]
pub struct ForcedBits {
    value: Field<u64>,
    mask: Field<u64>,
    read_shadow: Field<u64>,
}

/// CR0.
pub const FORCED_CR0: ForcedBits =
    ForcedBits { value: GUEST_CR0, mask: CR0_GUEST_HOST_MASK, read_shadow: CR0_READ_SHADOW };
/// CR4.
pub const FORCED_CR4: ForcedBits =
    ForcedBits { value: GUEST_CR4, mask: CR4_GUEST_HOST_MASK, read_shadow: CR4_READ_SHADOW };

impl ForcedBits {
    /// The value that a guest with this mask reads.
    pub fn visible(self, vmcs: &impl VmcsAccess, mask: u64) -> u64 {
        MaskedRegister { value: vmcs.read(self.value), mask, read_shadow: vmcs.read(self.read_shadow) }.visible()
    }

    /// Makes the guest read `visible`.
    pub fn show(self, vmcs: &mut impl VmcsAccess, visible: u64, mask: u64) {
        vmcs.write(self.value, visible | mask);
        vmcs.write(self.read_shadow, visible);
    }

    /// Forces other bits. The guest goes on reading `visible`.
    pub fn set_mask(self, vmcs: &mut impl VmcsAccess, visible: u64, mask: u64) {
        vmcs.write(self.mask, mask);
        self.show(vmcs, visible, mask);
    }
}

/// The fields of one segment register of a guest.
#[derive(Clone, Copy)]
pub struct SegmentFields {
    /// Selector.
    pub selector: Field<u16>,
    /// Base address.
    pub base: Field<u64>,
    /// Limit.
    pub limit: Field<u32>,
    /// Access rights.
    pub access_rights: Field<u32>,
}

macro_rules! segment {
    ($selector:ident, $base:ident, $limit:ident, $access_rights:ident) => {
        SegmentFields { selector: $selector, base: $base, limit: $limit, access_rights: $access_rights }
    };
}

/// The segment registers in the order of their numbers in instructions and in VM-exit instruction information: ES, CS,
/// SS, DS, FS, GS.
pub const GUEST_SEGMENTS: [SegmentFields; 6] = [
    segment!(GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS),
    segment!(GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS),
    segment!(GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
    segment!(GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS),
    segment!(GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS),
    segment!(GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
];

/// Number of CS in [`GUEST_SEGMENTS`].
pub const CS: usize = 1;

/// Number of SS in [`GUEST_SEGMENTS`].
pub const SS: usize = 2;

/// LDTR.
pub const GUEST_LDTR: SegmentFields =
    segment!(GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_ACCESS_RIGHTS);

/// TR.
pub const GUEST_TR: SegmentFields = segment!(GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS);

/// Access rights of segments in the VMCS's format (SDM 25.4.1 "Guest Register State").
pub mod access_rights {
    /// L: 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// The segment is unusable.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Flat 64-bit code.
    pub const CODE_64: u32 = 0xa09b;
    /// Flat 32-bit code.
    pub const CODE_32: u32 = 0xc09b;
    /// Flat 32-bit data.
    pub const DATA: u32 = 0xc093;
    /// A busy TSS.
    pub const BUSY_TSS: u32 = 0x8b;
    /// The type of a segment.
    pub const TYPE: u32 = 0xf;
    /// The type of a busy TSS of 32 or 64 bits; a 16-bit one has type 3.
    pub const TYPE_OF_BUSY_TSS: u32 = BUSY_TSS & TYPE;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_segment_has_its_own_four_fields() {
        for (number, segment) in GUEST_SEGMENTS.iter().chain([&GUEST_LDTR, &GUEST_TR]).enumerate() {
            let index = number as u16;
            assert_eq!(segment.selector.id().encoding().index(), index);
            assert_eq!(segment.limit.id().encoding().index(), index);
            assert_eq!(segment.access_rights.id().encoding().index(), index + 10);
            assert_eq!(segment.base.id().encoding().index(), index + 3);
        }
    }

    #[test]
    fn bits_agree_with_the_x86_crate() {
        use x86::controlregs::{Cr0, Cr4};
        assert_eq!(CR0_DEFINED, Cr0::all().bits() as u64);
        assert_eq!(CR4_VMXE, Cr4::CR4_ENABLE_VMX.bits() as u64);
        assert_eq!(CR4_LA57, Cr4::CR4_ENABLE_LA57.bits() as u64);
        assert_eq!(CR4_PCIDE, Cr4::CR4_ENABLE_PCID.bits() as u64);
        assert_eq!(CR4_SMAP, Cr4::CR4_ENABLE_SMAP.bits() as u64);
        assert_eq!(CR4_PKE, Cr4::CR4_ENABLE_PROTECTION_KEY.bits() as u64);
    }

    proptest! {
        #[test]
        fn a_guest_that_writes_without_an_exit_reads_what_it_wrote(value: u64, mask: u64, read_shadow: u64, written: u64) {
            let register = MaskedRegister { value, mask, read_shadow };
            prop_assert!(!register.write_exits(register.visible()));
            if !register.write_exits(written) {
                let after = register.after_write(written);
                prop_assert_eq!(after.visible(), written);
                prop_assert_eq!((after.value ^ value) & mask, 0);
            }
        }

        #[test]
        fn lma_is_lme_and_paging_and_nothing_else_of_efer_changes(efer: u64, cr0: u64) {
            let after = efer_of_paging(efer, cr0);
            prop_assert_eq!((after ^ efer) & !EFER_LMA, 0);
            prop_assert_eq!(after & EFER_LMA != 0, efer & EFER_LME != 0 && cr0 & CR0_PG != 0);
        }
    }
}
