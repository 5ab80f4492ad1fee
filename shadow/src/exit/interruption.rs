//! Interruption information (SDM 25.8.3 "VM-Entry Controls for Event Injection", 25.9.2 "Information for VM Exits Due
//! to Vectored Events", 25.9.3 "Information for VM Exits That Occur During Event Delivery").

/// Interruption information: of an exit, of IDT vectoring, or for injection (SDM 25.8.3, 25.9.2, 25.9.3: one format).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

/// Types of an interruption: bits 10:8 of its information.
#[expect(missing_docs, reason = "the names are the SDM's")]
pub mod interruption_type {
    pub const EXTERNAL_INTERRUPT: u32 = 0;
    pub const RESERVED: u32 = 1;
    pub const NMI: u32 = 2;
    pub const HARDWARE_EXCEPTION: u32 = 3;
    pub const SOFTWARE_INTERRUPT: u32 = 4;
    pub const PRIVILEGED_SOFTWARE_EXCEPTION: u32 = 5;
    pub const SOFTWARE_EXCEPTION: u32 = 6;
    pub const OTHER_EVENT: u32 = 7;
}

impl InterruptionInfo {
    const DELIVER_ERROR_CODE: u32 = 1 << 11;
    const NMI_UNBLOCKING: u32 = 1 << 12;
    const VALID: u32 = 1 << 31;

    /// A valid interruption of a type with a vector.
    pub const fn new(kind: u32, vector: u8) -> Self {
        Self(Self::VALID | kind << 8 | vector as u32)
    }

    /// This interruption with an error code to deliver.
    pub const fn with_error_code(self) -> Self {
        Self(self.0 | Self::DELIVER_ERROR_CODE)
    }

    /// The vector.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The type, one of [`interruption_type`].
    pub const fn kind(self) -> u32 {
        self.0 >> 8 & 7
    }

    /// Whether there is an error code.
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::DELIVER_ERROR_CODE != 0
    }

    /// Bit 12 of an exit's information: NMI unblocking due to IRET. In IDT-vectoring and injection it is reserved.
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & Self::NMI_UNBLOCKING != 0
    }

    /// Bit 31.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// This interruption with the valid bit clear, as a VM exit leaves it in the VM-entry field.
    pub const fn invalidated(self) -> Self {
        Self(self.0 & !Self::VALID)
    }

    /// Whether it is an NMI.
    pub const fn is_nmi(self) -> bool {
        self.is_valid() && self.kind() == interruption_type::NMI
    }

    /// Whether injection needs an instruction length: software interrupts and exceptions push the RIP that follows.
    pub const fn needs_instruction_length(self) -> bool {
        matches!(
            self.kind(),
            interruption_type::SOFTWARE_INTERRUPT
                | interruption_type::PRIVILEGED_SOFTWARE_EXCEPTION
                | interruption_type::SOFTWARE_EXCEPTION
        )
    }

    /// Bits that injection requires to be 0 (30:12).
    pub const fn reserved_for_injection(self) -> u32 {
        self.0 & 0x7fff_f000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interruption_information_comes_apart() {
        let page_fault = InterruptionInfo::new(interruption_type::HARDWARE_EXCEPTION, 14).with_error_code();
        assert_eq!(page_fault.0, 0x8000_0b0e);
        assert_eq!((page_fault.vector(), page_fault.kind()), (14, 3));
        assert!(page_fault.has_error_code() && !page_fault.needs_instruction_length());
        assert!(InterruptionInfo::new(interruption_type::SOFTWARE_INTERRUPT, 0x80).needs_instruction_length());
        assert!(!page_fault.invalidated().is_valid());
    }
}
