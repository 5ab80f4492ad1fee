//! Which fields the guest hypervisor accesses without an exit: none, read, write or both, field by field (SDM 25.10
//! "Software Access to Related Structures", 26.1.3 on VMREAD and VMWRITE under VMCS shadowing).
//!
//! A permission never changes what an access does, only what it costs: every field that may be granted is stored in
//! vmcs02 alone, and the emulation of a denied access uses it there too. A field in which vmcs02 needs the host's value
//! cannot be granted.
//!
//! ```
//! use shadow::caps::Policy;
//! use shadow::permission::{Access, Denied, Permissions};
//! use shadow::fields::{GUEST_RIP, HOST_RIP};
//! # let offered = shadow::VmxCaps::read(|msr| if msr == 0x480 { 1 << 55 } else { u64::MAX }, 46, 48);
//! # let offered = offered.offered(&Policy::EVERYTHING);
//! let mut permissions = Permissions::widest(&offered);
//! assert_eq!(permissions.get(GUEST_RIP.id()), Access::READ | Access::WRITE);
//! permissions.apply("GUEST_*:none,GUEST_RIP:r").unwrap();
//! assert_eq!(permissions.get(GUEST_RIP.id()), Access::READ);
//! assert_eq!(permissions.set(HOST_RIP.id(), Access::READ), Err(Denied::NotTheGuests(HOST_RIP.id())));
//! ```

mod list;
#[cfg(test)]
mod shadow_permissions;

use core::fmt;

use bitflags::bitflags;

use crate::caps::VmxCaps;
use crate::encoding::{Area, Width};
use crate::fields::FieldId;
use crate::index::FieldSet;
use crate::merge::SHADOWABLE;

pub use list::ListError;

/// Bytes of the VMREAD bitmap and of the VMWRITE bitmap.
pub const BITMAP_BYTES: usize = 4096;

bitflags! {
    /// What the guest hypervisor may do to a field without an exit.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Access: u8 {
        /// VMREAD.
        const READ = 1 << 0;
        /// VMWRITE.
        const WRITE = 1 << 1;
    }
}

/// Why an access cannot be granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denied {
    /// The processor has no VMCS shadowing, or it is switched off.
    NoShadowing,
    /// The guest hypervisor is not offered the field.
    NoSuchField(FieldId),
    /// vmcs02 does not hold the guest hypervisor's value of the field, or the host changes the value unseen.
    NotTheGuests(FieldId),
    /// The field is read-only: IA32_VMX_MISC\[29\] is 0.
    ReadOnly(FieldId),
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoShadowing => f.write_str("no field can be granted without VMCS shadowing"),
            Self::NoSuchField(id) => write!(f, "{id:?} is a field that is not offered"),
            Self::NotTheGuests(id) => write!(f, "{id:?} cannot be granted: its value in vmcs02 is the host's"),
            Self::ReadOnly(id) => write!(f, "{id:?} cannot be granted for writing: it is read-only"),
        }
    }
}

impl core::error::Error for Denied {}

/// Per-field permissions, and the most that they can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permissions {
    offered: FieldSet,
    readable: FieldSet,
    writable: FieldSet,
    read: FieldSet,
    write: FieldSet,
}

impl Permissions {
    /// Every access exits, because there is no VMCS shadowing.
    pub const fn without_shadowing(offered: &FieldSet) -> Self {
        const NO: FieldSet = FieldSet::EMPTY;
        Self { offered: *offered, readable: NO, writable: NO, read: NO, write: NO }
    }

    /// Everything that is safe: vmcs02 itself is the shadow VMCS, so that a permission costs nothing. VM-exit
    /// information is writable if the guest hypervisor's IA32_VMX_MISC says so.
    pub fn widest(offered: &VmxCaps) -> Self {
        let fields = offered.fields();
        let readable = SHADOWABLE.and(&fields);
        let may_write = |id: &FieldId| id.encoding().area() != Area::ExitInfo || offered.vmwrite_any();
        let writable = readable.iter().filter(may_write).fold(FieldSet::EMPTY, FieldSet::with);
        Self { offered: fields, readable, writable, read: readable, write: writable }
    }

    /// Fields whose only place is vmcs02, whether they are granted or not.
    pub const fn live(&self) -> &FieldSet {
        &self.readable
    }

    /// The access granted to a field.
    pub fn get(&self, id: FieldId) -> Access {
        access(&self.read, &self.write, id)
    }

    /// The most access that can be granted to a field.
    pub fn most(&self, id: FieldId) -> Access {
        access(&self.readable, &self.writable, id)
    }

    /// Grants exactly the access `wanted` to a field.
    ///
    /// # Errors
    ///
    /// Part of `wanted` cannot be granted. Then nothing changes.
    pub fn set(&mut self, id: FieldId, wanted: Access) -> Result<(), Denied> {
        if !self.offered.contains(id) {
            return Err(Denied::NoSuchField(id));
        }
        let most = self.most(id);
        if !most.contains(wanted) {
            return Err(match most.is_empty() {
                true if self.readable.is_empty() => Denied::NoShadowing,
                true => Denied::NotTheGuests(id),
                false => Denied::ReadOnly(id),
            });
        }
        for (set, bit) in [(&mut self.read, Access::READ), (&mut self.write, Access::WRITE)] {
            if wanted.contains(bit) { set.insert(id) } else { set.remove(id) }
        }
        Ok(())
    }

    /// Fills the VMREAD and VMWRITE bitmaps.
    pub fn fill_bitmaps(&self, vmread: &mut [u8], vmwrite: &mut [u8]) {
        vmread.fill(0xff);
        vmwrite.fill(0xff);
        for id in self.read.or(&self.write).iter() {
            self.update_bitmaps(id, vmread, vmwrite);
        }
    }

    /// Updates the bits of one field in the bitmaps: a bit that is 1 makes the access exit. Both encodings of a 64-bit
    /// field get the same bits.
    pub fn update_bitmaps(&self, id: FieldId, vmread: &mut [u8], vmwrite: &mut [u8]) {
        let encoding = id.encoding();
        let halves = if encoding.width() == Width::W64 { 2 } else { 1 };
        for (granted, bitmap) in [(self.read.contains(id), vmread), (self.write.contains(id), vmwrite)] {
            for access in 0..halves {
                let bit = (encoding.0 + access) as usize;
                let mask = 1 << (bit % 8);
                if granted { bitmap[bit / 8] &= !mask } else { bitmap[bit / 8] |= mask }
            }
        }
    }
}

fn access(read: &FieldSet, write: &FieldSet, id: FieldId) -> Access {
    let bit = |set: &FieldSet, access| if set.contains(id) { access } else { Access::empty() };
    bit(read, Access::READ) | bit(write, Access::WRITE)
}
