//! Pages of the guest hypervisor whose content the host has merged into structures of its own. Such a page is read-only
//! in EPT01, and so in every EPT02: the host repeats the merge only after a write.
//!
//! Each processor has a list of the pages that it has merged. A page is protected from all processors, and a processor
//! that is about to write to it strikes it out of every list. As long as one processor may use an older translation of
//! the page, a write could go unseen: until then every entry repeats the merge. A page that the processor itself writes
//! to, because vmcs02 names it, is not watched: no EPT is in the way of such a write.

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use ept::{Gpa, Hpa};

/// Pages watched at a time: as many VMCSs can take turns without a merge.
pub const SLOTS: usize = 8;

/// No page.
const NONE: u64 = u64::MAX;

/// Merges of a page after a write before the page is watched again. A page that was written once is often written
/// again, and watching costs more than merging.
const PATIENCE: u8 = 8;

/// The pages that a processor watches for one kind of merge. Other processors access them too.
#[derive(Debug)]
pub struct WatchedPages {
    pages: [AtomicU64; SLOTS],
    /// A page may have changed since it was merged.
    changed: AtomicBool,
    patience: AtomicU8,
}

/// The kind of bitmap that a watched page holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MergedAs {
    /// An MSR bitmap.
    MsrBitmap,
    /// A VMREAD bitmap.
    VmreadBitmap,
    /// A VMWRITE bitmap.
    VmwriteBitmap,
    /// I/O bitmap A.
    IoBitmapA,
    /// I/O bitmap B.
    IoBitmapB,
}

/// A bitmap in the host's memory, merged from a bitmap of the guest hypervisor.
#[derive(Debug)]
pub struct MergedBitmap {
    /// Its content.
    pub bytes: &'static mut [u8],
    /// Its address.
    pub address: Hpa,
}

impl MergedAs {
    /// How many kinds there are.
    pub const COUNT: usize = Self::IoBitmapB as usize + 1;
}

impl WatchedPages {
    /// No page.
    pub const fn new() -> Self {
        Self {
            pages: [const { AtomicU64::new(NONE) }; SLOTS],
            changed: AtomicBool::new(false),
            patience: AtomicU8::new(0),
        }
    }

    /// Whether a page is watched.
    pub fn contains(&self, page: Gpa) -> bool {
        self.pages.iter().any(|watched| watched.load(Ordering::SeqCst) == page.0)
    }

    /// Strikes a page out, because a write to it is about to happen or has happened.
    pub fn strike(&self, page: Gpa) {
        for watched in &self.pages {
            if watched.compare_exchange(page.0, NONE, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                self.patience.store(PATIENCE, Ordering::Relaxed);
                self.changed.store(true, Ordering::SeqCst);
            }
        }
    }
}

impl Default for WatchedPages {
    fn default() -> Self {
        Self::new()
    }
}

/// Pages that vmcs02 of one processor gives the processor to write to.
#[derive(Debug)]
pub struct ProcessorWritten([AtomicU64; Self::PAGES]);

impl ProcessorWritten {
    /// How many there are: the virtual-APIC page and that of the posted-interrupt descriptor.
    pub const PAGES: usize = 2;

    /// No page.
    pub const fn new() -> Self {
        Self([const { AtomicU64::new(NONE) }; Self::PAGES])
    }

    /// Whether a page is among them. Who asks has made the page read-only before.
    pub fn contains(&self, page: Gpa) -> bool {
        fence(Ordering::SeqCst);
        self.0.iter().any(|written| written.load(Ordering::SeqCst) == page.0)
    }

    /// Others take their place. Who sets them strikes them out of all lists afterwards.
    pub fn set(&self, pages: [Gpa; Self::PAGES]) {
        for (written, page) in self.0.iter().zip(pages) {
            // Exchanged, not stored: whether the page is read-only must not be looked at before.
            written.swap(page.0, Ordering::SeqCst);
        }
    }
}

impl Default for ProcessorWritten {
    fn default() -> Self {
        Self::new()
    }
}

/// The watched pages of this processor, each in a slot that other arrays share.
#[derive(Debug)]
pub struct Watches {
    shared: &'static WatchedPages,
    /// The flush that all processors must take part in before no write can be missed; 0 when they have.
    awaited: [Cell<u64>; SLOTS],
    next: Cell<usize>,
}

impl Watches {
    /// The pages in `shared`. All other code only strikes pages out of it.
    pub const fn new(shared: &'static WatchedPages) -> Self {
        Self { shared, awaited: [const { Cell::new(0) }; SLOTS], next: Cell::new(0) }
    }

    /// Whether the page in a slot is this one and its content is unchanged.
    #[inline]
    pub fn is_unchanged(&self, slot: usize, page: Gpa) -> bool {
        self.shared.pages[slot].load(Ordering::Acquire) == page.0 && self.awaited[slot].get() == 0
    }

    /// Whether any page may have changed since [`Self::begin_merge`].
    #[inline]
    pub fn have_changed(&self) -> bool {
        self.shared.changed.load(Ordering::Acquire)
    }

    /// Clears the change flag and starts a new observation: every write after this call sets it again.
    pub fn begin_merge(&self) {
        // An exchange, not a store: no page may be examined before it.
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

    /// Whether watching a page is worthwhile now.
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

    /// Notes that the page in a slot is read-only for all processors that have taken part in flush `number`.
    /// `has_ended` tells whether all have.
    pub fn await_flush(&self, slot: usize, number: u64, has_ended: impl FnOnce(u64) -> bool) {
        self.awaited[slot].set(number);
        self.look_for_flush(slot, has_ended);
    }

    /// Checks whether all processors have taken part in the awaited flush. A merge after that stays valid until the
    /// page is struck out.
    pub fn look_for_flush(&self, slot: usize, has_ended: impl FnOnce(u64) -> bool) {
        if has_ended(self.awaited[slot].get()) {
            self.awaited[slot].set(0);
        } else {
            self.shared.changed.store(true, Ordering::SeqCst);
        }
    }

    /// Gives up watching the page in a slot.
    pub fn abandon(&self, slot: usize) {
        self.shared.pages[slot].store(NONE, Ordering::SeqCst);
        self.shared.changed.store(true, Ordering::SeqCst);
    }
}
