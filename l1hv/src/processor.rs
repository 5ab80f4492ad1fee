//! What a processor shows the others, and how it gets their attention.
//!
//! Everything else belongs to one processor alone ([`crate::hw::Vcpu`]), so that the way of a nested exit takes no
//! lock. What has to be told another processor is a bit among its requests, which it looks at before each VM entry. If
//! it may be running a guest, an INIT makes it exit: that is an exit in every guest, and waits while the host runs.
//!
//! DEVIATION: an INIT of the guest hypervisor's that arrives in the same instant as the host's own is taken for that
//! and lost. The host sends one only when it has just begun to watch a page ([`shadow::watch`]).

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

use bitflags::bitflags;
use spin::Once;

use crate::arch::apic::{self, Ipi};
use crate::arch::cpu;
use crate::stats::Stats;
use ept::Gpa;
use shadow::watch::{MergedAs, ProcessorWritten, WatchedPages};

bitflags! {
    /// What a processor is asked to do before its next VM entry.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Requests: u32 {
        /// An NMI arrived while the host ran: the guest gets it.
        const NMI = 1 << 0;
        /// EPT01 permits less than before: what is derived from it must go.
        const FLUSH = 1 << 1;
        /// The machine has stopped.
        const STOP = 1 << 2;
    }
}

/// One processor. The base of GS in the host is the address of its own.
#[derive(Debug)]
#[repr(C)]
pub struct Processor {
    /// [`Requests`]. VM entry looks at them, and so does the handler of NMIs: first, for the assembly.
    pub requests: AtomicU32,
    /// The address of this.
    this: AtomicPtr<Self>,
    apic_id: u32,
    /// An INIT of the host's is on its way, or has arrived and not been taken.
    is_kicked: AtomicBool,
    /// The guest has not started it, so that it runs nothing and INIT does nothing to it.
    waits_for_sipi: AtomicBool,
    /// The last flush of all processors that it has taken part in.
    flushed: AtomicU64,
    /// Pages that it has merged, by what they were merged as.
    pub watched: [WatchedPages; MergedAs::COUNT],
    /// Pages that it writes to without an EPT in the way.
    pub written: ProcessorWritten,
    /// Counters.
    pub stats: Stats,
}

/// All of them, the boot processor first.
static ALL: Once<&'static [Processor]> = Once::new();

/// The number of the last flush that was asked for.
static FLUSHES: AtomicU64 = AtomicU64::new(0);

/// All processors of the machine; none before [`publish`].
pub fn all() -> &'static [Processor] {
    ALL.get().copied().unwrap_or_default()
}

/// Makes the processors known. Called once.
pub fn publish(processors: &'static [Processor]) {
    ALL.call_once(|| processors);
}

impl Processor {
    /// A processor that waits to be started.
    pub const fn new(apic_id: u32) -> Self {
        Self {
            requests: AtomicU32::new(0),
            this: AtomicPtr::new(core::ptr::null_mut()),
            apic_id,
            is_kicked: AtomicBool::new(false),
            waits_for_sipi: AtomicBool::new(true),
            flushed: AtomicU64::new(0),
            watched: [const { WatchedPages::new() }; MergedAs::COUNT],
            written: ProcessorWritten::new(),
            stats: Stats::new(),
        }
    }

    /// Where its own address is in it.
    pub const THIS: usize = core::mem::offset_of!(Self, this);

    /// Its local APIC's id.
    pub const fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// The address for GS.
    pub fn address(&'static self) -> u64 {
        let address: *const Self = self;
        self.this.store(address.cast_mut(), Ordering::Relaxed);
        address.addr() as u64
    }

    /// Asks it for something that it cannot overlook: it does that before it enters a guest the next time.
    pub fn request(&self, what: Requests) {
        self.requests.fetch_or(what.bits(), Ordering::SeqCst);
    }

    /// What was asked for since the last time.
    pub fn take_requests(&self) -> Requests {
        Requests::from_bits_retain(self.requests.swap(0, Ordering::SeqCst))
    }

    /// Asks it for something, and makes it exit if it runs a guest.
    fn request_now(&self, what: Requests) {
        self.request(what);
        // One INIT at a time: a second one could arrive when the first has been taken, and be taken for the guest's.
        let is_first = || !self.is_kicked.swap(true, Ordering::SeqCst);
        if !self.waits_for_sipi.load(Ordering::SeqCst) && is_first() && !apic::send(self.apic_id, Ipi::Init) {
            // The guest has disabled this processor's APIC. The request is seen whenever the other one exits.
            self.is_kicked.store(false, Ordering::SeqCst);
        }
    }

    /// Whether an INIT that was an exit is the host's own; it has done its work then.
    pub fn take_kick(&self) -> bool {
        self.is_kicked.swap(false, Ordering::SeqCst)
    }

    /// The guest has put it into the wait-for-SIPI state, or ends that.
    pub fn set_waits_for_sipi(&self, waits: bool) {
        self.waits_for_sipi.store(waits, Ordering::SeqCst);
        // Requests that were made without an INIT are seen now.
        fence(Ordering::SeqCst);
    }

    /// Whether the guest has not started it.
    pub fn waits_for_sipi(&self) -> bool {
        self.waits_for_sipi.load(Ordering::Relaxed)
    }

    /// It has dropped everything derived from EPT01 after flush `number` was asked for.
    pub fn note_flush(&self, number: u64) {
        self.flushed.store(number, Ordering::SeqCst);
    }

    fn has_flushed(&self, number: u64) -> bool {
        self.flushed.load(Ordering::SeqCst) >= number || self.waits_for_sipi.load(Ordering::SeqCst)
    }

    /// Asks all others to drop what is derived from EPT01, and returns the number of that flush. Nobody waits:
    /// [`all_have_flushed`] tells.
    pub fn request_flush_of_others(&self) -> u64 {
        let number = FLUSHES.fetch_add(1, Ordering::SeqCst) + 1;
        self.others().for_each(|other| other.request_now(Requests::FLUSH));
        number
    }

    fn others(&self) -> impl Iterator<Item = &'static Self> {
        others_than(self.apic_id)
    }
}

fn others_than(apic_id: u32) -> impl Iterator<Item = &'static Processor> {
    all().iter().filter(move |processor| processor.apic_id != apic_id)
}

/// Stops all others than the one that this runs on.
pub fn stop_others() {
    others_than(cpu::apic_id()).for_each(|other| other.request_now(Requests::STOP));
}

/// The number of the last flush that was asked for.
pub fn last_flush() -> u64 {
    FLUSHES.load(Ordering::SeqCst)
}

/// Whether no processor uses anything older than flush `number`.
pub fn all_have_flushed(number: u64) -> bool {
    all().iter().all(|processor| processor.has_flushed(number))
}

/// Whether any processor watches a page.
pub fn is_watched(page: Gpa) -> bool {
    all().iter().flat_map(|processor| &processor.watched).any(|watched| watched.contains(page))
}

/// Whether vmcs02 of a processor gives it this page to write to.
pub fn is_written_by_one(page: Gpa) -> bool {
    all().iter().any(|processor| processor.written.contains(page))
}

/// Strikes a page out of the lists of all processors.
pub fn strike(page: Gpa) {
    all().iter().flat_map(|processor| &processor.watched).for_each(|watched| watched.strike(page));
}
