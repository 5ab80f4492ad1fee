//! The fields that the guest hypervisor accesses without an exit: permissions, bitmaps, and the profile that shows which are worth granting.

use shadow::encoding::Encoding;
use shadow::fields::FIELD_COUNT;
use shadow::index::FieldTable;
use shadow::permission::{Access, Denied, Permissions};
use shadow::{FieldId, FieldSet};

/// Accesses to a field by the guest hypervisor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accesses {
    /// VMREADs.
    pub reads: u64,
    /// VMWRITEs.
    pub writes: u64,
}

/// Accesses to every field.
pub type Profile = [Accesses; FIELD_COUNT];

/// Permissions and what goes with them.
#[derive(Debug)]
pub struct ShadowFields {
    permissions: Permissions,
    /// The fields that are offered.
    pub table: &'static FieldTable,
    /// Those of them that [`crate::exit::short`] may handle: none while accesses are counted.
    pub short_table: &'static FieldTable,
    /// The VMREAD bitmap and the VMWRITE bitmap of vmcs01.
    bitmaps: [&'static mut [u8]; 2],
    /// Counts, if that was asked for: then every access exits, whatever is granted.
    profile: Option<&'static mut Profile>,
}

impl ShadowFields {
    /// The permissions take effect with the first VM entry; while there is a `profile`, none does.
    pub fn new(
        permissions: Permissions,
        [table, short_table]: [&'static FieldTable; 2],
        [vmread, vmwrite]: [&'static mut [u8]; 2],
        profile: Option<&'static mut Profile>,
    ) -> Self {
        if profile.is_some() {
            let every_access_exits = Permissions::without_shadowing(&FieldSet::EMPTY);
            every_access_exits.fill_bitmaps(vmread, vmwrite);
        } else {
            permissions.fill_bitmaps(vmread, vmwrite);
        }
        Self { permissions, table, short_table, bitmaps: [vmread, vmwrite], profile }
    }

    /// What is granted.
    pub fn permissions(&self) -> &Permissions {
        &self.permissions
    }

    /// Grants just `wanted` of a field, from the next VM entry on.
    ///
    /// # Errors
    ///
    /// Some of it cannot be granted; nothing has changed then.
    pub fn set(&mut self, id: FieldId, wanted: Access) -> Result<(), Denied> {
        self.permissions.set(id, wanted)?;
        if self.profile.is_none() {
            let [vmread, vmwrite] = &mut self.bitmaps;
            self.permissions.update_bitmaps(id, vmread, vmwrite);
        }
        Ok(())
    }

    /// Counts an access, where accesses are counted.
    pub fn count(&mut self, encoding: u64, access: Access) {
        let Some(profile) = &mut self.profile else { return };
        let field = u32::try_from(encoding).ok().and_then(|encoding| self.table.find(Encoding(encoding)));
        if let Some(id) = field {
            let accesses = &mut profile[id.row()];
            accesses.reads += u64::from(access.contains(Access::READ));
            accesses.writes += u64::from(access.contains(Access::WRITE));
        }
    }

    /// The accesses to a field so far, where they are counted.
    pub fn accesses(&self, id: FieldId) -> Option<Accesses> {
        self.profile.as_ref().map(|profile| profile[id.row()])
    }

    /// Writes the profile to the log, a line for each field that was accessed. The runner reads these lines.
    pub fn print(&self) {
        let text = |access: Access| match (access.contains(Access::READ), access.contains(Access::WRITE)) {
            (false, false) => "none",
            (true, false) => "r",
            (false, true) => "w",
            (true, true) => "rw",
        };
        for id in FieldId::all() {
            let Some(Accesses { reads, writes }) = self.accesses(id) else { return };
            if reads + writes != 0 {
                let (granted, most) = (text(self.permissions.get(id)), text(self.permissions.most(id)));
                crate::log::write_line(format_args!("[l1hv PROFILE] {id:?} {reads} {writes} {granted} {most}"));
            }
        }
    }
}
