//! Accesses to addresses beyond the width of physical addresses that the guest hypervisor is told
//! ([`crate::caps::usable_physical_bits`]). On a processor of that width the bits are reserved, and a page fault says
//! so; the real one is wider, and an EPT violation comes instead.

use crate::exit::{InterruptionInfo, interruption_type};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::outcome::{FAULT_FETCH, FAULT_PRESENT, FAULT_RESERVED, FAULT_USER, FAULT_WRITE, Fault};
use crate::registers::{CR4_PAE, CR4_SMEP, EFER_NXE};
use ept::violation::EptViolation;

const USER: u8 = 3;

/// What an EPT violation of the current VMCS's guest comes to, whose address is beyond the width. Nothing if it
/// interrupted the delivery of an exception: the processor shuts down.
///
/// DEVIATION: an event whose delivery was interrupted is lost, as on a processor of that width, but there is no double
/// fault between a fault and a shutdown. Where a paging-structure entry is beyond the width, the error code does not
/// say that the access was a write.
pub fn fault(vmcs: &impl VmcsAccess) -> Option<Fault> {
    let interrupted = InterruptionInfo(vmcs.read(IDT_VECTORING_INFO));
    if interrupted.is_valid() && interrupted.kind() == interruption_type::HARDWARE_EXCEPTION {
        return None;
    }
    let violation = EptViolation(vmcs.read(EXIT_QUALIFICATION));
    if !violation.contains(EptViolation::LINEAR_ADDRESS_IS_VALID) {
        // MOV CR3, which loads PDPTEs.
        return Some(Fault::GeneralProtection);
    }
    let is_user = crate::event::privilege_level(vmcs.read(GUEST_SS_ACCESS_RIGHTS)) == USER;
    let cr4 = vmcs.read(GUEST_CR4);
    let reports_fetches = cr4 & CR4_SMEP != 0 || cr4 & CR4_PAE != 0 && vmcs.read(GUEST_EFER) & EFER_NXE != 0;
    let access = [
        (violation.contains(EptViolation::WRITE | EptViolation::IS_TRANSLATION), FAULT_WRITE),
        (is_user, FAULT_USER),
        (violation.contains(EptViolation::FETCH) && reports_fetches, FAULT_FETCH),
    ];
    let error_code =
        access.iter().filter(|(is_so, _)| *is_so).fold(FAULT_PRESENT | FAULT_RESERVED, |all, (_, bit)| all | bit);
    Some(Fault::Page { address: vmcs.read(GUEST_LINEAR_ADDRESS), error_code })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NMI_INTERRUPTION;
    use crate::fake::{FakeVmcs, skylake_caps};

    fn fault_of(qualification: EptViolation, ss: u32, efer: u64, interrupted: u32) -> Option<Fault> {
        let mut vmcs = FakeVmcs::new(&skylake_caps());
        vmcs.poke(EXIT_QUALIFICATION.id(), qualification.0);
        vmcs.poke(GUEST_LINEAR_ADDRESS.id(), 0x1234);
        vmcs.poke(GUEST_SS_ACCESS_RIGHTS.id(), ss.into());
        vmcs.poke(GUEST_CR4.id(), CR4_PAE);
        vmcs.poke(GUEST_EFER.id(), efer);
        vmcs.poke(IDT_VECTORING_INFO.id(), interrupted.into());
        fault(&vmcs)
    }

    #[test]
    fn an_access_beyond_the_width_is_a_page_fault_for_reserved_bits() {
        let (walk, end) = (EptViolation::LINEAR_ADDRESS_IS_VALID, EptViolation::IS_TRANSLATION);
        let page = |error_code| Some(Fault::Page { address: 0x1234, error_code });
        assert_eq!(fault_of(walk | end | EptViolation::READ, 0x93, 0, 0), page(0b01001));
        assert_eq!(fault_of(walk | end | EptViolation::WRITE, 0xf3, 0, 0), page(0b01111));
        assert_eq!(fault_of(walk | EptViolation::READ | EptViolation::WRITE, 0x93, 0, 0), page(0b01001), "of a table");
        assert_eq!(fault_of(walk | end | EptViolation::FETCH, 0x93, EFER_NXE, 0), page(0b11001));
        assert_eq!(fault_of(walk | end | EptViolation::FETCH, 0x93, 0, 0), page(0b01001));
        assert_eq!(fault_of(EptViolation::READ, 0x93, 0, 0), Some(Fault::GeneralProtection), "PDPTEs");
    }

    #[test]
    fn a_fault_beyond_the_width_in_the_delivery_of_an_exception_ends_in_a_shutdown() {
        let access = EptViolation::LINEAR_ADDRESS_IS_VALID | EptViolation::IS_TRANSLATION | EptViolation::WRITE;
        assert_eq!(fault_of(access, 0x93, 0, 0x8000_0b0e), None);
        assert!(fault_of(access, 0x93, 0, NMI_INTERRUPTION.0).is_some());
    }
}
