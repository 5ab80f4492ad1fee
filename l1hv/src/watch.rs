//! Pages of the guest hypervisor whose content the host has merged into structures of its own. They are read-only in EPT01, and so in every
//! EPT02: the merge is done again only after a write.

use core::cell::Cell;

use ept::Gpa;

use crate::mem::PAGE_BYTES;

/// Pages watched at a time: as many VMCSs can take turns without a merge.
pub const SLOTS: usize = 8;

/// The watched pages, each in a slot that other arrays share.
#[derive(Debug, Default)]
pub struct Watches {
    pages: [Cell<Option<Gpa>>; SLOTS],
    /// The host itself has written to the page since.
    written: [Cell<bool>; SLOTS],
    next: Cell<usize>,
    /// A watch was lost or met a write since the last merge.
    changed: Cell<bool>,
}

impl Watches {
    /// Whether the page in a slot is this one and has its content still.
    #[inline]
    pub fn is_unchanged(&self, slot: usize, page: Gpa) -> bool {
        self.pages[slot].get() == Some(page) && !self.written[slot].get()
    }

    /// Whether any page may have changed since [`Self::note_merge`].
    #[inline]
    pub fn have_changed(&self) -> bool {
        self.changed.get()
    }

    /// What was merged is what the pages have now.
    pub fn note_merge(&self) {
        self.changed.set(false);
    }

    /// The slot of an unchanged page.
    pub fn find(&self, page: Gpa) -> Option<usize> {
        (0..SLOTS).find(|&slot| self.is_unchanged(slot, page))
    }

    /// The slot to use for a page: its own, else a free one, else each in turn. Returns the page that loses it.
    pub fn assign(&self, page: Gpa) -> (usize, Option<Gpa>) {
        let own = self.pages.iter().position(|watched| watched.get() == Some(page));
        let free = || self.pages.iter().position(|watched| watched.get().is_none());
        let slot = own.or_else(free).unwrap_or_else(|| {
            self.next.set((self.next.get() + 1) % SLOTS);
            self.next.get()
        });
        self.written[slot].set(false);
        let loser = self.pages[slot].replace(Some(page)).filter(|&old| old != page);
        (slot, loser)
    }

    /// Whether a page is watched.
    pub fn contains(&self, page: Gpa) -> bool {
        self.pages.iter().any(|watched| watched.get() == Some(page))
    }

    /// Watches a page no more. Returns whether it was watched.
    pub fn remove(&self, page: Gpa) -> bool {
        let slot = self.pages.iter().find(|watched| watched.get() == Some(page));
        let removed = slot.is_some_and(|watched| watched.take().is_some());
        self.changed.set(self.changed.get() | removed);
        removed
    }

    /// The host writes for the guest hypervisor, which does not meet EPT01.
    #[inline]
    pub fn note_write(&self, to: Gpa, length: usize) {
        for (watched, written) in self.pages.iter().zip(&self.written) {
            if watched.get().is_some_and(|page| to.0 < page.0 + PAGE_BYTES && page.0 < to.0 + length as u64) {
                written.set(true);
                self.changed.set(true);
            }
        }
    }
}
