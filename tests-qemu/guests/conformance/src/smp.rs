//! The machine's other processors: started once, then each waits for work, halted.
//!
//! ```text
//!   processor 0                                 processor n
//!   start: INIT, SIPI  ───────────────────────> trampoline.S, processor_main
//!   begin(n, work, argument)  ── interrupt ──>  work(argument)
//!   finish(n)  <───────────────────── result ─  halted again
//! ```
//!
//! Work is a function of a group, not a closure: each processor has its own statics and its own stack (see [`local`]).
//! Data that several processors use is in section `.shared`, or is accessed by its physical address.

pub mod local;
mod meeting;
mod start;
mod taken;

use core::arch::{asm, global_asm};
use core::hint::spin_loop;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize};

use crate::apic::{self, Message};
use crate::memory;
use crate::minimal::enter_vmx_operation;

pub use meeting::Meeting;
pub use start::faults;
pub use taken::{Counters, TAKEN, number};

global_asm!(include_str!("smp/trampoline.S"), options(att_syntax));

/// Processors that there is room for.
pub const MAX: usize = 8;

/// The interrupt that brings work, and has no other use.
const WAKE: u8 = 0xf8;

/// Polls of a waiting processor before it reports that it waits in vain.
const PATIENCE: u64 = 200_000_000;

/// Rounds of a loop that take longer than any processor needs to notice a message.
const SETTLING: u32 = 10_000;

/// Work for a processor: a function from an argument to a result.
pub type Work = fn(u64) -> u64;

/// A processor's state, and its work.
struct Slot {
    state: AtomicU32,
    starts: AtomicU32,
    work: AtomicPtr<()>,
    argument: AtomicU64,
    result: AtomicU64,
}

/// Not started.
const DOWN: u32 = 0;
/// Halted, the last result is valid.
const IDLE: u32 = 1;
/// Working, or about to.
const AT_WORK: u32 = 2;

#[unsafe(link_section = ".shared")]
static SLOTS: [Slot; MAX] = [const {
    Slot {
        state: AtomicU32::new(DOWN),
        starts: AtomicU32::new(0),
        work: AtomicPtr::new(core::ptr::null_mut()),
        argument: AtomicU64::new(0),
        result: AtomicU64::new(0),
    }
}; MAX];

#[unsafe(link_section = ".shared")]
static COUNT: AtomicUsize = AtomicUsize::new(1);

/// The number of processors.
pub fn count() -> usize {
    COUNT.load(Relaxed)
}

/// All processors. The first one, which runs the groups, is number 0; a processor's number is its APIC ID.
pub struct Processors {
    count: usize,
}

impl Processors {
    /// Starts the processors that firmware knows of.
    pub fn start() -> Self {
        let count = start::count();
        assert!(count <= MAX, "more processors than there is room for");
        COUNT.store(count, Relaxed);
        let processors = Self { count };
        for number in processors.others() {
            start::give_memory(number);
            processors.restart(number);
        }
        processors
    }

    /// The number of processors.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The numbers of all but the first.
    pub fn others(&self) -> core::ops::Range<usize> {
        1..self.count
    }

    /// Gives work to processor `number`, and returns at once.
    pub fn begin(&self, number: usize, work: Work, argument: u64) {
        let slot = &SLOTS[number];
        assert!(slot.state.load(Acquire) == IDLE, "processor {number} has no time");
        slot.work.store(work as *mut (), Relaxed);
        slot.argument.store(argument, Relaxed);
        slot.state.store(AT_WORK, Release);
        apic::send(number, Message::Interrupt(WAKE));
    }

    /// Waits for the result of the work.
    pub fn finish(&self, number: usize) -> u64 {
        let slot = &SLOTS[number];
        assert!(wait_until(|| slot.state.load(Acquire) == IDLE), "processor {number} does not come to an end");
        slot.result.load(Relaxed)
    }

    /// Gives work to a processor, and waits for the result.
    pub fn run_on(&self, number: usize, work: Work, argument: u64) -> u64 {
        self.begin(number, work, argument);
        self.finish(number)
    }

    /// Gives the same work to every processor at the same time, this one included.
    pub fn run_on_all(&self, work: Work, argument: u64) -> [u64; MAX] {
        for number in self.others() {
            self.begin(number, work, argument);
        }
        let mut results = [0; MAX];
        results[0] = work(argument);
        for number in self.others() {
            results[number] = self.finish(number);
        }
        results
    }

    /// Sends INIT and SIPI to a processor outside VMX operation, and waits until it is ready for work.
    pub fn restart(&self, number: usize) {
        apic::send(number, Message::Init);
        settle();
        self.start_stopped(number);
    }

    /// Sends SIPI to a processor in the wait-for-SIPI state, and waits until it is ready for work.
    pub fn start_stopped(&self, number: usize) {
        start::aim_at(number);
        SLOTS[number].state.store(DOWN, Release);
        self.send_start_up(number);
        let _ = self.finish(number);
    }

    /// Sends a SIPI that names the trampoline.
    pub fn send_start_up(&self, number: usize) {
        apic::send(number, Message::StartUp(start::PAGE));
    }

    /// How often a processor has started by the trampoline.
    pub fn starts(&self, number: usize) -> u32 {
        SLOTS[number].starts.load(Acquire)
    }
}

/// Waits for an action of other processors. Returns false if it does not happen in time.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    for _ in 0..PATIENCE {
        if condition() {
            return true;
        }
        spin_loop();
    }
    false
}

/// Gives another processor time to notice a message.
pub fn settle() {
    for _ in 0..SETTLING {
        spin_loop();
    }
}

/// Halts this processor for ever.
pub fn halt() -> ! {
    loop {
        // SAFETY: no event wakes the processor that it would have to handle.
        unsafe { asm!("cli", "hlt") };
    }
}

/// The trampoline brings other processors here, on their own stacks and page tables.
#[unsafe(no_mangle)]
extern "C" fn processor_main() -> ! {
    memory::init();
    apic::init();
    let number = taken::init();
    let slot = &SLOTS[number];
    slot.starts.fetch_add(1, Release);
    loop {
        let wakes = TAKEN.by(number, WAKE);
        slot.state.store(IDLE, Release);
        while TAKEN.by(number, WAKE) == wakes {
            // SAFETY: interrupts are only counted; one that comes before HLT ends it.
            unsafe { asm!("sti", "hlt", "cli") };
        }
        // SAFETY: `begin` stored a `Work`.
        let work: Work = unsafe { core::mem::transmute(slot.work.load(Acquire)) };
        slot.result.store(work(slot.argument.load(Relaxed)), Relaxed);
    }
}

/// Work: VMXOFF.
pub fn leave_vmx(_: u64) -> u64 {
    u64::from(crate::cpu::vmxoff() == crate::fault::Outcome::Success)
}

/// Work: VMXON.
pub fn enter_vmx(_: u64) -> u64 {
    u64::from(enter_vmx_operation() == crate::fault::Outcome::Success)
}
