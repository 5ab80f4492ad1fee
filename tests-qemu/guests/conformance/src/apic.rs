//! The local APIC, for interrupts of our own, and the 8259s, which are masked.

use crate::cpu::rdmsr;
use crate::port::outb;

const IA32_APIC_BASE: u32 = 0x1b;
const APIC: u64 = 0xfee0_0000;
const EOI: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

fn write(register: u64, value: u32) {
    let address = core::ptr::with_exposed_provenance_mut::<u32>((APIC + register) as usize);
    // SAFETY: the registers are mapped, and used for interrupts of our own only.
    unsafe { address.write_volatile(value) };
}

/// Masks every interrupt of the machine, enables the local APIC.
pub fn init() {
    const SOFTWARE_ENABLE_VECTOR_255: u32 = 0x1ff;
    for port in [0x21, 0xa1] {
        outb(port, 0xff);
    }
    let base = rdmsr(IA32_APIC_BASE).unwrap_or(0) & !0xfff;
    assert!(base == APIC, "the local APIC is elsewhere");
    write(SPURIOUS, SOFTWARE_ENABLE_VECTOR_255);
}

/// Sends an interrupt to this processor.
pub fn interrupt_self(vector: u8) {
    const SELF: u32 = 1 << 18;
    const ASSERT: u32 = 1 << 14;
    write(ICR, SELF | ASSERT | u32::from(vector));
}

/// Sends an INIT to this processor.
pub fn init_self() {
    const INIT: u32 = 5 << 8;
    const ASSERT: u32 = 1 << 14;
    write(ICR_HIGH, 0);
    write(ICR, INIT | ASSERT);
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    write(EOI, 0);
}
