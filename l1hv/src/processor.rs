//! The part of a processor that the others see, and the requests that processors send each other.
//!
//! All other state belongs to one processor alone ([`crate::hw::Vcpu`]), so that a nested exit takes no lock. A request
//! to another processor is a bit that this processor tests before each VM entry. If the processor may be running a
//! guest, an INIT makes it exit: an INIT causes an exit of every guest, and waits while the host runs.
//!
//! DEVIATION: an INIT of the guest hypervisor that arrives at the same time as the host's own is mistaken for it and
//! lost. The host sends an INIT only when it has just begun to watch a page ([`shadow::watch`]), or to stop the
//! machine.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

use bitflags::bitflags;
use spin::Once;

use crate::arch::apic::{self, Ipi};
use crate::arch::cpu;
use crate::stats::Stats;
use ept::Gpa;
use shadow::watch::{MergedAs, ProcessorWritten, WatchedPages};

bitflags! {
    /// What a processor must do before its next VM entry.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Requests: u32 {
        /// An NMI arrived while the host ran: the guest gets it.
        const NMI = 1 << 0;
        /// EPT01 permits less than before: translations derived from it must be dropped.
        const FLUSH = 1 << 1;
        /// The machine has stopped.
        const STOP = 1 << 2;
    }
}

/// One processor. In the host, the base of GS is the address of the current processor's `Processor`.
#[derive(Debug)]
#[repr(C)]
pub struct Processor {
    /// [`Requests`]. VM entry tests them, and the handler of NMIs sets one. The field comes first, because assembly
    /// accesses it.
    pub requests: AtomicU32,
    /// The address of this `Processor`.
    this: AtomicPtr<Self>,
    apic_id: u32,
    /// The host has sent an INIT that is not handled yet.
    is_kicked: AtomicBool,
    /// The guest has not started this processor, so it runs no guest code and INIT has no effect on it.
    waits_for_sipi: AtomicBool,
    /// The last flush of all processors in which this one has taken part.
    flushed: AtomicU64,
    /// Pages that this processor has merged, by [`MergedAs`].
    pub watched: [WatchedPages; MergedAs::COUNT],
    /// Pages that it writes to without an EPT in the way.
    pub written: ProcessorWritten,
    /// Counters.
    pub stats: Stats,
}

/// All processors, the boot processor first.
static ALL: Once<&'static [Processor]> = Once::new();

/// The number of the last requested flush.
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

    /// The offset of the field that holds its own address.
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

    /// Makes a request, which the processor carries out before it enters a guest the next time.
    pub fn request(&self, what: Requests) {
        self.requests.fetch_or(what.bits(), Ordering::SeqCst);
    }

    /// The requests since the last call.
    pub fn take_requests(&self) -> Requests {
        Requests::from_bits_retain(self.requests.swap(0, Ordering::SeqCst))
    }

    /// Makes a request, and makes the processor exit if it runs a guest.
    fn request_now(&self, what: Requests) {
        self.request(what);
        // One INIT at a time: a second one could arrive after the first was handled, and be mistaken for the guest's.
        let is_first = || !self.is_kicked.swap(true, Ordering::SeqCst);
        if !self.waits_for_sipi.load(Ordering::SeqCst) && is_first() && !apic::send(self.apic_id, Ipi::Init) {
            // The guest has disabled this processor's APIC. The other processor sees the request at its next exit.
            self.is_kicked.store(false, Ordering::SeqCst);
        }
    }

    /// Whether the INIT that caused an exit is the host's own; such an INIT needs no further handling.
    pub fn take_kick(&self) -> bool {
        self.is_kicked.swap(false, Ordering::SeqCst)
    }

    /// Notes that the guest has put the processor into the wait-for-SIPI state, or has started it.
    pub fn set_waits_for_sipi(&self, waits: bool) {
        self.waits_for_sipi.store(waits, Ordering::SeqCst);
        // From here on the processor sees requests that were made without an INIT.
        fence(Ordering::SeqCst);
    }

    /// Whether the guest has not started this processor.
    pub fn waits_for_sipi(&self) -> bool {
        self.waits_for_sipi.load(Ordering::Relaxed)
    }

    /// Notes that this processor has dropped all translations derived from EPT01 since flush `number` was requested.
    pub fn note_flush(&self, number: u64) {
        self.flushed.store(number, Ordering::SeqCst);
    }

    fn has_flushed(&self, number: u64) -> bool {
        self.flushed.load(Ordering::SeqCst) >= number || self.waits_for_sipi.load(Ordering::SeqCst)
    }

    /// Requests that all other processors drop translations derived from EPT01. Returns the number of this flush,
    /// without waiting for it: [`all_have_flushed`] tells when it is complete.
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

/// Stops all processors but the one that executes this.
pub fn stop_others() {
    others_than(cpu::apic_id()).for_each(|other| other.request_now(Requests::STOP));
}

/// The number of the last requested flush.
pub fn last_flush() -> u64 {
    FLUSHES.load(Ordering::SeqCst)
}

/// Whether no processor uses a translation from before flush `number`.
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
