//! Event injection: from an event to the VM-entry fields that deliver it, by the rules of VM entry (SDM 25.8.3
//! "VM-Entry Controls for Event Injection", 27.2.1.3 "VM-Entry Control Fields").
//!
//! ```
//! use shadow::VmxCaps;
//! use shadow::injection::{Event, GuestMode, InjectionError, InjectionRules};
//!
//! let rules = InjectionRules::new(&VmxCaps::default(), GuestMode::Protected);
//! let page_fault = Event::Exception { vector: 14, error_code: Some(2) };
//! assert_eq!(rules.inject(page_fault)?.info.0, 0x8000_0b0e);
//!
//! // #UD has no error code, and INT n needs the length of the instruction.
//! let bad = Event::Exception { vector: 6, error_code: Some(0) };
//! assert_eq!(rules.inject(bad), Err(InjectionError::ErrorCode));
//! assert_eq!(rules.inject(Event::SoftwareInterrupt { vector: 0x80, length: 0 }), Err(InjectionError::InstructionLength));
//! # Ok::<(), InjectionError>(())
//! ```

use crate::caps::VmxCaps;
use crate::controls::{Control, Primary};
use crate::exit::{InterruptionInfo, interruption_type as kind};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::registers::CR0_PE;
use core::fmt;

/// An event to inject.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An external interrupt.
    ExternalInterrupt(u8),
    /// An NMI.
    Nmi,
    /// A hardware exception.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, if it has one.
        error_code: Option<u32>,
    },
    /// INT n.
    SoftwareInterrupt {
        /// Its vector.
        vector: u8,
        /// Bytes of the instruction: the pushed RIP is that of the next instruction.
        length: u32,
    },
    /// INT1.
    PrivilegedSoftwareException {
        /// Bytes of the instruction.
        length: u32,
    },
    /// INT3 or INTO.
    SoftwareException {
        /// Its vector.
        vector: u8,
        /// Bytes of the instruction.
        length: u32,
    },
    /// A pending MTF VM exit.
    MonitorTrap,
}

/// Whether the guest has error codes: in real-address mode exceptions push none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestMode {
    /// CR0.PE is 1, or the guest is not an unrestricted one.
    Protected,
    /// An unrestricted guest with CR0.PE at 0.
    Real,
}

impl GuestMode {
    /// The mode of a VMCS's guest. CR0.PE can be 0 only for an unrestricted guest.
    pub fn of(vmcs: &impl VmcsAccess) -> Self {
        if vmcs.read(GUEST_CR0) & CR0_PE != 0 { Self::Protected } else { Self::Real }
    }
}

/// Why VM entry would refuse an injection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InjectionError {
    /// The type is reserved, or the processor lacks it.
    Type,
    /// The vector does not fit the type.
    Vector,
    /// An error code for an event without one, or none for an event with one.
    ErrorCode,
    /// Bits 30:12 of the interruption information.
    ReservedBits,
    /// Bits 31:16 of the error code.
    ErrorCodeBits,
    /// The instruction length is above 15, or 0 where the processor requires 1 or more.
    InstructionLength,
}

impl InjectionError {
    /// The check that failed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Type => "interruption type",
            Self::Vector => "interruption vector",
            Self::ErrorCode => "deliver error code",
            Self::ReservedBits => "interruption information: reserved bits",
            Self::ErrorCodeBits => "exception error code: reserved bits",
            Self::InstructionLength => "VM-entry instruction length",
        }
    }
}

impl fmt::Display for InjectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for InjectionError {}

/// The three VM-entry fields of an injection. A field that the information does not call for is 0, and ignored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Injection {
    /// VM-entry interruption-information field.
    pub info: InterruptionInfo,
    /// VM-entry exception error code.
    pub error_code: u32,
    /// VM-entry instruction length.
    pub instruction_length: u32,
}

impl Injection {
    /// This event in the nearest form that VM entry accepts. A processor reports only accepted forms. KVM, in contrast,
    /// reports exceptions 3 and 4 with the type of INT3 and INTO whatever caused them, and then with an instruction
    /// length of 0.
    pub fn accepted(self, rules: &InjectionRules) -> Option<Self> {
        let kind = match self.info.kind() {
            kind::SOFTWARE_INTERRUPT => kind::EXTERNAL_INTERRUPT,
            kind::SOFTWARE_EXCEPTION | kind::PRIVILEGED_SOFTWARE_EXCEPTION => kind::HARDWARE_EXCEPTION,
            other => other,
        };
        let without_error_code = InterruptionInfo::new(kind, self.info.vector());
        let with_error_code = without_error_code.with_error_code();
        let as_hardware = if self.info.has_error_code() { with_error_code } else { without_error_code };
        let of_hardware = |info| Self { info, error_code: self.error_code & 0xffff, instruction_length: 0 };
        let forms = [as_hardware, without_error_code, with_error_code].map(of_hardware);
        core::iter::once(self).chain(forms).find(|form| rules.check(form).is_ok())
    }

    /// Writes the fields that the injection calls for.
    pub fn write(&self, vmcs: &mut impl VmcsAccess) {
        vmcs.write(ENTRY_INTERRUPTION_INFO, self.info.0);
        if self.info.has_error_code() {
            vmcs.write(ENTRY_EXCEPTION_ERROR_CODE, self.error_code);
        }
        if self.info.needs_instruction_length() {
            vmcs.write(ENTRY_INSTRUCTION_LENGTH, self.instruction_length);
        }
    }
}

/// The rules by which a processor accepts an injection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InjectionRules {
    mode: GuestMode,
    has_monitor_trap: bool,
    has_any_error_code: bool,
    has_length_0: bool,
}

impl InjectionRules {
    /// The rules of a processor with these capabilities, for a guest in this mode.
    pub fn new(caps: &VmxCaps, mode: GuestMode) -> Self {
        /// IA32_VMX_MISC\[30\]: an instruction length of 0 is accepted.
        const MISC_LENGTH_0: u64 = 1 << 30;
        /// IA32_VMX_BASIC\[56\]: hardware exceptions with and without error code, whatever the vector.
        const BASIC_ANY_ERROR_CODE: u64 = 1 << 56;
        Self {
            mode,
            has_monitor_trap: caps.may_be_1(Control::Primary(Primary::MONITOR_TRAP_FLAG)),
            has_any_error_code: caps.basic & BASIC_ANY_ERROR_CODE != 0,
            has_length_0: caps.misc & MISC_LENGTH_0 != 0,
        }
    }

    /// The fields that inject an event.
    ///
    /// # Errors
    ///
    /// No injection can deliver such an event.
    pub fn inject(&self, event: Event) -> Result<Injection, InjectionError> {
        let soft = |kind, vector, length| Injection {
            info: InterruptionInfo::new(kind, vector),
            instruction_length: length,
            ..Injection::default()
        };
        let injection = match event {
            Event::ExternalInterrupt(vector) => soft(kind::EXTERNAL_INTERRUPT, vector, 0),
            Event::Nmi => soft(kind::NMI, 2, 0),
            Event::Exception { vector, error_code: None } => soft(kind::HARDWARE_EXCEPTION, vector, 0),
            Event::Exception { vector, error_code: Some(error_code) } => {
                let info = InterruptionInfo::new(kind::HARDWARE_EXCEPTION, vector).with_error_code();
                Injection { info, error_code, instruction_length: 0 }
            }
            Event::SoftwareInterrupt { vector, length } => soft(kind::SOFTWARE_INTERRUPT, vector, length),
            Event::PrivilegedSoftwareException { length } => soft(kind::PRIVILEGED_SOFTWARE_EXCEPTION, 1, length),
            Event::SoftwareException { vector, length } => soft(kind::SOFTWARE_EXCEPTION, vector, length),
            Event::MonitorTrap => soft(kind::OTHER_EVENT, 0, 0),
        };
        self.check(&injection)?;
        Ok(injection)
    }

    /// Whether VM entry accepts the fields. If the information's valid bit is clear, nothing is injected, and every
    /// field is accepted.
    ///
    /// # Errors
    ///
    /// The first rule that the fields break.
    pub fn check(&self, injection: &Injection) -> Result<(), InjectionError> {
        let Injection { info, error_code, instruction_length } = *injection;
        if !info.is_valid() {
            return Ok(());
        }
        require(info.kind() != kind::RESERVED, InjectionError::Type)?;
        require(info.kind() != kind::OTHER_EVENT || self.has_monitor_trap, InjectionError::Type)?;
        let vector_is_valid = match info.kind() {
            kind::NMI => info.vector() == 2,
            kind::HARDWARE_EXCEPTION => info.vector() <= 31,
            kind::OTHER_EVENT => info.vector() == 0,
            _ => true,
        };
        require(vector_is_valid, InjectionError::Vector)?;
        require(self.error_code_is_right(info), InjectionError::ErrorCode)?;
        require(info.reserved_for_injection() == 0, InjectionError::ReservedBits)?;
        require(!info.has_error_code() || error_code >> 16 == 0, InjectionError::ErrorCodeBits)?;
        let shortest = if self.has_length_0 { 0 } else { 1 };
        let length_is_valid = !info.needs_instruction_length() || (shortest..=15).contains(&instruction_length);
        require(length_is_valid, InjectionError::InstructionLength)
    }

    fn error_code_is_right(&self, info: InterruptionInfo) -> bool {
        /// #DF, #TS, #NP, #SS, #GP, #PF, #AC.
        const WITH_ERROR_CODE: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;
        if info.kind() != kind::HARDWARE_EXCEPTION || self.mode == GuestMode::Real {
            return !info.has_error_code();
        }
        self.has_any_error_code || info.has_error_code() == (WITH_ERROR_CODE >> info.vector() & 1 != 0)
    }
}

fn require(condition: bool, error: InjectionError) -> Result<(), InjectionError> {
    if condition { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeVmcs, skylake_caps};
    use proptest::prelude::*;

    fn rules(mode: GuestMode) -> InjectionRules {
        InjectionRules::new(&VmxCaps { misc: 0, basic: 0, ..skylake_caps() }, mode)
    }

    #[test]
    fn each_vector_has_an_error_code_or_not() {
        for vector in 0..=31 {
            let with = matches!(vector, 8 | 10..=14 | 17);
            let inject = |mode, error_code| rules(mode).inject(Event::Exception { vector, error_code }).is_ok();
            assert_eq!(inject(GuestMode::Protected, Some(0)), with, "{vector}");
            assert_eq!(inject(GuestMode::Protected, None), !with, "{vector}");
            assert!(inject(GuestMode::Real, None) && !inject(GuestMode::Real, Some(0)), "{vector}");
        }
    }

    #[test]
    fn a_processor_that_takes_any_error_code_takes_it_of_exceptions_in_protected_mode_only() {
        let caps = VmxCaps { basic: 1 << 56, ..skylake_caps() };
        let [protected, real] = [GuestMode::Protected, GuestMode::Real].map(|mode| InjectionRules::new(&caps, mode));
        for error_code in [None, Some(0)] {
            assert!(protected.inject(Event::Exception { vector: 6, error_code }).is_ok());
        }
        assert_eq!(real.inject(Event::Exception { vector: 14, error_code: Some(0) }), Err(InjectionError::ErrorCode));
        let interrupt = InterruptionInfo::new(kind::EXTERNAL_INTERRUPT, 14).with_error_code();
        let injection = Injection { info: interrupt, ..Injection::default() };
        assert_eq!(protected.check(&injection), Err(InjectionError::ErrorCode));
    }

    #[test]
    fn soft_events_need_a_length_of_1_to_15_and_of_0_where_the_processor_says_so() {
        let of = |length| {
            [
                Event::SoftwareInterrupt { vector: 0x80, length },
                Event::PrivilegedSoftwareException { length },
                Event::SoftwareException { vector: 3, length },
            ]
        };
        for (length, valid) in [(0, false), (1, true), (15, true), (16, false)] {
            for event in of(length) {
                assert_eq!(rules(GuestMode::Protected).inject(event).is_ok(), valid, "{event:?}");
            }
        }
        let caps = VmxCaps { misc: 1 << 30, ..skylake_caps() };
        assert!(of(0).iter().all(|&event| InjectionRules::new(&caps, GuestMode::Protected).inject(event).is_ok()));
    }

    #[test]
    fn a_monitor_trap_needs_the_control() {
        assert!(rules(GuestMode::Protected).inject(Event::MonitorTrap).is_ok());
        let without = InjectionRules::new(&VmxCaps::default(), GuestMode::Protected);
        assert_eq!(without.inject(Event::MonitorTrap), Err(InjectionError::Type));
    }

    #[test]
    fn an_exception_beyond_31_and_an_error_code_beyond_16_bits_are_refused() {
        let inject = |vector, error_code| {
            rules(GuestMode::Protected).inject(Event::Exception { vector, error_code: Some(error_code) })
        };
        assert_eq!(inject(32, 0), Err(InjectionError::Vector));
        assert_eq!(inject(14, 0x1_0000), Err(InjectionError::ErrorCodeBits));
    }

    #[test]
    fn only_fields_that_the_event_calls_for_are_written() {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        let rules = rules(GuestMode::Protected);
        rules.inject(Event::ExternalInterrupt(0x20)).unwrap().write(&mut vmcs);
        assert_eq!(vmcs.written(), [ENTRY_INTERRUPTION_INFO.id()]);
        rules.inject(Event::SoftwareInterrupt { vector: 3, length: 2 }).unwrap().write(&mut vmcs);
        assert_eq!(vmcs.written(), [ENTRY_INTERRUPTION_INFO.id(), ENTRY_INSTRUCTION_LENGTH.id()]);
    }

    #[test]
    fn an_event_that_kvm_reports_without_its_length_is_injected_as_the_exception_that_it_was() {
        let rules = rules(GuestMode::Protected);
        let breakpoint = |length| Injection {
            info: InterruptionInfo::new(kind::SOFTWARE_EXCEPTION, 3),
            instruction_length: length,
            ..Injection::default()
        };
        assert_eq!(breakpoint(1).accepted(&rules), Some(breakpoint(1)));
        let was = rules.inject(Event::Exception { vector: 3, error_code: None }).unwrap();
        assert_eq!(breakpoint(0).accepted(&rules), Some(was));
        let with_length_0 = InjectionRules { has_length_0: true, ..rules };
        assert_eq!(breakpoint(0).accepted(&with_length_0), Some(breakpoint(0)), "a processor that reports it takes it");
    }

    #[test]
    fn an_error_code_goes_or_comes_as_the_mode_and_the_vector_want_it() {
        let page_fault = Event::Exception { vector: 14, error_code: Some(2) };
        let in_real_mode = rules(GuestMode::Protected).inject(page_fault).unwrap().accepted(&rules(GuestMode::Real));
        assert_eq!(in_real_mode.unwrap().info.0, 0x8000_030e);
        let without = Injection { info: InterruptionInfo(0x8000_030d), ..Injection::default() };
        assert_eq!(without.accepted(&rules(GuestMode::Protected)).unwrap().info.0, 0x8000_0b0d);
    }

    proptest! {
        #[test]
        fn an_accepted_form_is_one_that_vm_entry_takes_and_has_the_vector(info: u32, error_code: u32, instruction_length: u32) {
            let injection = Injection { info: InterruptionInfo(info), error_code, instruction_length };
            for rules in [rules(GuestMode::Protected), rules(GuestMode::Real)] {
                if let Some(form) = injection.accepted(&rules) {
                    prop_assert_eq!(rules.check(&form), Ok(()));
                    prop_assert_eq!(form.info.vector(), injection.info.vector());
                } else {
                    let never = matches!(injection.info.kind(), kind::RESERVED | kind::OTHER_EVENT | kind::NMI);
                    prop_assert!(never || injection.info.vector() > 31);
                }
            }
        }

        #[test]
        fn any_three_words_are_judged_and_what_is_not_valid_passes(info: u32, error_code: u32, instruction_length: u32) {
            let injection = Injection { info: InterruptionInfo(info), error_code, instruction_length };
            let verdict = rules(GuestMode::Protected).check(&injection);
            prop_assert!(verdict.is_ok() || info >> 31 == 1);
            prop_assert!(verdict.is_err() || info >> 31 == 0 || info & 0x7fff_f000 == 0);
        }
    }
}
