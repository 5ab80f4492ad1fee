//! Pages of the guest hypervisor whose content the host has merged into structures of its own. They are read-only in EPT01, and so in every
//! EPT02: the merge is done again only after a write.
//!
//! Each processor has merged what it needed. A page is protected from all processors, and one that is about to write strikes it out of
//! everybody's list. Until all have dropped their older translations of a page, a write of theirs could go unseen: so long it is merged at
//! every entry.

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use ept::Gpa;

use crate::processor;

/// Pages watched at a time: as many VMCSs can take turns without a merge.
pub const SLOTS: usize = 8;

/// No page.
const NONE: u64 = u64::MAX;

/// Merges of a page after a write before it is watched again. Who writes once often writes more, and to watch costs more than to merge.
const PATIENCE: u8 = 8;

/// What a processor watches as one kind, as others see it.
#[derive(Debug)]
pub struct WatchedPages {
    pages: [AtomicU64; SLOTS],
    /// A page may have changed since it was merged.
    changed: AtomicBool,
    patience: AtomicU8,
}

impl WatchedPages {
    /// MSR bitmaps, VMREAD bitmaps and VMWRITE bitmaps.
    pub const KINDS: usize = 3;

    /// None.
    pub const fn new() -> Self {
        Self {
            pages: [const { AtomicU64::new(NONE) }; SLOTS],
            changed: AtomicBool::new(false),
            patience: AtomicU8::new(0),
        }
    }

    fn contains(&self, page: Gpa) -> bool {
        self.pages.iter().any(|watched| watched.load(Ordering::SeqCst) == page.0)
    }

    /// Somebody is about to write to a page, or has done so.
    fn strike(&self, page: Gpa) {
        for watched in &self.pages {
            if watched.compare_exchange(page.0, NONE, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                self.patience.store(PATIENCE, Ordering::Relaxed);
                self.changed.store(true, Ordering::SeqCst);
            }
        }
    }
}

/// Whether any processor watches a page.
pub fn is_watched(page: Gpa) -> bool {
    processor::all().iter().flat_map(|processor| &processor.watched).any(|watched| watched.contains(page))
}

/// No processor watches a page any more.
pub fn strike(page: Gpa) {
    processor::all().iter().flat_map(|processor| &processor.watched).for_each(|watched| watched.strike(page));
}

/// The watched pages of this processor, each in a slot that other arrays share.
#[derive(Debug)]
pub struct Watches {
    shared: &'static WatchedPages,
    /// The flush that all processors must have taken part in before no write can be missed; 0 when they have.
    awaited: [Cell<u64>; SLOTS],
    next: Cell<usize>,
}

impl Watches {
    /// Those in `shared`, which nobody else changes but to strike pages out.
    pub const fn new(shared: &'static WatchedPages) -> Self {
        Self { shared, awaited: [const { Cell::new(0) }; SLOTS], next: Cell::new(0) }
    }

    /// Whether the page in a slot is this one and has its content still.
    #[inline]
    pub fn is_unchanged(&self, slot: usize, page: Gpa) -> bool {
        self.shared.pages[slot].load(Ordering::Acquire) == page.0 && self.awaited[slot].get() == 0
    }

    /// Whether any page may have changed since [`Self::begin_merge`].
    #[inline]
    pub fn have_changed(&self) -> bool {
        self.shared.changed.load(Ordering::Acquire)
    }

    /// What is found unchanged from now on is so: a change from now on is noted again.
    pub fn begin_merge(&self) {
        // Exchanged, not stored: no page may be looked at before.
        self.shared.changed.swap(false, Ordering::SeqCst);
    }

    /// The slot of an unchanged page.
    pub fn find(&self, page: Gpa) -> Option<usize> {
        (0..SLOTS).find(|&slot| self.is_unchanged(slot, page))
    }

    /// The slot of a page that has been protected, but perhaps not from all processors yet.
    pub fn find_awaited(&self, page: Gpa) -> Option<usize> {
        self.shared.pages.iter().position(|watched| watched.load(Ordering::Acquire) == page.0)
    }

    /// Whether a page is worth to be watched now.
    pub fn is_worthwhile(&self) -> bool {
        let patience = self.shared.patience.load(Ordering::Relaxed);
        self.shared.patience.store(patience.saturating_sub(1), Ordering::Relaxed);
        patience == 0
    }

    /// The slot to use for a page: a free one, else each in turn. Returns the page that loses it.
    pub fn assign(&self, page: Gpa) -> (usize, Option<Gpa>) {
        let free = self.shared.pages.iter().position(|watched| watched.load(Ordering::Acquire) == NONE);
        let slot = free.unwrap_or_else(|| {
            self.next.set((self.next.get() + 1) % SLOTS);
            self.next.get()
        });
        let loser = self.shared.pages[slot].swap(page.0, Ordering::SeqCst);
        (slot, (loser != NONE).then_some(Gpa(loser)))
    }

    /// The page in a slot is read-only, for all processors that take part in flush `number`.
    pub fn await_flush(&self, slot: usize, number: u64) {
        self.awaited[slot].set(number);
        self.look_for_flush(slot);
    }

    /// Looks whether they have. What is merged after that stays true until the page is struck out.
    pub fn look_for_flush(&self, slot: usize) {
        if processor::all_have_flushed(self.awaited[slot].get()) {
            self.awaited[slot].set(0);
        } else {
            self.shared.changed.store(true, Ordering::SeqCst);
        }
    }

    /// The page in a slot is not watched after all.
    pub fn abandon(&self, slot: usize) {
        self.shared.pages[slot].store(NONE, Ordering::SeqCst);
        self.shared.changed.store(true, Ordering::SeqCst);
    }
}
