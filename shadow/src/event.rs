//! Events: injecting an exception, and delivering again an event whose delivery an exit interrupted.

use crate::caps::VmxCaps;
use crate::exit::{InterruptionInfo, interruption_type};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::injection::{GuestMode, Injection, InjectionRules};
use crate::outcome::Fault;
use crate::registers::RFLAGS_RF;
use ept::violation::EptViolation;

const UD: u8 = 6;
const DF: u8 = 8;
const TS: u8 = 10;
const NP: u8 = 11;
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

/// The activity state of a processor that waits to be started (SDM 25.4.2 "Guest Non-Register State").
pub const WAIT_FOR_SIPI: u32 = 3;

/// The current privilege level: the DPL of SS (SDM 25.4.1 "Guest Register State").
#[inline(always)]
pub const fn privilege_level(ss_access_rights: u32) -> u8 {
    (ss_access_rights >> 5 & 3) as u8
}

/// The NMI as an interruption.
pub const NMI_INTERRUPTION: InterruptionInfo = InterruptionInfo::new(interruption_type::NMI, NMI);

impl Fault {
    /// The interruption information and error code with which the fault is reported and injected. In real-address mode
    /// there is no error code (SDM 27.2.1.3 "VM-Entry Control Fields", 28.2.2 "Information for VM Exits Due to Vectored
    /// Events"). The caller sets CR2, for which the VMCS has no field.
    pub const fn interruption(self, mode: GuestMode) -> (InterruptionInfo, Option<u32>) {
        let (vector, error_code) = match self {
            Self::InvalidOpcode => (UD, None),
            Self::GeneralProtection => (GP, Some(0)),
            Self::StackSegment => (SS, Some(0)),
            Self::DoubleFault => (DF, Some(0)),
            Self::InvalidTss(code) => (TS, Some(code as u32)),
            Self::NotPresent(code) => (NP, Some(code as u32)),
            Self::Stack(code) => (SS, Some(code as u32)),
            Self::Virtualization => (VE, None),
            Self::Page { error_code, .. } => (PF, Some(error_code)),
        };
        let exception = InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, vector);
        match (mode, error_code) {
            (GuestMode::Protected, Some(_)) => (exception.with_error_code(), error_code),
            _ => (exception, None),
        }
    }
}

/// Injects a fault at the next entry of the current VMCS's guest. VM entry pushes RFLAGS as it is in the VMCS, and a
/// fault pushes RFLAGS.RF = 1 (SDM Volume 3B, 18.3.1.1 "Instruction-Breakpoint Exception Condition").
pub fn inject_fault(vmcs: &mut impl VmcsAccess, fault: Fault) {
    let (info, error_code) = fault.interruption(GuestMode::of(vmcs));
    set_resume_flag(vmcs);
    vmcs.write(ENTRY_INTERRUPTION_INFO, info.0);
    if let Some(code) = error_code {
        vmcs.write(ENTRY_EXCEPTION_ERROR_CODE, code);
    }
}

/// The fault that a processor delivers for one that it meets while it delivers `first`, or `None` if it shuts down (SDM
/// Volume 3A, table 6-5 "Conditions for Generating a Double Fault").
pub const fn while_delivering(first: InterruptionInfo, second: Fault) -> Option<Fault> {
    if !first.is_valid() || first.kind() != interruption_type::HARDWARE_EXCEPTION {
        return Some(second);
    }
    let (info, _) = second.interruption(GuestMode::Protected);
    let is_serious = is_contributory(info.vector()) || is_page_fault(info.vector());
    match first.vector() {
        DF if is_serious => None,
        vector if is_contributory(vector) && is_contributory(info.vector()) => Some(Fault::DoubleFault),
        vector if is_page_fault(vector) && is_serious => Some(Fault::DoubleFault),
        _ => Some(second),
    }
}

/// Whether an exception is of the class "contributory exceptions".
const fn is_contributory(vector: u8) -> bool {
    const DE: u8 = 0;
    const CP: u8 = 21;
    matches!(vector, DE | TS | NP | SS | GP | CP)
}

/// Whether an exception is of the class "page faults".
const fn is_page_fault(vector: u8) -> bool {
    matches!(vector, PF | VE)
}

/// Sets RFLAGS.RF of the guest, as the delivery of a fault saves it.
pub fn set_resume_flag(vmcs: &mut impl VmcsAccess) {
    let rflags = vmcs.read(GUEST_RFLAGS);
    vmcs.write(GUEST_RFLAGS, rflags | RFLAGS_RF);
}

/// The guest executes again what met an EPT violation. An IRET that had unblocked NMIs before it faulted blocks them
/// again (SDM 28.2.3 "Information About NMI Unblocking Due to IRET"); during the delivery of an event the bit is
/// undefined.
pub fn block_nmis_again(vmcs: &mut impl VmcsAccess, qualification: EptViolation) {
    let delivering = InterruptionInfo(vmcs.read(IDT_VECTORING_INFO)).is_valid();
    if !delivering && qualification.contains(EptViolation::NMI_UNBLOCKING) {
        let state = vmcs.read(GUEST_INTERRUPTIBILITY);
        vmcs.write(GUEST_INTERRUPTIBILITY, state | BLOCKING_BY_NMI);
    }
}

/// The injection that repeats the event whose delivery an exit interrupted (SDM 28.2.4 "Information for VM Exits During
/// Event Delivery"). `None` if the exit interrupted no delivery.
pub fn interrupted(vmcs: &impl VmcsAccess) -> Option<Injection> {
    /// In IDT-vectoring information bit 12 is undefined and bits 30:13 are reserved; injection requires all of them to
    /// be 0.
    const DEFINED: u32 = 1 << 31 | 0xfff;
    let info = InterruptionInfo(vmcs.read(IDT_VECTORING_INFO) & DEFINED);
    info.is_valid().then(|| Injection {
        info,
        error_code: if info.has_error_code() { vmcs.read(IDT_VECTORING_ERROR_CODE) } else { 0 },
        instruction_length: if info.needs_instruction_length() { vmcs.read(EXIT_INSTRUCTION_LENGTH) } else { 0 },
    })
}

/// Injects again the event whose delivery the last exit interrupted, if there was one: an exit that the host handles
/// itself must not lose it.
///
/// # Errors
///
/// The processor reports an event that VM entry accepts in no form. Nothing is injected.
pub fn redeliver(vmcs: &mut impl VmcsAccess, caps: &VmxCaps) -> Result<(), InterruptionInfo> {
    let Some(reported) = interrupted(vmcs) else { return Ok(()) };
    let rules = InjectionRules::new(caps, GuestMode::of(vmcs));
    let injection = reported.accepted(&rules).ok_or(reported.info)?;
    injection.write(vmcs);
    if injection.info.is_nmi() {
        // The NMI that was being delivered has set blocking already; injecting it needs blocking clear, and sets it
        // again.
        let state = vmcs.read(GUEST_INTERRUPTIBILITY);
        vmcs.write(GUEST_INTERRUPTIBILITY, state & !BLOCKING_BY_NMI);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeVmcs, skylake_caps};

    fn protected() -> FakeVmcs {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        vmcs.poke(GUEST_CR0.id(), 1);
        vmcs
    }

    #[test]
    fn a_fault_during_the_delivery_of_an_exception_may_be_a_double_fault_or_the_end() {
        let exception = |vector| InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, vector);
        let page = Fault::Page { address: 0, error_code: 0 };
        let tss = Fault::InvalidTss(0x28);
        for (first, second, delivered) in [
            (exception(UD), tss, Some(tss)),
            (exception(UD), page, Some(page)),
            (exception(GP), tss, Some(Fault::DoubleFault)),
            (exception(GP), page, Some(page)),
            (exception(PF), tss, Some(Fault::DoubleFault)),
            (exception(PF), page, Some(Fault::DoubleFault)),
            (exception(PF), Fault::InvalidOpcode, Some(Fault::InvalidOpcode)),
            (exception(DF), page, None),
            (exception(DF), tss, None),
            (InterruptionInfo::new(interruption_type::SOFTWARE_INTERRUPT, DF), tss, Some(tss)),
            (InterruptionInfo::new(interruption_type::EXTERNAL_INTERRUPT, 0x20), page, Some(page)),
            (exception(DF).invalidated(), tss, Some(tss)),
        ] {
            assert_eq!(while_delivering(first, second), delivered, "{first:?} {second}");
        }
    }

    /// VM entry accepts every fault in every mode.
    #[test]
    fn a_fault_has_an_error_code_as_its_vector_wants_and_none_in_real_mode() {
        let faults = [
            Fault::InvalidOpcode,
            Fault::GeneralProtection,
            Fault::StackSegment,
            Fault::DoubleFault,
            Fault::InvalidTss(0x28),
            Fault::NotPresent(0x29),
            Fault::Stack(0x10),
            Fault::Page { address: 0, error_code: 3 },
            Fault::Virtualization,
        ];
        for cr0 in [0, 1] {
            for fault in faults {
                let mut vmcs = FakeVmcs::new(&skylake_caps());
                vmcs.poke(GUEST_CR0.id(), cr0);
                inject_fault(&mut vmcs, fault);
                let injection = Injection {
                    info: InterruptionInfo(vmcs.read(ENTRY_INTERRUPTION_INFO)),
                    error_code: vmcs.read(ENTRY_EXCEPTION_ERROR_CODE),
                    instruction_length: 0,
                };
                let rules = InjectionRules::new(&skylake_caps(), GuestMode::of(&vmcs));
                assert_eq!(rules.check(&injection), Ok(()), "{fault:?}, CR0.PE {cr0}");
            }
        }
    }

    #[test]
    fn an_iret_that_met_a_violation_blocks_nmis_again_unless_an_event_was_delivered() {
        let unblocked = EptViolation::NMI_UNBLOCKING | EptViolation::READ;
        for (vectoring, qualification, blocked) in
            [(0, unblocked, true), (0, EptViolation::READ, false), (0x8000_0202, unblocked, false)]
        {
            let mut vmcs = protected();
            vmcs.poke(IDT_VECTORING_INFO.id(), vectoring);
            block_nmis_again(&mut vmcs, qualification);
            assert_eq!(vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_BY_NMI != 0, blocked, "{vectoring:#x}");
        }
    }

    #[test]
    fn a_page_fault_is_injected_with_its_error_code() {
        let mut vmcs = protected();
        inject_fault(&mut vmcs, Fault::Page { address: 0x1000, error_code: 3 });
        assert_eq!(vmcs.read(ENTRY_INTERRUPTION_INFO), 0x8000_0b0e);
        assert_eq!(vmcs.read(ENTRY_EXCEPTION_ERROR_CODE), 3);
        assert_eq!(vmcs.read(GUEST_RFLAGS) & RFLAGS_RF, RFLAGS_RF, "the handler's frame says so");
    }

    #[test]
    fn an_interrupted_event_is_delivered_again_with_what_it_needs() {
        let (mut vmcs, caps) = (protected(), skylake_caps());
        assert_eq!(redeliver(&mut vmcs, &caps), Ok(()));
        assert!(vmcs.written().is_empty());

        let int80 = InterruptionInfo::new(interruption_type::SOFTWARE_INTERRUPT, 0x80);
        vmcs.poke(IDT_VECTORING_INFO.id(), (int80.0 | 1 << 12).into());
        vmcs.poke(EXIT_INSTRUCTION_LENGTH.id(), 2);
        assert_eq!(redeliver(&mut vmcs, &caps), Ok(()));
        assert_eq!(vmcs.read(ENTRY_INTERRUPTION_INFO), int80.0);
        assert_eq!(vmcs.read(ENTRY_INSTRUCTION_LENGTH), 2);
    }

    #[test]
    fn what_is_no_event_is_not_delivered_again() {
        let (mut vmcs, caps) = (protected(), skylake_caps());
        let nonsense = InterruptionInfo::new(interruption_type::RESERVED, 3);
        vmcs.poke(IDT_VECTORING_INFO.id(), nonsense.0.into());
        assert_eq!(redeliver(&mut vmcs, &caps), Err(nonsense));
        assert!(vmcs.written().is_empty());
    }

    #[test]
    fn an_interrupted_nmi_is_delivered_again_with_blocking_clear() {
        let mut vmcs = protected();
        vmcs.poke(IDT_VECTORING_INFO.id(), NMI_INTERRUPTION.0.into());
        vmcs.poke(GUEST_INTERRUPTIBILITY.id(), 8);
        assert_eq!(redeliver(&mut vmcs, &skylake_caps()), Ok(()));
        assert_eq!(vmcs.read(GUEST_INTERRUPTIBILITY), 0);
    }
}
