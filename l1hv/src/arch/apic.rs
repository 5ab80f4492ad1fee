//! The local APIC. It belongs to the guest. The host sends an IPI now and then, and resets the APIC as an INIT would.
//!
//! DEVIATION: afterwards the guest reads the host's command from the interrupt command register, except for the high
//! half in xAPIC mode.

use ept::Hpa;
use shadow::msr::IA32_APIC_BASE;

use super::msr;
use super::phys;

const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Offsets of registers of the xAPIC (SDM Volume 3A, Table 12-1 "Local APIC Register Address Map"). In an x2APIC they
/// are MSRs, one for each 16 bytes, from 800H on.
const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const EOI: u32 = 0xb0;
const LOGICAL_DESTINATION: u32 = 0xd0;
const DESTINATION_FORMAT: u32 = 0xe0;
const SPURIOUS_VECTOR: u32 = 0xf0;
const IN_SERVICE: u32 = 0x100;
const ICR_LOW: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
/// Timer, thermal, performance counters, LINT0, LINT1, error.
const LVT: [u32; 6] = [0x320, 0x330, 0x340, 0x350, 0x360, 0x370];
const INITIAL_COUNT: u32 = 0x380;
const DIVIDE: u32 = 0x3e0;

const MASKED: u32 = 1 << 16;
const DELIVERY_PENDING: u32 = 1 << 12;

/// An IPI to one processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ipi {
    /// INIT. In VMX root operation it waits for the next VM entry; in non-root operation it causes a VM exit.
    Init,
    /// SIPI: start at the page of this number.
    Startup(u8),
}

impl Ipi {
    /// The low half of the ICR: level assert, physical destination.
    const fn command(self) -> u32 {
        match self {
            Self::Init => 0x4500,
            Self::Startup(page) => 0x4600 | page as u32,
        }
    }
}

/// The APIC in the mode that the guest has chosen.
#[derive(Clone, Copy)]
enum Apic {
    X2,
    /// The address of its registers.
    X1(Hpa),
}

impl Apic {
    /// This processor's APIC. `None` if it is disabled, or at an address that the host cannot reach.
    fn current() -> Option<Self> {
        const ENABLE: u64 = 1 << 11;
        const X2APIC: u64 = 1 << 10;
        const BASE: u64 = 0x000f_ffff_ffff_f000;
        let apic_base = msr::try_read(IA32_APIC_BASE)?;
        let base = Hpa(apic_base & BASE);
        match (apic_base & ENABLE != 0, apic_base & X2APIC != 0) {
            (true, true) => Some(Self::X2),
            (true, false) if phys::is_mapped(base, 0x1000) => Some(Self::X1(base)),
            _ => None,
        }
    }

    fn read(self, register: u32) -> u32 {
        match self {
            Self::X2 => msr::try_read(Self::msr(register)).unwrap_or(0) as u32,
            // SAFETY: the page is that of the APIC, whose registers are dwords.
            Self::X1(base) => unsafe { Self::at(base, register).read_volatile() },
        }
    }

    /// Writes a register other than the ICR: its value has no effect on memory.
    fn write(self, register: u32, value: u32) {
        match self {
            // An x2APIC lacks some registers; then there is nothing to write. SAFETY: the host does not rely on the
            // APIC's registers.
            Self::X2 => _ = unsafe { msr::try_write(Self::msr(register), value.into()) },
            // SAFETY: as for `read`.
            Self::X1(base) => unsafe { Self::at(base, register).write_volatile(value) },
        }
    }

    const fn msr(register: u32) -> u32 {
        0x800 + register / 16
    }

    fn at(base: Hpa, register: u32) -> *mut u32 {
        phys::phys_to_virt(base + u64::from(register)).cast()
    }
}

/// Sends an IPI to the processor with an APIC id. Returns whether this processor's APIC can do that.
pub fn send(destination: u32, ipi: Ipi) -> bool {
    let Some(apic) = Apic::current() else { return false };
    match apic {
        Apic::X2 => {
            let command = u64::from(destination) << 32 | u64::from(ipi.command());
            // SAFETY: a processor in VMX operation exits for an INIT, without another effect. Outside VMX operation,
            // only processors that the host starts get IPIs.
            unsafe { msr::try_write(Apic::msr(ICR_LOW), command) }.is_ok()
        }
        Apic::X1(_) => {
            let Ok(id) = u8::try_from(destination) else { return false };
            await_delivery(apic);
            let high = apic.read(ICR_HIGH);
            apic.write(ICR_HIGH, u32::from(id) << 24);
            apic.write(ICR_LOW, ipi.command());
            await_delivery(apic);
            // The guest may have been about to send an IPI with its value of the high half.
            apic.write(ICR_HIGH, high);
            true
        }
    }
}

/// Sends an IPI to all other processors, whoever they are. Returns whether this processor's APIC can do that. Only for
/// before the other processors are in VMX operation.
pub fn send_to_all_others(ipi: Ipi) -> bool {
    const ALL_EXCLUDING_SELF: u32 = 3 << 18;
    let command = ipi.command() | ALL_EXCLUDING_SELF;
    match Apic::current() {
        None => false,
        // SAFETY: the other processors run nothing that the host relies on.
        Some(Apic::X2) => unsafe { msr::try_write(Apic::msr(ICR_LOW), command.into()) }.is_ok(),
        Some(apic) => {
            await_delivery(apic);
            apic.write(ICR_LOW, command);
            await_delivery(apic);
            true
        }
    }
}

/// Waits until the last IPI is on its way: at once on every processor with VMX, but nothing here waits for ever.
fn await_delivery(apic: Apic) {
    const POLLS: u32 = 10_000;
    _ = (0..POLLS).find(|_| apic.read(ICR_LOW) & DELIVERY_PENDING == 0);
}

/// Sends an INIT to this processor, which is in VMX root operation and holds it until the next VM entry. Returns
/// whether its APIC is enabled.
pub fn send_init_to_self() -> bool {
    let Some(apic) = Apic::current() else { return false };
    let id = match apic {
        Apic::X2 => apic.read(ID),
        Apic::X1(_) => apic.read(ID) >> 24,
    };
    send(id, Ipi::Init)
}

/// Resets the APIC as an INIT does (SDM Volume 3A, 12.4.7.3 "Local APIC State After an INIT Reset (“Wait-for-SIPI”
/// State)"): an INIT that causes a VM exit does not reset the APIC. DEVIATION: requested interrupts stay requested.
pub fn reset() {
    const IN_SERVICE_WORDS: u32 = 8;
    const VECTORS: u32 = 256;
    let Some(apic) = Apic::current() else { return };
    let in_service = || (0..IN_SERVICE_WORDS).any(|word| apic.read(IN_SERVICE + 16 * word) != 0);
    for _ in 0..VECTORS {
        if !in_service() {
            break;
        }
        apic.write(EOI, 0);
    }
    for entry in LVT {
        apic.write(entry, MASKED);
    }
    for register in [TASK_PRIORITY, INITIAL_COUNT, DIVIDE] {
        apic.write(register, 0);
    }
    if matches!(apic, Apic::X1(_)) {
        apic.write(LOGICAL_DESTINATION, 0);
        apic.write(DESTINATION_FORMAT, u32::MAX);
    }
    apic.write(SPURIOUS_VECTOR, 0xff);
    // SAFETY: the timer is the guest's.
    _ = unsafe { msr::try_write(IA32_TSC_DEADLINE, 0) };
}
