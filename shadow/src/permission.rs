//! Which fields the guest hypervisor accesses without an exit (SDM 25.10 "Software Access to Related Structures", 26.1.3 on VMREAD and
//! VMWRITE under VMCS shadowing).

use crate::caps::VmxCaps;
use crate::encoding::{Area, Width};
use crate::fields::FieldId;
use crate::index::FieldSet;
use crate::merge::SHADOWABLE;

/// Bytes of the VMREAD bitmap and of the VMWRITE bitmap.
pub const BITMAP_BYTES: usize = 4096;

/// Per-field permissions. A field that may be written may be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permissions {
    read: FieldSet,
    write: FieldSet,
}

impl Permissions {
    /// Every access exits.
    pub const NONE: Self = Self { read: FieldSet::EMPTY, write: FieldSet::EMPTY };

    /// Everything that is safe: vmcs02 itself is the shadow VMCS, so that a permission costs nothing. VM-exit information is writable
    /// where the guest hypervisor is told so.
    pub fn widest(offered: &VmxCaps) -> Self {
        let read = SHADOWABLE.and(&offered.fields());
        let writable = |id: &FieldId| id.encoding().area() != Area::ExitInfo || offered.vmwrite_any();
        Self { read, write: read.iter().filter(writable).fold(FieldSet::EMPTY, FieldSet::with) }
    }

    /// Fields whose only place is vmcs02.
    pub const fn live(&self) -> &FieldSet {
        &self.read
    }

    /// Fills the VMREAD and VMWRITE bitmaps: a bit that is 1 makes the access exit. Both encodings of a 64-bit field go together.
    pub fn fill_bitmaps(&self, vmread: &mut [u8], vmwrite: &mut [u8]) {
        for (fields, bitmap) in [(&self.read, vmread), (&self.write, vmwrite)] {
            bitmap.fill(0xff);
            for id in fields.iter() {
                let encoding = id.encoding();
                let halves = if encoding.width() == Width::W64 { 2 } else { 1 };
                for access in 0..halves {
                    let bit = (encoding.0 + access) as usize;
                    bitmap[bit / 8] &= !(1 << (bit % 8));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::skylake_caps;
    use crate::fields::*;
    use std::vec;

    #[test]
    fn a_field_whose_vmcs02_value_is_not_the_guests_is_never_granted() {
        let live = *Permissions::widest(&skylake_caps().offered()).live();
        for field in
            [PRIMARY_CONTROLS.id(), EPT_POINTER.id(), HOST_RIP.id(), VM_INSTRUCTION_ERROR.id(), VMCS_LINK_POINTER.id()]
        {
            assert!(!live.contains(field), "{field:?}");
        }
        assert!(live.contains(GUEST_RIP.id()) && live.contains(EXIT_REASON.id()));
    }

    #[test]
    fn bitmaps_let_through_exactly_what_is_granted() {
        let mut offered = skylake_caps().offered();
        offered.misc &= !(1 << 29);
        let (mut vmread, mut vmwrite) = (vec![0; BITMAP_BYTES], vec![0; BITMAP_BYTES]);
        Permissions::widest(&offered).fill_bitmaps(&mut vmread, &mut vmwrite);
        let exits = |bitmap: &[u8], encoding: usize| bitmap[encoding / 8] >> (encoding % 8) & 1 != 0;
        assert!(!exits(&vmread, 0x681e) && !exits(&vmwrite, 0x681e), "guest RIP");
        assert!(!exits(&vmread, 0x4402) && exits(&vmwrite, 0x4402), "exit reason is read-only");
        assert!(!exits(&vmread, 0x2010) && !exits(&vmread, 0x2011), "both halves of the TSC offset");
        assert!(exits(&vmread, 0x681f) && exits(&vmread, 0x4002) && exits(&vmread, 0x7fff));
        Permissions::NONE.fill_bitmaps(&mut vmread, &mut vmwrite);
        assert!(vmread.iter().chain(&vmwrite).all(|&byte| byte == 0xff));
    }
}
