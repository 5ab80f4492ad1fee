//! EPT02: the cache of compositions of EPT12 over EPT01, one root for each EPT12 in use.

mod resync;
mod roots;

use core::{fmt, mem};

use resync::Resync;
use roots::{Root, Roots};

use crate::entry::Features;
use crate::map::{LeafTable, MapError, Mapping, OutOfTables, free_tables, lookup, map_page, unmap};
use crate::table::{TableMemory, index};
use crate::violation::EptViolation;
use crate::walk::{Ept12, GuestTables, Refusal, Translation, WalkError, walk, walk_unusual};
use crate::{Entry, Eptp01, Eptp02, ExecuteControl, Gpa, Hpa, NestedGpa, PageSize, Rights};

/// The most EPT02s that are kept.
pub const ROOTS: usize = Roots::MOST;

/// The outcome of a violation of EPT02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fill {
    /// EPT02 has the translation now, or EPT12 changed during the walk: the nested guest repeats the access.
    Mapped,
    /// EPT12 forbids the access: an EPT violation for the guest hypervisor.
    Violation {
        /// Its exit qualification.
        qualification: EptViolation,
        /// The entry that decided has "suppress #VE" set.
        suppresses_ve: bool,
    },
    /// EPT12 is misconfigured: an EPT misconfiguration for the guest hypervisor.
    Misconfiguration,
    /// EPT12 permits the access, but EPT01 does not permit it at this address, to which EPT12 translates.
    Ept01Forbids(Gpa),
}

/// Translations were dropped, or tables given back that a processor's paging-structure caches may still lead to: INVEPT
/// must follow before a guest runs on that EPT02 again.
#[must_use = "the processor still caches what was dropped"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// No translations.
    Nothing,
    /// Translations of one EPT02.
    One(Eptp02),
    /// Translations of several EPT02s.
    All,
}

impl Dropped {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nothing, dropped) | (dropped, Self::Nothing) => dropped,
            (one, other) if one == other => one,
            _ => Self::All,
        }
    }
}

/// Why a fill failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FillError {
    /// The table budget does not suffice for this one translation.
    OutOfTables,
    /// The EPT02 has too few levels for the address. It has as many as the EPT12, so the walk of EPT12 fails before.
    OutOfReach,
    /// The EPT12 has no EPT02: it was not activated, or its EPT02 has made room for another one since.
    NotActive,
}

impl fmt::Display for FillError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfTables => OutOfTables.fmt(f),
            Self::OutOfReach => MapError::OutOfReach.fmt(f),
            Self::NotActive => f.write_str("the EPT12 has no EPT02"),
        }
    }
}

impl core::error::Error for FillError {}

impl From<MapError> for FillError {
    fn from(error: MapError) -> Self {
        match error {
            MapError::OutOfTables => Self::OutOfTables,
            MapError::OutOfReach => Self::OutOfReach,
        }
    }
}

/// Counts of what the cache has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Times that tables were given back because the budget was spent.
    pub reclaims: u64,
    /// Translations that were still true when they were needed after an INVEPT, perhaps with other attributes.
    pub kept: u64,
    /// Translations and whole tables that were no longer true.
    pub dropped: u64,
}

/// The tables that EPT02s are composed from, and the memory that they are built in.
#[derive(Debug)]
pub struct Context<'a, T, G> {
    /// The host's tables.
    pub tables: &'a mut T,
    /// The guest hypervisor's tables.
    pub guest: &'a mut G,
    /// EPT01.
    pub ept01: Eptp01,
}

/// How much a fill puts into EPT02.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// Only the missing translation. For a page that the guest hypervisor has just mapped: its neighbours are probably
    /// not mapped yet.
    Page,
    /// If the translation needs a new page table, all translations of that table. For a page that the guest hypervisor
    /// mapped some time ago.
    Table,
}

/// The cache of EPT02s.
#[derive(Debug)]
pub struct NestedPaging {
    roots: Roots,
    /// The root that was activated last.
    active: Option<Root>,
    features: Features,
    recent: Option<Recent>,
    /// Drops that the caller has not been told of yet.
    dropped: Dropped,
    counters: Counters,
}

/// The table that got the last 4-KiB page. Guests access neighbouring pages one after the other.
#[derive(Clone, Copy, Debug)]
struct Recent {
    eptp02: Eptp02,
    /// The address whose 2 MiB the table maps.
    address: NestedGpa,
    table: Hpa,
}

impl NestedPaging {
    /// The most tables that one translation needs, roots included: with fewer, nothing can be cached.
    pub const LEAST_TABLES: usize = 5;

    /// The bytes that each cache takes from the heap when it is made. It takes no more later.
    pub const HEAP_BYTES: usize = Roots::HEAP_BYTES;

    /// An empty cache. `features` are those offered to the guest hypervisor.
    pub fn new(features: Features) -> Self {
        let counters = Counters { reclaims: 0, kept: 0, dropped: 0 };
        Self { roots: Roots::new(), active: None, features, recent: None, dropped: Dropped::Nothing, counters }
    }

    /// The counts so far.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// The EPT02 for an EPT12, made empty if there is none yet.
    ///
    /// # Errors
    ///
    /// No table is left for its root, and no other EPT02 has one to give back.
    pub fn activate(&mut self, tables: &mut impl TableMemory, ept12: Ept12) -> Result<(Eptp02, Dropped), OutOfTables> {
        if let Some(root) = self.roots.take_into_use(ept12) {
            self.active = Some(root);
            return Ok((root.eptp02, self.take_dropped()));
        }
        if self.roots.is_full() {
            self.give_back(tables, None)?;
        }
        let table = loop {
            match tables.allocate() {
                Some(table) => break table,
                None => _ = self.give_back(tables, None)?,
            }
        };
        // EPT02's EPTP has the same accessed-and-dirty enable bit, so that accesses to guest paging structures count as
        // writes exactly if the guest hypervisor expects that.
        let eptp02 = ept12.eptp.with_root(table);
        self.active = Some(self.roots.insert(ept12, eptp02));
        Ok((eptp02, self.take_dropped()))
    }

    /// The drops since the caller was told last.
    #[inline]
    fn take_dropped(&mut self) -> Dropped {
        mem::replace(&mut self.dropped, Dropped::Nothing)
    }

    /// The root for an EPT12, mostly the one that the nested guest runs on.
    #[inline]
    fn root(&self, ept12: Ept12) -> Option<Root> {
        self.active.filter(|active| active.ept12 == ept12).or_else(|| self.roots.find(ept12))
    }

    /// Repairs a violation of the EPT02 of `ept12`, unless the guest hypervisor must get it.
    ///
    /// # Errors
    ///
    /// As [`FillError`] says.
    pub fn fill(
        &mut self,
        context: &mut Context<'_, impl TableMemory, impl GuestTables>,
        ept12: Ept12,
        address: NestedGpa,
        qualification: EptViolation,
        extent: Extent,
    ) -> Result<(Fill, Dropped), FillError> {
        let (access, or_else) = qualification.needs(ept12.execute, &self.features);
        let mut translation = walk(context.guest, ept12, &self.features, address, access);
        if let Some(access) = or_else
            && matches!(translation, Err(WalkError::Violation(_)))
        {
            translation = walk_unusual(context.guest, ept12, &self.features, address, access);
        }
        let translation = match translation {
            Ok(translation) => translation,
            Err(WalkError::Violation(Refusal { rights, suppresses_ve })) => {
                if qualification.permits_something() {
                    self.forget(context.tables, ept12, address);
                }
                let qualification = qualification.against(rights);
                return Ok((Fill::Violation { qualification, suppresses_ve }, Dropped::Nothing));
            }
            Err(WalkError::Changed) => return Ok((Fill::Mapped, Dropped::Nothing)),
            Err(WalkError::Misconfiguration) => return Ok((Fill::Misconfiguration, Dropped::Nothing)),
        };
        let gpa = translation.page + address.offset_in(translation.size);
        let below = match lookup(context.tables, context.ept01, gpa) {
            Some(below) if permits(&below, access) => below,
            _ => return Ok((Fill::Ept01Forbids(gpa), Dropped::Nothing)),
        };
        let composed = compose(&translation, &below, address, ept12.execute, PageSize::Size1G);
        let root = self.root(ept12).ok_or(FillError::NotActive)?;
        let mut is_emptied = false;
        while let Err(error) = self.map(context, root, address, composed, extent) {
            if error != MapError::OutOfTables || is_emptied {
                return Err(error.into());
            }
            is_emptied = self.give_back(context.tables, Some(root.eptp02)).map_err(MapError::from)? == root.eptp02;
        }
        Ok((Fill::Mapped, self.take_dropped()))
    }

    /// Drops the translation of an address. An EPT violation invalidates cached mappings of its address, without INVEPT
    /// (SDM 29.4.3.1 "Operations that Invalidate Cached Mappings").
    fn forget(&mut self, tables: &mut impl TableMemory, ept12: Ept12, address: NestedGpa) {
        if let Some(root) = self.root(ept12) {
            unmap(tables, root.eptp02, address);
        }
    }

    #[inline]
    fn map(
        &mut self,
        context: &mut Context<'_, impl TableMemory, impl GuestTables>,
        root: Root,
        address: NestedGpa,
        (leaf, size): (Entry, PageSize),
        extent: Extent,
    ) -> Result<(), MapError> {
        let same_table =
            |recent: &Recent| recent.eptp02 == root.eptp02 && (recent.address.0 ^ address.0) < PageSize::Size2M.bytes();
        if let (PageSize::Size4K, Some(recent)) = (size, self.recent.filter(same_table)) {
            context.tables.write(recent.table, index(address, 1), leaf);
            return Ok(());
        }
        self.map_elsewhere(context, root, address, (leaf, size), extent)
    }

    #[inline(never)]
    fn map_elsewhere(
        &mut self,
        context: &mut Context<'_, impl TableMemory, impl GuestTables>,
        root: Root,
        address: NestedGpa,
        (leaf, size): (Entry, PageSize),
        extent: Extent,
    ) -> Result<(), MapError> {
        // A larger page may replace the table.
        self.recent = None;
        let mut resync = Resync::new(context, self.features, root);
        resync.relink(address);
        let mapped = map_page(resync.tables(), root.eptp02, address, size, leaf);
        if resync.gave_tables_back || mapped.is_ok_and(|leaf| leaf.replaced_tables) {
            self.dropped = self.dropped.and(Dropped::One(root.eptp02));
        }
        let LeafTable { table, is_new, .. } = mapped?;
        if size == PageSize::Size4K {
            if is_new && extent == Extent::Table {
                resync.populate(table, address);
                resync.tables().write(table, index(address, 1), leaf);
            }
            self.recent = Some(Recent { eptp02: root.eptp02, address: address.align_down(PageSize::Size2M), table });
        }
        self.counters.kept += resync.kept;
        self.counters.dropped += resync.dropped;
        Ok(())
    }

    /// Gives tables back when none is left: those of the least recently used root other than `needed`. If there is no
    /// other, all tables of `needed` but its root table.
    ///
    /// # Errors
    ///
    /// There is no table to give back.
    #[cold]
    pub fn reclaim(&mut self, tables: &mut impl TableMemory, needed: Option<Eptp02>) -> Result<Dropped, OutOfTables> {
        self.give_back(tables, needed)?;
        Ok(self.take_dropped())
    }

    /// As [`Self::reclaim`], for callers in this module. Returns the EPT02 whose tables were given back.
    #[cold]
    fn give_back(&mut self, tables: &mut impl TableMemory, needed: Option<Eptp02>) -> Result<Eptp02, OutOfTables> {
        self.counters.reclaims += 1;
        self.forget_recent();
        let eptp02 = if let Some(root) = self.roots.remove_oldest(needed) {
            self.active = self.active.filter(|active| active.eptp02 != root.eptp02);
            free_tables(tables, root.eptp02.root(), root.eptp02.levels().root());
            root.eptp02
        } else {
            let last = self.roots.iter().next().ok_or(OutOfTables)?.eptp02;
            if !empty(tables, last) {
                return Err(OutOfTables);
            }
            last
        };
        self.dropped = self.dropped.and(Dropped::One(eptp02));
        Ok(eptp02)
    }

    /// To be called before tables are freed or unlinked: the recent table may be one of them.
    fn forget_recent(&mut self) {
        self.recent = None;
    }
}

/// Whether EPT01, which does not use mode-based execute control, permits an access.
fn permits(below: &Mapping, access: Rights) -> bool {
    ExecuteControl::BY_MODE.widen(below.leaf.rights(ExecuteControl::UNIFORM)).contain(access)
}

/// The leaf of EPT02 for an address: the rights that both tables grant, the smaller page size but at most `largest`,
/// and EPT12's memory type (with EPT on, a processor ignores the MTRRs).
#[inline]
fn compose(
    above: &Translation,
    below: &Mapping,
    address: NestedGpa,
    execute: ExecuteControl,
    largest: PageSize,
) -> (Entry, PageSize) {
    let size = above.size.min(below.size).min(largest);
    let gpa = above.page + address.offset_in(above.size);
    let hpa = below.leaf.address().align_down(below.size) + gpa.offset_in(below.size);
    let rights = above.rights.and(execute.widen(below.leaf.rights(ExecuteControl::UNIFORM)));
    let leaf = Entry::leaf(hpa.align_down(size), size, rights, above.caching);
    // A page is writable in EPT02 only if it is dirty in EPT12, so that the processor has no flag to set.
    (leaf.with_dirty(), size)
}

/// Gives back all tables below a root. Returns whether there was one.
fn empty(tables: &mut impl TableMemory, eptp02: Eptp02) -> bool {
    let (root, level) = (eptp02.root(), eptp02.levels().root());
    let mut any = false;
    for at in 0..crate::table::ENTRIES {
        let entry = tables.read(root, at);
        if entry.links_table(level) {
            any = true;
            tables.write(root, at, Entry::NOT_PRESENT);
            free_tables(tables, entry.table_address(), level - 1);
        }
    }
    any
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
