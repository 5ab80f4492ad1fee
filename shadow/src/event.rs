//! Events: injecting an exception, and delivering again what an exit interrupted.

use crate::exit::{InterruptionInfo, interruption_type};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::injection::Injection;
use crate::outcome::Fault;

const UD: u8 = 6;
const SS: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;
const VE: u8 = 20;
const NMI: u8 = 2;

/// Blocking by NMI in the interruptibility state (SDM Table 25-3).
pub const BLOCKING_BY_NMI: u32 = 1 << 3;
/// Blocking by STI in the interruptibility state.
pub const BLOCKING_BY_STI: u32 = 1 << 0;
/// Blocking by MOV SS in the interruptibility state.
pub const BLOCKING_BY_MOV_SS: u32 = 1 << 1;

/// The current privilege level: the DPL of SS (SDM 25.4.1 "Guest Register State").
#[inline(always)]
pub const fn privilege_level(ss_access_rights: u32) -> u8 {
    (ss_access_rights >> 5 & 3) as u8
}

/// The NMI as an interruption.
pub const NMI_INTERRUPTION: InterruptionInfo = InterruptionInfo::new(interruption_type::NMI, NMI);

impl Fault {
    /// How the fault is injected: its interruption information and error code. CR2 is the caller's, the VMCS has no field for it.
    pub const fn interruption(self) -> (InterruptionInfo, Option<u32>) {
        const fn exception(vector: u8) -> InterruptionInfo {
            InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, vector)
        }
        match self {
            Self::InvalidOpcode => (exception(UD), None),
            Self::GeneralProtection => (exception(GP).with_error_code(), Some(0)),
            Self::StackSegment => (exception(SS).with_error_code(), Some(0)),
            Self::Virtualization => (exception(VE), None),
            Self::Page { error_code, .. } => (exception(PF).with_error_code(), Some(error_code)),
        }
    }
}

/// Injects a fault at the next entry of the current VMCS's guest.
pub fn inject_fault(vmcs: &mut impl VmcsAccess, fault: Fault) {
    let (info, error_code) = fault.interruption();
    vmcs.write(ENTRY_INTERRUPTION_INFO, info.0);
    if let Some(code) = error_code {
        vmcs.write(ENTRY_EXCEPTION_ERROR_CODE, code);
    }
}

/// What injects again the event whose delivery an exit interrupted (SDM 28.2.4 "Information for VM Exits During Event Delivery").
/// `None` if it interrupted none.
pub fn interrupted(vmcs: &impl VmcsAccess) -> Option<Injection> {
    /// IDT-vectoring information has bit 12 undefined; injection wants it 0.
    const DEFINED: u32 = !(1 << 12);
    let info = InterruptionInfo(vmcs.read(IDT_VECTORING_INFO) & DEFINED);
    info.is_valid().then(|| Injection {
        info,
        error_code: if info.has_error_code() { vmcs.read(IDT_VECTORING_ERROR_CODE) } else { 0 },
        instruction_length: if info.needs_instruction_length() { vmcs.read(EXIT_INSTRUCTION_LENGTH) } else { 0 },
    })
}

/// Injects again the event whose delivery the last exit interrupted, if there was one: an exit that the host handles itself must not
/// lose it.
pub fn redeliver(vmcs: &mut impl VmcsAccess) {
    let Some(injection) = interrupted(vmcs) else { return };
    injection.write(vmcs);
    if injection.info.is_nmi() {
        // The NMI that was being delivered has set blocking already; injecting it needs blocking clear, and sets it again.
        let state = vmcs.read(GUEST_INTERRUPTIBILITY);
        vmcs.write(GUEST_INTERRUPTIBILITY, state & !BLOCKING_BY_NMI);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeVmcs, skylake_caps};

    #[test]
    fn a_page_fault_is_injected_with_its_error_code() {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        inject_fault(&mut vmcs, Fault::Page { address: 0x1000, error_code: 3 });
        assert_eq!(vmcs.read(ENTRY_INTERRUPTION_INFO), 0x8000_0b0e);
        assert_eq!(vmcs.read(ENTRY_EXCEPTION_ERROR_CODE), 3);
    }

    #[test]
    fn an_interrupted_event_is_delivered_again_with_what_it_needs() {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        redeliver(&mut vmcs);
        assert!(vmcs.written().is_empty());

        let int80 = InterruptionInfo::new(interruption_type::SOFTWARE_INTERRUPT, 0x80);
        vmcs.poke(IDT_VECTORING_INFO.id(), (int80.0 | 1 << 12).into());
        vmcs.poke(EXIT_INSTRUCTION_LENGTH.id(), 2);
        redeliver(&mut vmcs);
        assert_eq!(vmcs.read(ENTRY_INTERRUPTION_INFO), int80.0);
        assert_eq!(vmcs.read(ENTRY_INSTRUCTION_LENGTH), 2);
    }

    #[test]
    fn an_interrupted_nmi_is_delivered_again_with_blocking_clear() {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        vmcs.poke(IDT_VECTORING_INFO.id(), NMI_INTERRUPTION.0.into());
        vmcs.poke(GUEST_INTERRUPTIBILITY.id(), 8);
        redeliver(&mut vmcs);
        assert_eq!(vmcs.read(GUEST_INTERRUPTIBILITY), 0);
    }
}
