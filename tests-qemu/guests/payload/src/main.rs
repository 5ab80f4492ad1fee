//! A bare-metal nested guest: it executes each operation that exits [`REPEATS`] times, checks every answer and counts
//! TSC ticks by serialized readings of the TSC.
//!
//! The VMM enters `_start` in 64-bit mode with an identity map and a stack. There is no fault handler: a fault ends the
//! virtual machine, and the VMM reports it.

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the payload consists of privileged instructions")]

mod instructions;
mod sleep;

use core::panic::PanicInfo;

use guest_abi::mark;
use guest_abi::payload::{
    CHAIN, COUNT_MARK, COUNTED_FRESH_BASE, COUNTED_TOUCH_BASE, CPUID_LEAF, CPUID_SUBLEAVES, EVENT_PORT, EXIT_PORT,
    FRESH_BASE, MMIO_ANSWER, MMIO_STORE, NOTHING, OPERATIONS, PIO_PORT, Part, REPEATS, SAMPLES_PORT, Sample,
    TOUCH_BASE, TOUCH_STRIDE, WARM_UP, answer,
};
use instructions::{count, cpuid, halt, inl, load, multiply, outl, rdmsr, rdtsc, reload_cr3, store, vmcall, wrmsr};
use sleep::Idt;

/// IA32_MCG_STATUS: KVM intercepts it and keeps the written value.
const INTERCEPTED_MSR: u32 = 0x17a;

/// A hypercall that KVM does not know, and its reply: `-KVM_ENOSYS`.
const HYPERCALL: u64 = 0x4c31;
const HYPERCALL_REPLY: u64 = -1000_i64 as u64;

/// Entry point. A sleep takes `sleep_ticks` ticks of the TSC; `counted_rounds` further rounds are for an emulator that
/// counts.
#[unsafe(no_mangle)]
pub extern "C" fn _start(part: Part, sleep_ticks: u64, counted_rounds: u64) -> ! {
    const { assert!(OPERATIONS.len() == 14) };
    match part {
        Part::EXITS => exits(counted_rounds),
        Part::SLEEP => sleeps(sleep_ticks, counted_rounds),
        Part(_) => report(&[]),
    }
}

/// [`Part::EXITS`].
fn exits(counted_rounds: u64) -> ! {
    let samples = [
        sample(0, |n| timed(|| cpuid(CPUID_LEAF, n % CPUID_SUBLEAVES) == answer(n % CPUID_SUBLEAVES))),
        sample(1, |n| timed(|| vmcall(HYPERCALL, u64::from(n)) == HYPERCALL_REPLY)),
        sample(2, |n| {
            wrmsr(INTERCEPTED_MSR, u64::from(n));
            timed(|| rdmsr(INTERCEPTED_MSR) == u64::from(n))
        }),
        sample(3, |n| {
            let (ticks, _) = timed(|| wrmsr(INTERCEPTED_MSR, u64::from(n)));
            (ticks, rdmsr(INTERCEPTED_MSR) == u64::from(n))
        }),
        sample(4, |n| {
            let (ticks, _) = timed(|| outl(PIO_PORT, n));
            (ticks, inl(PIO_PORT) == answer(n))
        }),
        sample(5, |n| {
            outl(PIO_PORT, n);
            timed(|| inl(PIO_PORT) == answer(n))
        }),
        sample(6, |n| {
            let (ticks, _) = timed(|| store(MMIO_STORE, n));
            (ticks, load(MMIO_ANSWER) == answer(n))
        }),
        sample(7, |n| {
            store(MMIO_STORE, n);
            timed(|| load(MMIO_ANSWER) == answer(n))
        }),
        sample(8, |n| timed(|| load(TOUCH_BASE + u64::from(n) * TOUCH_STRIDE) == answer(n))),
        sample(9, |n| timed(|| load(FRESH_BASE + u64::from(n) * TOUCH_STRIDE) == 0)),
        sample(10, |n| (timed(|| outl(EVENT_PORT, n)).0, true)),
        sample(11, |_| (timed(reload_cr3).0, true)),
        sample(12, |n| timed(|| storm(n))),
        sample(NOTHING, |_| (timed(|| ()).0, true)),
        sample(CHAIN, |_| (timed(multiply).0, true)),
    ];
    for _ in 0..counted_rounds {
        counted(0, |n| _ = cpuid(CPUID_LEAF, n % CPUID_SUBLEAVES));
        counted(1, |n| _ = vmcall(HYPERCALL, u64::from(n)));
        counted(2, |_| _ = rdmsr(INTERCEPTED_MSR));
        counted(3, |n| wrmsr(INTERCEPTED_MSR, u64::from(n)));
        counted(4, |n| outl(PIO_PORT, n));
        counted(5, |_| _ = inl(PIO_PORT));
        counted(6, |n| store(MMIO_STORE, n));
        counted(7, |_| _ = load(MMIO_ANSWER));
        counted(8, |n| _ = load(COUNTED_TOUCH_BASE + u64::from(n) * TOUCH_STRIDE));
        counted(9, |n| _ = load(COUNTED_FRESH_BASE + u64::from(n) * TOUCH_STRIDE));
        counted(10, |n| outl(EVENT_PORT, n));
        counted(11, |_| reload_cr3());
        counted(12, |n| _ = storm(n));
    }
    report(&samples)
}

/// [`Part::SLEEP`].
fn sleeps(sleep_ticks: u64, counted_rounds: u64) -> ! {
    let idt = Idt::new();
    sleep::prepare(&idt);
    let samples = [sample(13, |n| {
        let (ticks, ()) = timed(sleep::sleep);
        (ticks.saturating_sub(sleep_ticks), sleep::interrupts_taken() == n + 1)
    })];
    for _ in 0..counted_rounds {
        counted(13, |_| sleep::sleep());
    }
    report(&samples)
}

fn report(samples: &[Sample]) -> ! {
    outl(SAMPLES_PORT, samples.as_ptr().addr() as u32);
    outl(EXIT_PORT, samples.len() as u32);
    halt()
}

/// Exits of five kinds, one after the other.
fn storm(n: u32) -> bool {
    let mut right = cpuid(CPUID_LEAF, n % CPUID_SUBLEAVES) == answer(n % CPUID_SUBLEAVES);
    right &= vmcall(HYPERCALL, u64::from(n)) == HYPERCALL_REPLY;
    wrmsr(INTERCEPTED_MSR, u64::from(n));
    right &= rdmsr(INTERCEPTED_MSR) == u64::from(n);
    outl(EVENT_PORT, n);
    right
}

/// Ticks that `operation` takes, and its result.
#[inline(always)]
fn timed<T>(operation: impl FnOnce() -> T) -> (u64, T) {
    let before = rdtsc();
    let result = operation();
    (rdtsc() - before, result)
}

/// Repeats `once`, which gets its number and returns its ticks and whether its answer was right. The first repetitions
/// only warm up.
fn sample(operation: u32, once: impl Fn(u32) -> (u64, bool)) -> Sample {
    let mut ticks = [0; REPEATS];
    let mut right = 0;
    for n in 0..WARM_UP as u32 {
        once(n);
    }
    for (n, slot) in (WARM_UP as u32..).zip(&mut ticks) {
        let (elapsed, is_right) = once(n);
        *slot = elapsed;
        right += u32::from(is_right);
    }
    ticks.sort_unstable();
    let percentile = |percent| ticks[REPEATS * percent / 100];
    Sample {
        operation,
        right,
        minimum: ticks[0],
        percentile_1: percentile(1),
        median: percentile(50),
        percentile_99: percentile(99),
    }
}

/// Repeats `once` without other work, with a mark before each time and after the last: the emulator's counts between
/// two marks are those of one operation.
fn counted(operation: u8, once: impl Fn(u32)) {
    let mut name = *COUNT_MARK;
    name[COUNT_MARK.len() - 1] += operation;
    let name = mark::words(&name);
    for n in 0..REPEATS as u32 {
        count(name);
        once(n);
    }
    count(name);
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    outl(EXIT_PORT, 0);
    halt()
}
