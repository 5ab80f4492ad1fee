//! Events: what is injected, and what an exit interrupted.

use ept::violation::EptViolation;
use shadow::VmxCaps;
use shadow::event::{block_nmis_again, inject_fault, interrupted, redeliver, while_delivering};
use shadow::exit::{InterruptionInfo, interruption_type as kind};
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::injection::{Event, GuestMode, Injection, InjectionRules};
use shadow::outcome::Fault;

use super::machine::{PROCESSORS, Vmcs};
use crate::{Input, is_one_line};

/// A processor whose rules differ as the byte says.
fn caps(style: u8) -> VmxCaps {
    let mut caps = PROCESSORS[0].caps.clone();
    caps.misc = caps.misc & !(1 << 30) | u64::from(style & 1) << 30;
    caps.basic = caps.basic & !(1 << 56) | u64::from(style >> 1 & 1) << 56;
    if style & 4 != 0 {
        caps.primary.may_be_1 &= !(1 << 27);
    }
    caps
}

fn injection_of(input: &mut Input<'_>) -> Injection {
    let info = InterruptionInfo::new(u32::from(input.byte() & 7), input.byte());
    let info = if input.flag() { info.with_error_code() } else { info };
    Injection {
        info: InterruptionInfo(input.neighbour(info.0.into()) as u32),
        error_code: input.neighbour(0) as u32,
        instruction_length: input.neighbour(2) as u32,
    }
}

fn event(input: &mut Input<'_>) -> Event {
    let (vector, length) = (input.byte(), u32::from(input.byte()));
    match input.byte() % 8 {
        0 => Event::ExternalInterrupt(vector),
        1 => Event::Nmi,
        2 => Event::Exception { vector, error_code: None },
        3 => Event::Exception { vector, error_code: Some(input.long()) },
        4 => Event::SoftwareInterrupt { vector, length },
        5 => Event::PrivilegedSoftwareException { length },
        6 => Event::SoftwareException { vector, length },
        _ => Event::MonitorTrap,
    }
}

/// Injections by the rules of a processor, and the fields of a VMCS after an exit that interrupted a delivery.
pub fn injection(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let style = input.byte();
    let caps = caps(style);
    let mode = if style & 8 == 0 { GuestMode::Protected } else { GuestMode::Real };
    let rules = InjectionRules::new(&caps, mode);
    check_accepted(injection_of(&mut input), &rules);
    match rules.inject(event(&mut input)) {
        Ok(injection) => {
            assert!(injection.info.is_valid() && rules.check(&injection).is_ok());
            assert_eq!(injection.accepted(&rules), Some(injection));
        }
        Err(error) => is_one_line(error),
    }
    check_vmcs(&mut input, &caps);
}

/// An event keeps its vector in the form that VM entry accepts, and an accepted form stays.
fn check_accepted(injection: Injection, rules: &InjectionRules) {
    match injection.accepted(rules) {
        Some(accepted) => {
            assert_eq!(rules.check(&accepted), Ok(()));
            assert_eq!(accepted.accepted(rules), Some(accepted));
            assert_eq!(accepted.info.vector(), injection.info.vector());
            assert_eq!(accepted == injection, rules.check(&injection).is_ok());
            let is_interrupt = accepted.info.is_valid() && accepted.info.kind() == kind::EXTERNAL_INTERRUPT;
            assert!(!is_interrupt || !accepted.info.has_error_code());
        }
        None => {
            // Every vector can be an external interrupt, and every exception of the first 32 one of hardware.
            assert!(injection.info.is_valid());
            let (kind, vector) = (injection.info.kind(), injection.info.vector());
            assert!(!matches!(kind, kind::EXTERNAL_INTERRUPT | kind::SOFTWARE_INTERRUPT), "{injection:x?}");
            assert!(kind != kind::HARDWARE_EXCEPTION || vector > 31, "{injection:x?}");
        }
    }
}

fn check_vmcs(input: &mut Input<'_>, caps: &VmxCaps) {
    let mut vmcs = Vmcs::new(&PROCESSORS[0]);
    for field in [IDT_VECTORING_INFO, IDT_VECTORING_ERROR_CODE, EXIT_INSTRUCTION_LENGTH, GUEST_INTERRUPTIBILITY] {
        vmcs.poke(field.id(), input.long().into());
    }
    vmcs.poke(GUEST_CR0.id(), input.byte().into());
    vmcs.poke(GUEST_RFLAGS.id(), input.long().into());
    let before = vmcs.clone();
    let rules = InjectionRules::new(caps, GuestMode::of(&vmcs));
    let reported = interrupted(&vmcs);
    match redeliver(&mut vmcs, caps) {
        Ok(()) => {
            let info = InterruptionInfo(vmcs.read(ENTRY_INTERRUPTION_INFO));
            assert_eq!(info.is_valid(), reported.is_some());
            let injected = Injection {
                info,
                error_code: if info.has_error_code() { vmcs.read(ENTRY_EXCEPTION_ERROR_CODE) } else { 0 },
                instruction_length: if info.needs_instruction_length() {
                    vmcs.read(ENTRY_INSTRUCTION_LENGTH)
                } else {
                    0
                },
            };
            assert_eq!(rules.check(&injected), Ok(()));
        }
        Err(_) => {
            assert!(reported.is_some_and(|reported| reported.accepted(&rules).is_none()));
            assert!(vmcs.written.is_empty());
        }
    }
    let mut vmcs = before;
    block_nmis_again(&mut vmcs, EptViolation(input.quad()));
    let fault = fault(input);
    check_delivery(InterruptionInfo(vmcs.read(IDT_VECTORING_INFO)), fault);
    inject_fault(&mut vmcs, fault);
    let info = InterruptionInfo(vmcs.read(ENTRY_INTERRUPTION_INFO));
    let injected = Injection { info, error_code: vmcs.read(ENTRY_EXCEPTION_ERROR_CODE), instruction_length: 0 };
    assert!(rules.check(&injected).is_ok(), "{fault:?}: {injected:x?}");
}

fn fault(input: &mut Input<'_>) -> Fault {
    let code = input.half();
    match input.byte() % 9 {
        0 => Fault::InvalidOpcode,
        1 => Fault::GeneralProtection,
        2 => Fault::StackSegment,
        3 => Fault::DoubleFault,
        4 => Fault::InvalidTss(code),
        5 => Fault::NotPresent(code),
        6 => Fault::Stack(code),
        7 => Fault::Page { address: input.quad(), error_code: code.into() },
        _ => Fault::Virtualization,
    }
}

/// A fault during a delivery is delivered, or becomes #DF, or shuts the processor down if that was #DF already.
fn check_delivery(first: InterruptionInfo, second: Fault) {
    let is_exception = first.is_valid() && first.kind() == kind::HARDWARE_EXCEPTION;
    let delivered = while_delivering(first, second);
    match delivered {
        None => assert!(is_exception && first.vector() == 8),
        Some(fault) => assert!(fault == second || fault == Fault::DoubleFault && is_exception && first.vector() != 8),
    }
    if let Some(fault) = delivered.filter(|&fault| fault != second) {
        let (first, _) = fault.interruption(GuestMode::Protected);
        let again = while_delivering(first, second);
        assert!(again.is_none(), "what makes #DF shuts down while that is delivered");
    }
}
