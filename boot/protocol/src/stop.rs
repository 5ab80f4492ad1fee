//! Why l1hv stops: a closed list of reasons, and the line that gives one.

/// The beginning of the line; the kind's name, a colon, a space and the message follow.
pub const LINE_PREFIX: &str = "l1hv: stop: ";

/// The kind and the message of a stop, from a line of the log.
///
/// ```
/// use protocol::stop::parse;
/// assert_eq!(parse("l1hv: stop: no-vmx: this processor has no VMX"), Some(("no-vmx", "this processor has no VMX")));
/// assert_eq!(parse("l1hv: entering the guest"), None);
/// ```
pub fn parse(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(LINE_PREFIX)?;
    let (kind, message) = rest.split_once(": ").unwrap_or((rest, ""));
    Some((kind.trim(), message.trim()))
}

/// The kind of the reason. The line gives its [name](StopKind::name), and the machine exits with its
/// [status](StopKind::status).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopKind {
    /// The processor has no 64-bit mode.
    NoLongMode,
    /// The processor has no VMX.
    NoVmx,
    /// The firmware locked VMX off.
    VmxLocked,
    /// The processor has VMX without the EPT features that the host needs.
    NoEpt,
    /// The processor has VMX without unrestricted guest.
    NoUnrestrictedGuest,
    /// The processor has VMX without VPID.
    NoVpid,
    /// The processor has VMX without another part that the host needs.
    NoVmxFeature,
    /// The processor has no execute-disable, or the firmware switched it off.
    NoExecuteDisable,
    /// The machine has no IOMMU that can be used, and the user asks for one.
    NoIommu,
    /// A processor of the machine does not start, or is not like the others.
    Processors,
    /// The boot loader's information is unusable.
    BadBootInfo,
    /// The boot loader passed no module.
    NoGuestImage,
    /// The guest's image, or one of its modules, cannot be loaded.
    BadImage,
    /// The host's command line has an option or a value that does not exist.
    BadOption,
    /// Not enough memory for the host, the guest or both.
    LowMemory,
    /// The guest hypervisor caused a triple fault.
    TripleFault,
    /// The guest hypervisor's VMCS caused a VMX abort.
    VmxAbort,
    /// A defect of the host itself.
    Internal,
}

impl StopKind {
    /// All kinds.
    pub const ALL: [Self; 18] = [
        Self::NoLongMode,
        Self::NoVmx,
        Self::VmxLocked,
        Self::NoEpt,
        Self::NoUnrestrictedGuest,
        Self::NoVpid,
        Self::NoVmxFeature,
        Self::NoExecuteDisable,
        Self::NoIommu,
        Self::Processors,
        Self::BadBootInfo,
        Self::NoGuestImage,
        Self::BadImage,
        Self::BadOption,
        Self::LowMemory,
        Self::TripleFault,
        Self::VmxAbort,
        Self::Internal,
    ];

    /// The name in the line that explains the stop.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoLongMode => "no-long-mode",
            Self::NoVmx => "no-vmx",
            Self::VmxLocked => "vmx-locked",
            Self::NoEpt => "no-ept",
            Self::NoUnrestrictedGuest => "no-unrestricted-guest",
            Self::NoVpid => "no-vpid",
            Self::NoVmxFeature => "no-vmx-feature",
            Self::NoExecuteDisable => "no-execute-disable",
            Self::NoIommu => "no-iommu",
            Self::Processors => "processors",
            Self::BadBootInfo => "bad-boot-info",
            Self::NoGuestImage => "no-guest-image",
            Self::BadImage => "bad-image",
            Self::BadOption => "bad-option",
            Self::LowMemory => "low-memory",
            Self::TripleFault => "triple-fault",
            Self::VmxAbort => "vmx-abort",
            Self::Internal => "internal",
        }
    }

    /// The value written to [`EXIT_PORT`](crate::EXIT_PORT). QEMU then exits with `status << 1 | 1`, so it stays below
    /// 128. It starts at 16, above what guests use.
    pub const fn status(self) -> u32 {
        16 + self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_own_name_and_its_own_status_that_fits_an_exit_status() {
        for (i, a) in StopKind::ALL.iter().enumerate() {
            assert_eq!(a.status(), 16 + i as u32, "{} is missing from ALL or out of place", a.name());
            assert!(a.status() < 128);
            for b in &StopKind::ALL[..i] {
                assert_ne!(a.name(), b.name());
            }
        }
    }
}
