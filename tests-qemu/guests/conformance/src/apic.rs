//! The local APIC, for interrupts from this and from other processors, and the 8259s, which are masked. The word
//! `x2apic` in the command line selects x2APIC mode.

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use guest_abi::port::outb;

use crate::arguments;
use crate::cpu::{rdmsr, wrmsr};
use crate::fault::Outcome;

const IA32_APIC_BASE: u32 = 0x1b;
const ENABLE: u64 = 1 << 11;
const X2APIC_MODE: u64 = 1 << 10;
/// The register that holds this processor's ID in its last byte.
const ID: u64 = 0x20;
const APIC: u64 = 0xfee0_0000;
const EOI: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
const LVT_TIMER: u64 = 0x320;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

/// Whether this processor's local APIC is in x2APIC mode.
static IS_X2: AtomicBool = AtomicBool::new(false);

/// The MSR of a register in x2APIC mode.
fn msr(register: u64) -> u32 {
    0x800 + register as u32 / 16
}

fn write(register: u64, value: u32) {
    if IS_X2.load(Relaxed) {
        return assert!(
            matches!(wrmsr(msr(register), value.into()), Outcome::Success),
            "no x2APIC register {register:#x}"
        );
    }
    let address = core::ptr::with_exposed_provenance_mut::<u32>((APIC + register) as usize);
    // SAFETY: the registers are mapped, and used for interrupts of our own only.
    unsafe { address.write_volatile(value) };
}

/// Masks every interrupt of the machine, and enables the local APIC.
pub fn init() {
    const SOFTWARE_ENABLE_VECTOR_255: u32 = 0x1ff;
    for port in [0x21, 0xa1] {
        outb(port, 0xff);
    }
    assert!(base() & !0xfff == APIC, "the local APIC is elsewhere");
    if arguments::words().any(|word| word == "x2apic") {
        set_base(base() | X2APIC_MODE);
    }
    // INIT leaves the mode as it was.
    IS_X2.store(base() & X2APIC_MODE != 0, Relaxed);
    write(SPURIOUS, SOFTWARE_ENABLE_VECTOR_255);
}

fn base() -> u64 {
    rdmsr(IA32_APIC_BASE).unwrap_or(0)
}

fn set_base(base: u64) {
    assert!(wrmsr(IA32_APIC_BASE, base) == Outcome::Success, "the local APIC does not become {base:#x}");
}

/// Work: enters x2APIC mode. Returns the new IA32_APIC_BASE.
pub fn enter_x2apic_mode(_: u64) -> u64 {
    set_base(base() | X2APIC_MODE);
    init();
    base()
}

/// Work: returns to xAPIC mode in the only possible way, by disabling the APIC first (SDM 12.12.5 "x2APIC State
/// Transitions").
pub fn leave_x2apic_mode(_: u64) -> u64 {
    set_base(base() & !(ENABLE | X2APIC_MODE));
    set_base(base() | ENABLE);
    init();
    base()
}

fn read(register: u64) -> u32 {
    if IS_X2.load(Relaxed) {
        return rdmsr(msr(register)).unwrap_or(0) as u32;
    }
    // SAFETY: as for `write`.
    unsafe { core::ptr::with_exposed_provenance::<u32>((APIC + register) as usize).read_volatile() }
}

/// This processor's APIC ID.
pub fn id() -> usize {
    let id = read(ID);
    if IS_X2.load(Relaxed) { id as usize } else { (id >> 24) as usize }
}

/// The high half of ICR for a message to this processor.
pub fn own_destination() -> u64 {
    (id() as u64) << 24
}

/// A message to a processor (SDM 12.6.1 "Interrupt Command Register (ICR)").
#[derive(Clone, Copy)]
pub enum Message {
    /// An interrupt with this vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An INIT.
    Init,
    /// A start-up message: where to start, as the number of a page.
    StartUp(u8),
}

/// Sends a message to the processor with this APIC ID.
pub fn send(id: usize, message: Message) {
    const ASSERT: u32 = 1 << 14;
    let command = match message {
        Message::Interrupt(vector) => u32::from(vector),
        Message::Nmi => 4 << 8,
        Message::Init => 5 << 8,
        Message::StartUp(page) => 6 << 8 | u32::from(page),
    };
    if IS_X2.load(Relaxed) {
        let message = (id as u64) << 32 | u64::from(ASSERT | command);
        return assert!(matches!(wrmsr(msr(ICR), message), Outcome::Success), "the x2APIC sends nothing");
    }
    write(ICR_HIGH, (id as u32) << 24);
    write(ICR, ASSERT | command);
}

/// Sends an interrupt to this processor.
pub fn interrupt_self(vector: u8) {
    const SELF: u32 = 1 << 18;
    const ASSERT: u32 = 1 << 14;
    write(ICR, SELF | ASSERT | u32::from(vector));
}

/// Sends an INIT to this processor.
pub fn init_self() {
    send(id(), Message::Init);
}

/// Lets IA32_TSC_DEADLINE arm the timer, which sends this vector.
pub fn enable_deadline_timer(vector: u8) {
    const TSC_DEADLINE: u32 = 2 << 17;
    write(LVT_TIMER, TSC_DEADLINE | u32::from(vector));
}

/// Masks the timer, which disarms it.
pub fn disable_timer() {
    const MASKED: u32 = 1 << 16;
    write(LVT_TIMER, MASKED);
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    write(EOI, 0);
}
