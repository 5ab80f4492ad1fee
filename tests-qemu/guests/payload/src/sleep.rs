//! HLT until the local APIC's timer interrupts.

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU32, Ordering};

use guest_abi::payload::SLEEP_TICKS;

use crate::instructions::{rdmsr, wrmsr};

const VECTOR: u8 = 0x20;

const IA32_APIC_BASE: u32 = 0x1b;
const X2APIC_MODE: u64 = 1 << 10;

/// Registers of the local APIC in x2APIC mode (SDM volume 3, 11.12.1.2 "x2APIC Register Address Space").
const EOI: u32 = 0x80b;
const SPURIOUS_INTERRUPT: u32 = 0x80f;
const LVT_TIMER: u32 = 0x832;
const INITIAL_COUNT: u32 = 0x838;
const DIVIDE_CONFIGURATION: u32 = 0x83e;

const ENABLED_VECTOR_255: u64 = 0x1ff;
const DIVIDE_BY_1: u64 = 0b1011;

/// Gates up to the one of [`VECTOR`], 16 bytes each (SDM volume 3, 6.14.1 "64-Bit Mode IDT").
#[repr(C, align(16))]
pub struct Idt([[u64; 2]; VECTOR as usize + 1]);

impl Idt {
    /// An IDT with one interrupt gate. Faults have no gate and end the virtual machine.
    pub fn new() -> Self {
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
        let selector: u16;
        // SAFETY: the instruction only reads a selector.
        unsafe { asm!("mov {:x}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) };
        let handler = handler as *const () as u64;
        let low =
            handler & 0xffff | u64::from(selector) << 16 | PRESENT_INTERRUPT_GATE | (handler >> 16 & 0xffff) << 48;
        let mut gates = [[0; 2]; VECTOR as usize + 1];
        gates[usize::from(VECTOR)] = [low, handler >> 32];
        Self(gates)
    }
}

/// Prepares interrupts of the timer. `idt` must outlive them.
pub fn prepare(idt: &Idt) {
    let limit = (size_of::<Idt>() - 1) as u64;
    let pseudo_descriptor = [limit << 48, (&raw const *idt).addr() as u64];
    // SAFETY: the ten bytes from the limit on are limit and base of a table whose only gate leads to `handler`.
    unsafe { asm!("lidt [{} + 6]", in(reg) &pseudo_descriptor, options(nostack, preserves_flags)) };
    wrmsr(IA32_APIC_BASE, rdmsr(IA32_APIC_BASE) | X2APIC_MODE);
    wrmsr(SPURIOUS_INTERRUPT, ENABLED_VECTOR_255);
    wrmsr(DIVIDE_CONFIGURATION, DIVIDE_BY_1);
    wrmsr(LVT_TIMER, VECTOR.into());
}

/// Interrupts taken.
static TAKEN: AtomicU32 = AtomicU32::new(0);

/// Counts and ends the interrupt.
#[unsafe(naked)]
extern "C" fn handler() {
    naked_asm!(
        "push rax; push rcx; push rdx",
        "inc dword ptr [rip + {taken}]",
        "mov ecx, {eoi}",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "pop rdx; pop rcx; pop rax",
        "iretq",
        taken = sym TAKEN,
        eoi = const EOI,
    )
}

/// Interrupts taken since the beginning.
pub fn interrupts_taken() -> u32 {
    TAKEN.load(Ordering::Relaxed)
}

/// Sleeps until the timer interrupts, which it does once.
#[inline(always)]
pub fn sleep() {
    wrmsr(INITIAL_COUNT, SLEEP_TICKS.into());
    // SAFETY: the handler changes only `TAKEN`, on a stack without a red zone.
    unsafe { asm!("sti", "hlt", "cli") };
}
