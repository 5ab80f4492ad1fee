//! The protocol between the payload and its VMM.
//!
//! The VMM answers each input with [`answer`] of it; the payload checks each answer. Results are an array
//! of [`Sample`] in the payload's memory.

/// Times that each operation is done and measured.
pub const REPEATS: usize = 1000;

/// Times that each operation is done before that, without a measurement.
pub const WARM_UP: usize = 24;

/// `OUT` stores a dword, `IN` returns [`answer`] of the last one stored.
pub const PIO_PORT: u16 = 0x510;

/// `OUT` wakes an eventfd: KVM serves it without the VMM.
pub const EVENT_PORT: u16 = 0x514;

/// `OUT` of the address of the samples.
pub const SAMPLES_PORT: u16 = 0x518;

/// `OUT` of the number of samples ends the run.
pub const EXIT_PORT: u16 = 0x51c;

/// A page that no memory backs: the dword written here is stored.
pub const MMIO_STORE: u64 = 0xd000_0000;

/// In the same page: reads as [`answer`] of the last dword stored.
pub const MMIO_ANSWER: u64 = MMIO_STORE + 8;

/// Leaf with [`CPUID_SUBLEAVES`] subleaves; `EAX` is [`answer`] of the subleaf.
pub const CPUID_LEAF: u32 = 0x4000_0010;

/// See [`CPUID_LEAF`].
pub const CPUID_SUBLEAVES: u32 = 2;

/// First of the pages that hold their own [`answer`] and that the guest has not touched.
pub const TOUCH_BASE: u64 = 0x0400_0000;

/// Distance of these pages: KVM maps up to eight neighbours of a faulting page.
pub const TOUCH_STRIDE: u64 = 0x8000;

/// Pages for the second first-touch measure, likewise.
pub const COUNTED_TOUCH_BASE: u64 = 0x0600_0000;

/// First of the pages that no program has written: KVM allocates their memory when they are touched.
pub const FRESH_BASE: u64 = 0x0800_0000;

/// Pages for the second measure of these, likewise.
pub const COUNTED_FRESH_BASE: u64 = 0x0a00_0000;

/// Pages of one measure of first touches.
pub const TOUCHED_PAGES: usize = WARM_UP + REPEATS;

const _: () = assert!(TOUCH_BASE + TOUCHED_PAGES as u64 * TOUCH_STRIDE <= COUNTED_TOUCH_BASE);
const _: () = assert!(FRESH_BASE + TOUCHED_PAGES as u64 * TOUCH_STRIDE <= COUNTED_FRESH_BASE);

/// How long the payload sleeps, in ticks of the APIC timer: longer than KVM polls for a wake-up (`halt_poll_ns`), so
/// that it sleeps too.
pub const SLEEP_TICKS: u32 = 1_000_000;

/// A part of the payload's work. At the entry point RDI holds its number, RSI the ticks of the TSC that a sleep takes,
/// and RDX the number of further rounds that an emulator counts: none or one.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part(pub u64);

impl Part {
    /// All operations but the last, on a machine without interrupt hardware.
    pub const EXITS: Self = Self(0);
    /// The last operation, on a machine with a local APIC.
    pub const SLEEP: Self = Self(1);
}

/// Name of the emulator's marks around operation 0; the last character counts up.
pub const COUNT_MARK: &[u8; 11] = b"payload-opA";

/// The VMM's answer to `input`.
pub const fn answer(input: u32) -> u32 {
    input.wrapping_mul(0x9e37_79b1) ^ 0x5bd1_e995
}

/// The results of one operation. Ticks are those of the TSC between two readings, without the time that the payload
/// meant to sleep.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Index into [`OPERATIONS`], [`NOTHING`] or [`CHAIN`].
    pub operation: u32,
    /// Answers that were right, of [`REPEATS`].
    pub right: u32,
    /// Ticks of the quickest one.
    pub minimum: u64,
    /// The 1st percentile of the ticks.
    pub percentile_1: u64,
    /// The median of the ticks.
    pub median: u64,
    /// The 99th percentile of the ticks.
    pub percentile_99: u64,
}

/// In place of an operation: no instructions. The ticks are those of reading the TSC.
pub const NOTHING: u32 = OPERATIONS.len() as u32;

/// In place of an operation: [`CHAIN_LENGTH`] multiplications, each of the result of the one before. Each takes three
/// cycles on silicon, and one tick of a TSC that counts instructions.
pub const CHAIN: u32 = NOTHING + 1;

/// See [`CHAIN`].
pub const CHAIN_LENGTH: u64 = 1000;

/// Names of the operations, in the order in which the payload does them.
///
/// The last one belongs to [`Part::SLEEP`]: the payload arms the one-shot timer of its local APIC, enables interrupts
/// and halts; the VMM's thread sleeps in KVM until the timer wakes it; the payload's handler ends the interrupt and
/// returns.
pub const OPERATIONS: [&str; 14] = [
    "CPUID",
    "VMCALL",
    "RDMSR",
    "WRMSR",
    "OUT to the VMM process",
    "IN from the VMM process",
    "MMIO write to the VMM process",
    "MMIO read from the VMM process",
    "first touch of a page, backed",
    "first touch of a page, fresh",
    "OUT to an eventfd in the kernel",
    "MOV to CR3",
    "storm: CPUID, VMCALL, RDMSR, WRMSR, OUT",
    "HLT and wake by interrupt",
];
