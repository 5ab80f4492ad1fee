//! INVEPT: what is cached is composed anew, and only what is no longer true goes.
//!
//! EPT02 and EPT12 are walked side by side, so that an entry of EPT12 is read once for all translations below it. A page that has lost its
//! accessed flag goes too: the processor would set it again.

use super::{Dropped, NestedPaging, compose};
use crate::entry::Features;
use crate::map::{Mapping, free_tables, lookup, page_size};
use crate::table::{ENTRIES, TableMemory};
use crate::walk::{Ept12, GuestTables, Translation};
use crate::{Entry, Eptp, ExecuteControl, Gpa, Hpa, NestedGpa, Rights};

/// Tables that one INVEPT looks at; the translations of all others go. This bounds the time that the guest hypervisor waits.
pub const TABLES_AT_ONCE: u32 = 96;

impl NestedPaging {
    /// INVEPT, single-context: by address bits, whatever the EPTP's flags.
    pub fn invalidate(
        &mut self,
        tables: &mut impl TableMemory,
        guest: &impl GuestTables,
        ept01: Eptp,
        eptp12: Eptp,
    ) -> Dropped {
        self.resync(tables, guest, ept01, |root| root.root() == eptp12.root())
    }

    /// INVEPT, global; or EPT01 has changed.
    pub fn invalidate_all(&mut self, tables: &mut impl TableMemory, guest: &impl GuestTables, ept01: Eptp) -> Dropped {
        self.resync(tables, guest, ept01, |_| true)
    }

    fn resync(
        &mut self,
        tables: &mut impl TableMemory,
        guest: &impl GuestTables,
        ept01: Eptp,
        is_meant: impl Fn(Eptp) -> bool,
    ) -> Dropped {
        let (features, mut counters) = (self.features, self.counters);
        let mut dropped = Dropped::Nothing;
        let mut budget = TABLES_AT_ONCE;
        for root in self.roots_to_free_in().iter().filter(|root| is_meant(root.ept12.eptp)) {
            let mut resync = Resync { tables, guest, features, ept12: root.ept12, ept01, below: None, budget, kept: 0 };
            let (table, level) = (Hpa(root.eptp02.root()), root.eptp02.levels().root());
            let source = Source::Table(Gpa(root.ept12.eptp.root()), root.ept12.execute.all());
            counters.dropped += resync.table(table, level, NestedGpa(0), source);
            (budget, counters.kept) = (resync.budget, counters.kept + resync.kept);
            dropped = dropped.and(Dropped::One(root.eptp02));
        }
        self.counters = counters;
        dropped
    }
}

/// Where the entries of a table of EPT02 come from.
#[derive(Clone, Copy)]
enum Source {
    /// A table of EPT12, below entries that grant these rights.
    Table(Gpa, Rights),
    /// One page of EPT12 that is larger than those of EPT01.
    Page(Translation),
}

struct Resync<'a, T, G> {
    tables: &'a mut T,
    guest: &'a G,
    features: Features,
    ept12: Ept12,
    ept01: Eptp,
    /// What EPT01 maps the last address to, and that address's page: the next one is often on it.
    below: Option<(Gpa, Mapping)>,
    budget: u32,
    kept: u64,
}

impl<T: TableMemory, G: GuestTables> Resync<'_, T, G> {
    /// Composes the translations in one table of EPT02 and all below it anew. Returns how many were dropped.
    fn table(&mut self, table: Hpa, level: u32, start: NestedGpa, source: Source) -> u64 {
        let mut dropped = 0;
        let spent = self.budget == 0;
        self.budget = self.budget.saturating_sub(1);
        for at in 0..ENTRIES {
            let cached = self.tables.read(table, at);
            if !cached.is_present() {
                continue;
            }
            let address = start + (at << (12 + 9 * (level - 1)));
            let source = if spent { None } else { self.source(source, level, at) };
            if cached.is_leaf(level) {
                let leaf = source.and_then(|source| self.leaf(source, level, address));
                // The write that made the page dirty in EPT12 has yet to be tried again, and logged.
                let unlogged = cached.rights(ExecuteControl::Uniform).contain(Rights::WRITE) && !cached.is_dirty();
                let leaf = if unlogged { leaf.map(Entry::without_dirty) } else { leaf };
                self.tables.write(table, at, leaf.unwrap_or(Entry::NOT_PRESENT));
                (self.kept, dropped) = (self.kept + u64::from(leaf.is_some()), dropped + u64::from(leaf.is_none()));
                continue;
            }
            let child = Hpa(cached.address());
            match source {
                Some(source) => dropped += self.table(child, level - 1, address, source),
                None => {
                    self.tables.write(table, at, Entry::NOT_PRESENT);
                    free_tables(self.tables, child, level - 1);
                    dropped += 1;
                }
            }
        }
        dropped
    }

    /// What EPT12 has behind an entry of a table, if an access would find it without setting a flag.
    fn source(&self, source: Source, level: u32, at: u64) -> Option<Source> {
        let Source::Table(table, above) = source else { return Some(source) };
        let entry = Entry(self.guest.read(table + at * 8));
        let rights = entry.rights(self.ept12.execute);
        let usable = rights != Rights::NONE
            && !entry.is_misconfigured(level, &self.features, self.ept12.execute)
            && (entry.is_accessed() || !self.ept12.eptp.has_flags());
        usable.then(|| match entry.is_leaf(level) {
            true => Source::Page(Translation::new(entry, level, above.and(rights), self.ept12.eptp, Rights::NONE)),
            false => Source::Table(Gpa(entry.address()), above.and(rights)),
        })
    }

    /// The leaf at `level` for an address, if both tables still have a page there that is large enough.
    fn leaf(&mut self, source: Source, level: u32, address: NestedGpa) -> Option<Entry> {
        let Source::Page(translation) = source else { return None };
        let gpa = translation.page + address.offset_in(translation.size);
        let below = self.below(gpa)?;
        let wanted = page_size(level);
        let (leaf, size) = compose(&translation, &below, address, self.ept12.execute, wanted);
        (size == wanted && leaf.is_present()).then_some(leaf)
    }

    fn below(&mut self, gpa: Gpa) -> Option<Mapping> {
        if let Some((page, mapping)) = self.below
            && gpa.align_down(mapping.size) == page
        {
            return Some(mapping);
        }
        let mapping = lookup(self.tables, self.ept01, gpa.0)?;
        self.below = Some((gpa.align_down(mapping.size), mapping));
        Some(mapping)
    }
}
