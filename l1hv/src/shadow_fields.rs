//! The fields that the guest hypervisor accesses without an exit: permissions, bitmaps, and the profile that shows
//! which are worth granting.

use core::sync::atomic::{AtomicU64, Ordering};

use protocol::statistics::PROFILE_PREFIX;
use shadow::encoding::Encoding;
use shadow::fields::FIELD_COUNT;
use shadow::index::FieldTable;
use shadow::permission::{Access, Denied, Permissions};
use shadow::{FieldId, FieldSet};
use spin::Mutex;

/// Accesses to a field by the guest hypervisor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accesses {
    /// VMREADs.
    pub reads: u64,
    /// VMWRITEs.
    pub writes: u64,
}

/// Counters of the accesses to every field.
pub type Profile = [AccessCounters; FIELD_COUNT];

/// Counters of the accesses to a field.
#[derive(Debug)]
pub struct AccessCounters {
    reads: AtomicU64,
    writes: AtomicU64,
}

impl AccessCounters {
    /// Counters at 0.
    pub const fn new() -> Self {
        Self { reads: AtomicU64::new(0), writes: AtomicU64::new(0) }
    }
}

/// Permissions, and the bitmaps that express them.
#[derive(Debug)]
struct Granted {
    permissions: Permissions,
    /// The VMREAD bitmap and the VMWRITE bitmap of every vmcs01.
    bitmaps: [&'static mut [u8]; 2],
}

/// The fields' permissions, tables and counters, one set for all processors.
#[derive(Debug)]
pub struct ShadowFields {
    granted: Mutex<Granted>,
    /// The fields whose values are in vmcs02 only. Access can be granted to these.
    pub live: FieldSet,
    /// The fields that are offered.
    pub table: &'static FieldTable,
    /// The offered fields that the short way of VMREAD and VMWRITE may handle: none while accesses are counted.
    pub quick_table: &'static FieldTable,
    /// Counters, if the option asks for them: then every access exits, whatever is granted.
    profile: Option<&'static Profile>,
}

impl ShadowFields {
    /// The permissions take effect with the first VM entry. With a `profile`, no permission takes effect.
    pub fn new(
        permissions: Permissions,
        [table, quick_table]: [&'static FieldTable; 2],
        [vmread, vmwrite]: [&'static mut [u8]; 2],
        profile: Option<&'static Profile>,
    ) -> Self {
        if profile.is_some() {
            let every_access_exits = Permissions::without_shadowing(&FieldSet::EMPTY);
            every_access_exits.fill_bitmaps(vmread, vmwrite);
        } else {
            permissions.fill_bitmaps(vmread, vmwrite);
        }
        let live = *permissions.live();
        let granted = Mutex::new(Granted { permissions, bitmaps: [vmread, vmwrite] });
        Self { granted, live, table, quick_table, profile }
    }

    /// The access granted to a field, and the most that can be granted.
    pub fn access(&self, id: FieldId) -> (Access, Access) {
        let granted = self.granted.lock();
        (granted.permissions.get(id), granted.permissions.most(id))
    }

    /// Grants exactly the access `wanted` to a field, from the next VM entry of each processor on.
    ///
    /// # Errors
    ///
    /// Part of `wanted` cannot be granted. Then nothing changes.
    pub fn set(&self, id: FieldId, wanted: Access) -> Result<(), Denied> {
        let Granted { permissions, bitmaps: [vmread, vmwrite] } = &mut *self.granted.lock();
        permissions.set(id, wanted)?;
        if self.profile.is_none() {
            permissions.update_bitmaps(id, vmread, vmwrite);
        }
        Ok(())
    }

    /// Counts an access, if accesses are counted.
    pub fn count(&self, encoding: u64, access: Access) {
        let Some(profile) = &self.profile else { return };
        let field = u32::try_from(encoding).ok().and_then(|encoding| self.table.find(Encoding(encoding)));
        if let Some(id) = field {
            let AccessCounters { reads, writes } = &profile[id.row()];
            reads.fetch_add(access.contains(Access::READ).into(), Ordering::Relaxed);
            writes.fetch_add(access.contains(Access::WRITE).into(), Ordering::Relaxed);
        }
    }

    /// The accesses to a field so far, if accesses are counted.
    pub fn accesses(&self, id: FieldId) -> Option<Accesses> {
        let AccessCounters { reads, writes } = &self.profile?[id.row()];
        Some(Accesses { reads: reads.load(Ordering::Relaxed), writes: writes.load(Ordering::Relaxed) })
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
                let (granted, most) = self.access(id);
                let (granted, most) = (text(granted), text(most));
                crate::log::write_line(format_args!("{PROFILE_PREFIX}{id:?} {reads} {writes} {granted} {most}"));
            }
        }
    }
}
