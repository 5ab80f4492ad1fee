//! INVEPT that keeps the translations that are still true.
//!
//! INVEPT only unlinks the tables below the root: an unlinked table is not present for the processor, but the host
//! still knows it. The first violation below an unlinked table walks EPT02 and EPT12 side by side, composes the table's
//! entries anew from the table of EPT12 that they come from, and links the table again, with the tables below it
//! unlinked. So an INVEPT costs a pass over the root table, and then one exit for each 2 MiB that are used again, not
//! one for each page. A page that has lost its accessed flag is dropped: its next access must set the flag again.

use super::roots::Root;
use super::{Context, Dropped, NestedPaging, compose};
use crate::entry::Features;
use crate::map::{Mapping, free_tables, lookup, page_size};
use crate::table::{ENTRIES, TableMemory, for_each_used, index};
use crate::walk::{GuestTables, Translation};
use crate::{Entry, Eptp12, Gpa, Hpa, NestedGpa, PageSize, Rights};

impl NestedPaging {
    /// INVEPT, single-context: for the EPTP's address bits, whatever its flags are.
    pub fn invalidate(&mut self, tables: &mut impl TableMemory, eptp12: Eptp12) -> Dropped {
        self.forget_recent();
        let unlinked = unlink(tables, self.roots.at(eptp12.root()));
        self.take_dropped().and(unlinked)
    }

    /// INVEPT, global. Also for a change of EPT01.
    pub fn invalidate_all(&mut self, tables: &mut impl TableMemory) -> Dropped {
        self.forget_recent();
        let unlinked = unlink(tables, self.roots.iter());
        self.take_dropped().and(unlinked)
    }
}

fn unlink<'a>(tables: &mut impl TableMemory, roots: impl Iterator<Item = &'a Root>) -> Dropped {
    roots.fold(Dropped::Nothing, |dropped, root| {
        let table = root.eptp02.root();
        for_each_used(tables, table, |tables, at, entry| {
            if entry.is_present() {
                tables.write(table, at, entry.unlinked());
            }
        });
        dropped.and(Dropped::One(root.eptp02))
    })
}

/// Which entries of a table are composed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entries {
    /// Entries that have a translation already.
    Cached,
    /// All entries for which EPT12 has a translation.
    All,
}

/// Where the entries of a table of EPT02 come from.
#[derive(Clone, Copy)]
enum Source {
    /// A table of EPT12, below entries that grant these rights.
    Table(Gpa, Rights),
    /// One page of EPT12 that is larger than the pages of EPT01.
    Page(Translation),
}

/// Composes many entries of one EPT02.
pub(super) struct Resync<'a, 'b, T, G> {
    context: &'a mut Context<'b, T, G>,
    features: Features,
    root: Root,
    /// EPT01's mapping of the last address, and the first byte of that page: the next address is often on the same
    /// page.
    below: Option<(Gpa, Mapping)>,
    /// Translations that were still true.
    pub kept: u64,
    /// Translations and tables that were no longer true.
    pub dropped: u64,
    /// Whether tables were given back that may be in paging-structure caches.
    pub gave_tables_back: bool,
}

impl<'a, 'b, T: TableMemory, G: GuestTables> Resync<'a, 'b, T, G> {
    pub fn new(context: &'a mut Context<'b, T, G>, features: Features, root: Root) -> Self {
        Self { context, features, root, below: None, kept: 0, dropped: 0, gave_tables_back: false }
    }

    pub fn tables(&mut self) -> &mut T {
        self.context.tables
    }

    /// Links the tables on the way to an address again.
    pub fn relink(&mut self, address: NestedGpa) {
        let (mut table, mut level) = (self.root.eptp02.root(), self.root.eptp02.levels().root());
        let mut source = self.whole();
        while level > 1 {
            let at = index(address, level);
            let entry = self.context.tables.read(table, at);
            if !entry.links_table(level) {
                return;
            }
            let child = entry.table_address();
            let Some(below) = self.source(source, level, at) else {
                self.context.tables.write(table, at, Entry::NOT_PRESENT);
                free_tables(self.context.tables, child, level - 1);
                self.dropped += 1;
                self.gave_tables_back = true;
                return;
            };
            if entry.is_unlinked() {
                let size = page_size(level).bytes();
                self.compose_table(child, level - 1, NestedGpa(address.0 & !(size - 1)), below, Entries::Cached);
                self.context.tables.write(table, at, Entry::table(child));
            }
            (table, level, source) = (child, level - 1, below);
        }
    }

    /// Fills a page table with all translations that EPT12 has for it, after an access to its first page.
    pub fn populate(&mut self, table: Hpa, address: NestedGpa) {
        let mut source = self.whole();
        for level in (2..=self.root.eptp02.levels().root()).rev() {
            match self.source(source, level, index(address, level)) {
                Some(below) => source = below,
                None => return,
            }
        }
        self.compose_table(table, 1, address.align_down(PageSize::Size2M), source, Entries::All);
    }

    fn whole(&self) -> Source {
        let ept12 = self.root.ept12;
        Source::Table(ept12.eptp.root(), ept12.execute.all())
    }

    fn compose_table(&mut self, table: Hpa, level: u32, start: NestedGpa, source: Source, which: Entries) {
        let next = |tables: &T, from| if which == Entries::Cached { tables.next_used(table, from) } else { from };
        let mut next_at = next(self.context.tables, 0);
        while next_at < ENTRIES {
            let at = next_at;
            next_at = next(self.context.tables, at + 1);
            let cached = self.context.tables.read(table, at);
            if !cached.is_present() && which == Entries::Cached {
                continue;
            }
            if cached.links_table(level) {
                self.context.tables.write(table, at, cached.unlinked());
                continue;
            }
            let address = start + (at << (12 + 9 * (level - 1)));
            let leaf = self.source(source, level, at).and_then(|source| self.leaf(source, level, address));
            self.context.tables.write(table, at, leaf.unwrap_or(Entry::NOT_PRESENT));
            if cached.is_present() {
                (self.kept, self.dropped) =
                    (self.kept + u64::from(leaf.is_some()), self.dropped + u64::from(leaf.is_none()));
            }
        }
    }

    /// The table or page that an entry of EPT12 leads to, if an access would use the entry without setting a flag.
    #[inline]
    fn source(&self, source: Source, level: u32, at: u64) -> Option<Source> {
        let Source::Table(table, above) = source else { return Some(source) };
        let (eptp, execute) = (self.root.ept12.eptp, self.root.ept12.execute);
        let entry = Entry::<Gpa>::from_bits(self.context.guest.read(table + at * 8));
        let rights = entry.rights(execute);
        let usable = rights != Rights::NONE
            && (entry.is_accessed() || !eptp.has_flags())
            && !entry.is_misconfigured(level, &self.features, execute);
        usable.then(|| match entry.is_leaf(level) {
            true => Source::Page(Translation::new(entry, level, above.and(rights), eptp, Rights::NONE)),
            false => Source::Table(entry.address(), above.and(rights)),
        })
    }

    /// The leaf at `level` for an address, if both tables have a page there that is large enough.
    #[inline]
    fn leaf(&mut self, source: Source, level: u32, address: NestedGpa) -> Option<Entry> {
        let Source::Page(translation) = source else { return None };
        let gpa = translation.page + address.offset_in(translation.size);
        let below = self.below(gpa)?;
        let wanted = page_size(level);
        let (leaf, size) = compose(&translation, &below, address, self.root.ept12.execute, wanted);
        (size == wanted && leaf.is_present()).then_some(leaf)
    }

    #[inline]
    fn below(&mut self, gpa: Gpa) -> Option<Mapping> {
        if let Some((page, mapping)) = self.below
            && gpa.align_down(mapping.size) == page
        {
            return Some(mapping);
        }
        let mapping = lookup(self.context.tables, self.context.ept01, gpa)?;
        self.below = Some((gpa.align_down(mapping.size), mapping));
        Some(mapping)
    }
}
