//! The guest-state checks that the processor cannot do on vmcs02, because vmcs02 has other values there (SDM 27.3.1.5,
//! 27.3.1.6).

use core::fmt;

use crate::caps::VmxCaps;
use crate::controls::Secondary;
use crate::exit::entry_failure_qualification as qualification;
use crate::fields::*;
use crate::hw::GuestMemory;
use crate::registers::{CR0_PG, CR4_PAE};
use crate::vmcs12::{SHADOW_INDICATOR, Vmcs12, region_revision};
use ept::{Gpa, PageSize};

/// An entry failure for guest state: the exit qualification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestStateError(pub u64);

impl fmt::Display for GuestStateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM-entry failure due to invalid guest state, qualification {}", self.0)
    }
}

impl core::error::Error for GuestStateError {}

/// Checks the VMCS link pointer.
///
/// # Errors
///
/// VM entry fails with this exit qualification.
pub fn guest_state(vmcs12: &Vmcs12, caps: &VmxCaps, memory: &impl GuestMemory) -> Result<(), GuestStateError> {
    let link = vmcs12.get(VMCS_LINK_POINTER);
    if link == u64::MAX {
        return Ok(());
    }
    let shadow_indicator = if vmcs12.has_secondary(Secondary::VMCS_SHADOWING) { SHADOW_INDICATOR } else { 0 };
    let valid = Gpa(link).is_aligned(PageSize::Size4K)
        && caps.is_physical(link)
        && Gpa(link) != vmcs12.pointer
        && region_revision(memory, Gpa(link)) == caps.revision() | shadow_indicator;
    if valid { Ok(()) } else { Err(GuestStateError(qualification::LINK_POINTER)) }
}

/// The PDPTEs of a PAE guest, from memory; `None` if the guest does not use PAE paging.
///
/// VM entry loads them itself where EPT is off (SDM 27.3.1.6 "Checks on Guest Page-Directory-Pointer-Table Entries"),
/// but vmcs02 always has EPT on, and then VM entry loads and checks the PDPTEs of the VMCS.
pub fn read_pdptes(memory: &impl GuestMemory, cr0: u64, cr3: u64, cr4: u64, ia32e: bool) -> Option<[u64; 4]> {
    if ia32e || cr0 & CR0_PG == 0 || cr4 & CR4_PAE == 0 {
        return None;
    }
    let table = Gpa(cr3 & 0xffff_ffe0);
    Some([0, 8, 16, 24].map(|offset| memory.read_u64(table + offset)))
}

/// The PDPTEs of `read_pdptes`, checked as MOV to CR3 checks them.
///
/// # Errors
///
/// A PDPTE has a reserved bit set.
pub fn load_pdptes(
    memory: &impl GuestMemory,
    caps: &VmxCaps,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    ia32e: bool,
) -> Result<Option<[u64; 4]>, GuestStateError> {
    const PRESENT: u64 = 1;
    const RESERVED: u64 = 0x1e6;
    let is_valid = |entry: &u64| entry & PRESENT == 0 || entry & RESERVED == 0 && caps.is_physical(*entry);
    match read_pdptes(memory, cr0, cr3, cr4, ia32e) {
        Some(pdptes) if !pdptes.iter().all(is_valid) => Err(GuestStateError(qualification::PDPTE)),
        pdptes => Ok(pdptes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Policy;
    use crate::fake::{FakeMemory, skylake_caps};

    #[test]
    fn the_link_pointer_must_be_nowhere_or_at_another_vmcs() {
        let (caps, memory) = (skylake_caps().offered(&Policy::EVERYTHING), FakeMemory::new(0x4000));
        memory.write_u32(Gpa(0x1000), Policy::EVERYTHING.revision);
        memory.write_u32(Gpa(0x2000), Policy::EVERYTHING.revision);
        let mut vmcs12 = Vmcs12::new(Gpa(0x1000), &caps);
        for (link, valid) in
            [(u64::MAX, true), (0x2000, true), (0x1000, false), (0x3000, false), (0x2008, false), (1 << 45, false)]
        {
            vmcs12.set(VMCS_LINK_POINTER, link);
            let expected = if valid { Ok(()) } else { Err(GuestStateError(qualification::LINK_POINTER)) };
            assert_eq!(guest_state(&vmcs12, &caps, &memory), expected, "{link:#x}");
        }
    }

    #[test]
    fn pdptes_are_loaded_for_pae_only_and_their_reserved_bits_checked() {
        let (caps, memory) = (skylake_caps(), FakeMemory::new(0x4000));
        memory.write_u64(Gpa(0x1020), 0x2001);
        let load = |cr4, ia32e| load_pdptes(&memory, &caps, CR0_PG, 0x1020, cr4, ia32e);
        assert_eq!(load(CR4_PAE, false), Ok(Some([0x2001, 0, 0, 0])));
        assert_eq!(load(0, false), Ok(None));
        assert_eq!(load(CR4_PAE, true), Ok(None));
        memory.write_u64(Gpa(0x1028), 0x2007);
        assert_eq!(load(CR4_PAE, false), Err(GuestStateError(qualification::PDPTE)));
    }
}
