//! How a VMX instruction ends.

use core::fmt;

/// VM-instruction error numbers (SDM 31.4 "VM Instruction Error Numbers").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct InsnError(pub u32);

impl InsnError {
    /// VMCALL executed in VMX root operation.
    pub const VMCALL_IN_ROOT: Self = Self(1);
    /// VMCLEAR with invalid physical address.
    pub const VMCLEAR_INVALID_ADDRESS: Self = Self(2);
    /// VMCLEAR with VMXON pointer.
    pub const VMCLEAR_VMXON_POINTER: Self = Self(3);
    /// VMLAUNCH with non-clear VMCS.
    pub const VMLAUNCH_NON_CLEAR: Self = Self(4);
    /// VMRESUME with non-launched VMCS.
    pub const VMRESUME_NON_LAUNCHED: Self = Self(5);
    /// VM entry with invalid control field(s).
    pub const ENTRY_INVALID_CONTROL: Self = Self(7);
    /// VM entry with invalid host-state field(s).
    pub const ENTRY_INVALID_HOST_STATE: Self = Self(8);
    /// VMPTRLD with invalid physical address.
    pub const VMPTRLD_INVALID_ADDRESS: Self = Self(9);
    /// VMPTRLD with VMXON pointer.
    pub const VMPTRLD_VMXON_POINTER: Self = Self(10);
    /// VMPTRLD with incorrect VMCS revision identifier.
    pub const VMPTRLD_INCORRECT_REVISION: Self = Self(11);
    /// VMREAD/VMWRITE from/to unsupported VMCS component.
    pub const UNSUPPORTED_COMPONENT: Self = Self(12);
    /// VMWRITE to read-only VMCS component.
    pub const VMWRITE_READ_ONLY: Self = Self(13);
    /// VMXON executed in VMX root operation.
    pub const VMXON_IN_ROOT: Self = Self(15);
    /// VM entry with events blocked by MOV SS.
    pub const ENTRY_BLOCKED_BY_MOV_SS: Self = Self(26);
    /// Invalid operand to INVEPT/INVVPID.
    pub const INVALID_OPERAND: Self = Self(28);
}

impl fmt::Display for InsnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match *self {
            Self::VMCALL_IN_ROOT => "VMCALL executed in VMX root operation",
            Self::VMCLEAR_INVALID_ADDRESS => "VMCLEAR with invalid physical address",
            Self::VMCLEAR_VMXON_POINTER => "VMCLEAR with VMXON pointer",
            Self::VMLAUNCH_NON_CLEAR => "VMLAUNCH with non-clear VMCS",
            Self::VMRESUME_NON_LAUNCHED => "VMRESUME with non-launched VMCS",
            Self::ENTRY_INVALID_CONTROL => "VM entry with invalid control field(s)",
            Self::ENTRY_INVALID_HOST_STATE => "VM entry with invalid host-state field(s)",
            Self::VMPTRLD_INVALID_ADDRESS => "VMPTRLD with invalid physical address",
            Self::VMPTRLD_VMXON_POINTER => "VMPTRLD with VMXON pointer",
            Self::VMPTRLD_INCORRECT_REVISION => "VMPTRLD with incorrect VMCS revision identifier",
            Self::UNSUPPORTED_COMPONENT => "VMREAD/VMWRITE from/to unsupported VMCS component",
            Self::VMWRITE_READ_ONLY => "VMWRITE to read-only VMCS component",
            Self::VMXON_IN_ROOT => "VMXON executed in VMX root operation",
            Self::ENTRY_BLOCKED_BY_MOV_SS => "VM entry with events blocked by MOV SS",
            Self::INVALID_OPERAND => "Invalid operand to INVEPT/INVVPID",
            Self(number) => return write!(f, "VM-instruction error {number}"),
        };
        f.write_str(text)
    }
}

impl core::error::Error for InsnError {}

/// VMfail (SDM 31.2 "Conventions").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmFail {
    /// VMfailInvalid: RFLAGS.CF.
    Invalid,
    /// VMfailValid if there is a current VMCS, else VMfailInvalid.
    Valid(InsnError),
}

impl fmt::Display for VmFail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid => f.write_str("VMfailInvalid"),
            Self::Valid(error) => write!(f, "VMfailValid: {error}"),
        }
    }
}

impl core::error::Error for VmFail {}

/// Bits of the error code of a page fault (SDM Volume 3A, 4.7 "Page-Fault Exceptions"): P, W/R, U/S, RSVD, I/D, PK.
pub(crate) const FAULT_PRESENT: u32 = 1 << 0;
pub(crate) const FAULT_WRITE: u32 = 1 << 1;
pub(crate) const FAULT_USER: u32 = 1 << 2;
pub(crate) const FAULT_RESERVED: u32 = 1 << 3;
pub(crate) const FAULT_FETCH: u32 = 1 << 4;
pub(crate) const FAULT_KEY: u32 = 1 << 5;

/// An exception for the guest hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// #UD.
    InvalidOpcode,
    /// #GP with an error code of 0.
    GeneralProtection,
    /// #SS with an error code of 0.
    StackSegment,
    /// #DF.
    DoubleFault,
    /// #TS, with a selector error code.
    InvalidTss(u16),
    /// #NP, with a selector error code.
    NotPresent(u16),
    /// #SS, with a selector error code.
    Stack(u16),
    /// #PF.
    Page {
        /// The address that CR2 gets.
        address: u64,
        /// The error code.
        error_code: u32,
    },
    /// #VE.
    Virtualization,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidOpcode => f.write_str("#UD"),
            Self::GeneralProtection => f.write_str("#GP(0)"),
            Self::StackSegment => f.write_str("#SS(0)"),
            Self::DoubleFault => f.write_str("#DF"),
            Self::InvalidTss(code) => write!(f, "#TS({code:#x})"),
            Self::NotPresent(code) => write!(f, "#NP({code:#x})"),
            Self::Stack(code) => write!(f, "#SS({code:#x})"),
            Self::Page { address, error_code } => write!(f, "#PF({error_code:#x}) at {address:#x}"),
            Self::Virtualization => f.write_str("#VE"),
        }
    }
}

impl core::error::Error for Fault {}

/// Why a VMX instruction did not succeed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// The instruction failed with flags set; RIP advances.
    VmFail(VmFail),
    /// The instruction faulted; RIP stays.
    Fault(Fault),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VmFail(fail) => fail.fmt(f),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl core::error::Error for Failure {}

impl From<InsnError> for Failure {
    fn from(error: InsnError) -> Self {
        Self::VmFail(VmFail::Valid(error))
    }
}

impl From<VmFail> for Failure {
    fn from(fail: VmFail) -> Self {
        Self::VmFail(fail)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// CF, PF, AF, ZF, SF and OF: the flags that every VMX instruction defines.
const STATUS_FLAGS: u64 = 0x8d5;
const CF: u64 = 1 << 0;
const ZF: u64 = 1 << 6;

/// RFLAGS after VMsucceed.
pub const fn rflags_succeed(rflags: u64) -> u64 {
    rflags & !STATUS_FLAGS
}

/// RFLAGS after VMfailInvalid.
pub const fn rflags_fail_invalid(rflags: u64) -> u64 {
    rflags & !STATUS_FLAGS | CF
}

/// RFLAGS after VMfailValid.
pub const fn rflags_fail_valid(rflags: u64) -> u64 {
    rflags & !STATUS_FLAGS | ZF
}
