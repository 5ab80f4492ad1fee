//! The local APIC. It is the guest's; the host only gives an INIT back to it.

use ept::Hpa;
use shadow::msr::IA32_APIC_BASE;

use super::msr;
use super::phys;

const X2APIC_ID: u32 = 0x802;
const X2APIC_ICR: u32 = 0x830;

/// Registers of the xAPIC (SDM Volume 3A, Table 12-1 "Local APIC Register Address Map").
const ID: u64 = 0x20;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

/// ICR: delivery mode INIT, level assert, physical destination.
const INIT: u32 = 0x4500;

/// Sends an INIT to this processor, which is in VMX root operation and holds it until the next VM entry. Returns whether the APIC is
/// enabled, and where the host can reach it.
///
/// What the guest reads of the interrupt command register afterwards is its own last command only in the high half.
pub fn send_init_to_self() -> bool {
    const ENABLE: u64 = 1 << 11;
    const X2APIC: u64 = 1 << 10;
    const BASE: u64 = 0x000f_ffff_ffff_f000;
    let apic_base = msr::try_read(IA32_APIC_BASE).unwrap_or(0);
    match (apic_base & ENABLE != 0, apic_base & X2APIC != 0) {
        (true, true) => {
            let id = msr::try_read(X2APIC_ID).unwrap_or(0);
            // SAFETY: an INIT is blocked in VMX root operation.
            unsafe { msr::try_write(X2APIC_ICR, id << 32 | u64::from(INIT)) }.is_ok()
        }
        (true, false) => {
            let base = Hpa(apic_base & BASE);
            if !phys::is_mapped(base, 0x1000) {
                return false;
            }
            // SAFETY: the page is the APIC's, whose registers are dwords, and an INIT is blocked in VMX root operation.
            unsafe {
                let register = |offset| phys::phys_to_virt(base + offset).cast::<u32>();
                let high = register(ICR_HIGH).read_volatile();
                register(ICR_HIGH).write_volatile(register(ID).read_volatile());
                register(ICR_LOW).write_volatile(INIT);
                register(ICR_HIGH).write_volatile(high);
            }
            true
        }
        (false, _) => false,
    }
}
