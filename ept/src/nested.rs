//! EPT02: the cache of compositions of EPT12 over EPT01, one root for each EPTP12 in use.

use crate::entry::Features;
use crate::map::{Mapping, OutOfTables, free_tables, lookup, map_page};
use crate::table::{TableMemory, index};
use crate::violation::Qualification;
use crate::walk::{GuestTables, Translation, WalkError, walk};
use crate::{Entry, Eptp, Hpa, NestedGpa, PageSize};
use arrayvec::ArrayVec;

/// How many EPT02s are kept.
pub const ROOTS: usize = 16;
const ROOT_LEVEL: u32 = 4;

/// What became of a violation of EPT02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// EPT02 has the translation now; the nested guest can go on.
    Mapped,
    /// EPT12 forbids the access: an EPT violation for the guest hypervisor, with this qualification.
    Violation(Qualification),
    /// EPT12 is misconfigured: an EPT misconfiguration for the guest hypervisor.
    Misconfiguration,
    /// EPT12 permits it, but EPT01 does not permit it at the address that it leads to.
    Ept01Forbids(crate::Gpa),
}

/// Translations were dropped: INVEPT must follow before a guest runs on that EPT02 again.
#[must_use = "the processor still caches what was dropped"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// Nothing was cached.
    Nothing,
    /// Those of one EPT02.
    One(Eptp),
    /// Those of several.
    All,
}

#[derive(Clone, Copy, Debug)]
struct Root {
    eptp12: Eptp,
    table: Hpa,
    last_used: u64,
}

impl Root {
    fn eptp02(&self) -> Eptp {
        // With the same flag in EPT02 the processor treats accesses to guest paging structures as EPT12's owner expects.
        Eptp::new(self.table.0, self.eptp12.accessed_dirty())
    }
}

/// The cache.
#[derive(Debug)]
pub struct NestedPaging {
    roots: ArrayVec<Root, ROOTS>,
    clock: u64,
    features: Features,
    recent: Option<Recent>,
}

/// The table that got the last 4-KiB page: neighbours are touched one after the other. Every operation that frees tables forgets it.
#[derive(Clone, Copy, Debug)]
struct Recent {
    root: Hpa,
    /// The address whose 2 MiB the table maps.
    address: u64,
    table: Hpa,
}

impl NestedPaging {
    /// Nothing cached. `features` are those offered to the guest hypervisor.
    pub const fn new(features: Features) -> Self {
        Self { roots: ArrayVec::new_const(), clock: 0, features, recent: None }
    }

    /// The EPT02 for an EPTP12, made empty if there is none yet.
    pub fn activate(&mut self, tables: &mut impl TableMemory, eptp12: Eptp) -> Result<(Eptp, Dropped), OutOfTables> {
        self.clock += 1;
        if let Some(root) = self.roots.iter_mut().find(|root| root.eptp12 == eptp12) {
            root.last_used = self.clock;
            return Ok((root.eptp02(), Dropped::Nothing));
        }
        let mut dropped = Dropped::Nothing;
        if self.roots.is_full() {
            dropped = self.drop_least_recent(tables);
        }
        let table = match tables.allocate() {
            Some(table) => table,
            None => {
                dropped = self.drop_all(tables);
                tables.allocate().ok_or(OutOfTables)?
            }
        };
        let root = Root { eptp12, table, last_used: self.clock };
        self.roots.push(root);
        Ok((root.eptp02(), dropped))
    }

    /// Repairs a violation of the EPT02 of `eptp12`, if it is the host's to repair. When the table budget is spent, all cached
    /// translations of this EPT02 go first.
    pub fn fill(
        &mut self,
        tables: &mut impl TableMemory,
        guest: &mut impl GuestTables,
        ept01: Hpa,
        eptp12: Eptp,
        address: NestedGpa,
        qualification: Qualification,
    ) -> (Fill, Dropped) {
        let translation = match walk(guest, eptp12, &self.features, address, qualification.access()) {
            Ok(translation) => translation,
            Err(WalkError::Violation(rights)) => {
                return (Fill::Violation(qualification.against(rights)), Dropped::Nothing);
            }
            Err(WalkError::Misconfiguration) => return (Fill::Misconfiguration, Dropped::Nothing),
        };
        let gpa = translation.page + address.offset_in(translation.size);
        let below = match lookup(tables, ept01, gpa.0) {
            Some(below) if below.leaf.rights().contain(qualification.access()) => below,
            _ => return (Fill::Ept01Forbids(gpa), Dropped::Nothing),
        };
        let (leaf, size) = compose(&translation, &below, address);
        let Some(root) = self.roots.iter().find(|root| root.eptp12 == eptp12).copied() else {
            return (Fill::Mapped, Dropped::All);
        };
        if self.map(tables, root.table, address.0, size, leaf).is_ok() {
            return (Fill::Mapped, Dropped::Nothing);
        }
        self.empty_all(tables);
        // An empty EPT02 needs at most three tables for one page; the budget is checked at boot to have them.
        let _ = self.map(tables, root.table, address.0, size, leaf);
        (Fill::Mapped, Dropped::All)
    }

    fn map(
        &mut self,
        tables: &mut impl TableMemory,
        root: Hpa,
        address: u64,
        size: PageSize,
        leaf: Entry,
    ) -> Result<(), OutOfTables> {
        let same_table = |recent: &Recent| recent.root == root && (recent.address ^ address) < PageSize::Size2M.bytes();
        if let (PageSize::Size4K, Some(recent)) = (size, self.recent.filter(same_table)) {
            tables.write(recent.table, index(address, 1), leaf);
            return Ok(());
        }
        // A larger page may replace the table.
        self.recent = None;
        let table = map_page(tables, root, address, size, leaf)?;
        if size == PageSize::Size4K {
            self.recent = Some(Recent { root, address: address & !(PageSize::Size2M.bytes() - 1), table });
        }
        Ok(())
    }

    /// INVEPT, single-context: by address bits, whatever the EPTP's flags.
    pub fn invalidate(&mut self, tables: &mut impl TableMemory, eptp12: Eptp) -> Dropped {
        let mut dropped = Dropped::Nothing;
        self.recent = None;
        for root in self.roots.iter().filter(|root| root.eptp12.root() == eptp12.root()) {
            empty(tables, root.table);
            dropped = match dropped {
                Dropped::Nothing => Dropped::One(root.eptp02()),
                _ => Dropped::All,
            };
        }
        dropped
    }

    /// INVEPT, global.
    pub fn invalidate_all(&mut self, tables: &mut impl TableMemory) -> Dropped {
        self.empty_all(tables);
        if self.roots.is_empty() { Dropped::Nothing } else { Dropped::All }
    }

    fn empty_all(&mut self, tables: &mut impl TableMemory) {
        self.recent = None;
        for root in &self.roots {
            empty(tables, root.table);
        }
    }

    fn drop_least_recent(&mut self, tables: &mut impl TableMemory) -> Dropped {
        self.recent = None;
        let oldest = self.roots.iter().enumerate().min_by_key(|(_, root)| root.last_used).map(|(at, _)| at);
        match oldest {
            None => Dropped::Nothing,
            Some(at) => {
                let root = self.roots.swap_remove(at);
                free_tables(tables, root.table, ROOT_LEVEL);
                Dropped::One(root.eptp02())
            }
        }
    }

    fn drop_all(&mut self, tables: &mut impl TableMemory) -> Dropped {
        self.recent = None;
        for root in self.roots.drain(..) {
            free_tables(tables, root.table, ROOT_LEVEL);
        }
        Dropped::All
    }
}

/// The leaf of EPT02 for an address: rights of both, the smaller page, EPT12's memory type (with EPT on, a processor looks at no MTRR).
fn compose(above: &Translation, below: &Mapping, address: NestedGpa) -> (Entry, PageSize) {
    let size = above.size.min(below.size);
    let gpa = above.page + address.offset_in(above.size);
    let hpa = Hpa(below.leaf.address()).align_down(below.size) + gpa.offset_in(below.size);
    let rights = above.rights.and(below.leaf.rights());
    let leaf = Entry::leaf(hpa.align_down(size).0, size, rights, above.memory_type, above.ignore_pat);
    // PML logs a page when its dirty flag becomes set. A page that is dirty in EPT12 was logged already; one that this access makes dirty
    // is left clean here, so that the processor, which tries again, sets the flag and logs it.
    (if above.was_dirty { leaf.with_dirty() } else { leaf }, size)
}

fn empty(tables: &mut impl TableMemory, root: Hpa) {
    for at in 0..crate::table::ENTRIES {
        let entry = tables.read(root, at);
        if entry.is_present() {
            tables.write(root, at, Entry::NOT_PRESENT);
            free_tables(tables, Hpa(entry.address()), ROOT_LEVEL - 1);
        }
    }
}

#[cfg(test)]
mod tests;
