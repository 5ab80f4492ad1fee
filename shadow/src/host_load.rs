//! The guest hypervisor's state after an exit that it gets: VMCS12's host state into vmcs01's guest state (SDM 28.5 "Loading Host
//! State").

use crate::caps::VmxCaps;
use crate::check::load_pdptes;
use crate::controls::ExitControls;
use crate::event::BLOCKING_BY_NMI;
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::vmcs12::Vmcs12;

/// Reasons of a VMX abort (SDM 28.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum VmxAbort {
    /// 1: a failure while saving guest MSRs.
    SavingGuestMsrs = 1,
    /// 2: host checking of the PDPTEs failed.
    HostPdptes = 2,
    /// 4: a failure on loading host MSRs.
    LoadingHostMsrs = 4,
}

/// What the nested guest left in registers that VMCS12's exit controls do not load.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeftBehind {
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Physical NMIs are blocked.
    pub nmi_blocked: bool,
}

impl LeftBehind {
    /// Reads it from vmcs02, which must be current; registers that are loaded anyway are not read.
    pub fn read(vmcs02: &impl VmcsAccess, vmcs12: &Vmcs12, nmi_blocked: bool) -> Self {
        let exit = ExitControls::from_bits_retain(vmcs12.get(EXIT_CONTROLS));
        Self {
            pat: if exit.contains(ExitControls::LOAD_PAT) { 0 } else { vmcs02.read(GUEST_PAT) },
            efer: if exit.contains(ExitControls::LOAD_EFER) { 0 } else { vmcs02.read(GUEST_EFER) },
            nmi_blocked,
        }
    }
}

mod access_rights {
    pub const CODE_64: u32 = 0xa09b;
    pub const CODE_32: u32 = 0xc09b;
    pub const DATA: u32 = 0xc093;
    pub const BUSY_TSS: u32 = 0x8b;
    pub const UNUSABLE: u32 = 1 << 16;
}

const EFER_LME_LMA: u64 = 0x500;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_PAE: u64 = 1 << 5;

/// Loads the state. vmcs01 must be current.
pub fn load_host_state(
    vmcs01: &mut impl VmcsAccess,
    vmcs12: &Vmcs12,
    caps: &VmxCaps,
    memory: &impl GuestMemory,
    left: &LeftBehind,
) -> Result<(), VmxAbort> {
    let exit = ExitControls::from_bits_retain(vmcs12.get(EXIT_CONTROLS));
    let is_64 = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    control_registers(vmcs01, vmcs12, is_64);
    msrs(vmcs01, vmcs12, exit, is_64, left);
    segments(vmcs01, vmcs12, is_64);
    descriptor_tables(vmcs01, vmcs12);

    vmcs01.write(GUEST_RIP, vmcs12.get(HOST_RIP));
    vmcs01.write(GUEST_RSP, vmcs12.get(HOST_RSP));
    vmcs01.write(GUEST_RFLAGS, 2);
    vmcs01.write(GUEST_DR7, 0x400);
    vmcs01.write(GUEST_PENDING_DEBUG, 0);
    // The activity state is active already: the guest hypervisor executed VMLAUNCH or VMRESUME.
    vmcs01.write(GUEST_INTERRUPTIBILITY, if left.nmi_blocked { BLOCKING_BY_NMI } else { 0 });

    if is_64 {
        return Ok(());
    }
    let cr4 = vmcs12.get(HOST_CR4);
    match load_pdptes(memory, caps, vmcs12.get(HOST_CR0), vmcs12.get(HOST_CR3), cr4, is_64) {
        Ok(None) => Ok(()),
        Ok(Some(pdptes)) => {
            for (field, entry) in GUEST_PDPTES.into_iter().zip(pdptes) {
                vmcs01.write(field, entry);
            }
            Ok(())
        }
        Err(_) => Err(VmxAbort::HostPdptes),
    }
}

fn control_registers(vmcs01: &mut impl VmcsAccess, vmcs12: &Vmcs12, is_64: bool) {
    let cr4 = vmcs12.get(HOST_CR4);
    let cr4 = if is_64 { cr4 | CR4_PAE } else { cr4 & !CR4_PCIDE };
    // The read shadows stay: they count only for bits that VMX operation fixes, and those are the same in every valid host state.
    vmcs01.write(GUEST_CR0, vmcs12.get(HOST_CR0));
    vmcs01.write(GUEST_CR3, vmcs12.get(HOST_CR3));
    vmcs01.write(GUEST_CR4, cr4);
}

fn msrs(vmcs01: &mut impl VmcsAccess, vmcs12: &Vmcs12, exit: ExitControls, is_64: bool, left: &LeftBehind) {
    let efer = if exit.contains(ExitControls::LOAD_EFER) { vmcs12.get(HOST_EFER) } else { left.efer };
    let efer = if is_64 { efer | EFER_LME_LMA } else { efer & !EFER_LME_LMA };
    let pat = if exit.contains(ExitControls::LOAD_PAT) { vmcs12.get(HOST_PAT) } else { left.pat };
    vmcs01.write(GUEST_EFER, efer);
    vmcs01.write(GUEST_PAT, pat);
    vmcs01.write(GUEST_DEBUGCTL, 0);
    vmcs01.write(GUEST_SYSENTER_CS, vmcs12.get(HOST_SYSENTER_CS));
    vmcs01.write(GUEST_SYSENTER_ESP, vmcs12.get(HOST_SYSENTER_ESP));
    vmcs01.write(GUEST_SYSENTER_EIP, vmcs12.get(HOST_SYSENTER_EIP));
    // vmcs01's "IA-32e mode guest" stays: the host-state checks hold the address-space size against the mode of the guest hypervisor, and
    // that cannot leave its mode in VMX operation, where CR0.PG is fixed.
}

struct DataSegment {
    selector: (Field<u16>, Field<u16>),
    base: Field<u64>,
    host_base: Option<Field<u64>>,
    limit: Field<u32>,
    access_rights: Field<u32>,
}

const DATA_SEGMENTS: [DataSegment; 5] = [
    DataSegment {
        selector: (GUEST_ES_SELECTOR, HOST_ES_SELECTOR),
        base: GUEST_ES_BASE,
        host_base: None,
        limit: GUEST_ES_LIMIT,
        access_rights: GUEST_ES_ACCESS_RIGHTS,
    },
    DataSegment {
        selector: (GUEST_SS_SELECTOR, HOST_SS_SELECTOR),
        base: GUEST_SS_BASE,
        host_base: None,
        limit: GUEST_SS_LIMIT,
        access_rights: GUEST_SS_ACCESS_RIGHTS,
    },
    DataSegment {
        selector: (GUEST_DS_SELECTOR, HOST_DS_SELECTOR),
        base: GUEST_DS_BASE,
        host_base: None,
        limit: GUEST_DS_LIMIT,
        access_rights: GUEST_DS_ACCESS_RIGHTS,
    },
    DataSegment {
        selector: (GUEST_FS_SELECTOR, HOST_FS_SELECTOR),
        base: GUEST_FS_BASE,
        host_base: Some(HOST_FS_BASE),
        limit: GUEST_FS_LIMIT,
        access_rights: GUEST_FS_ACCESS_RIGHTS,
    },
    DataSegment {
        selector: (GUEST_GS_SELECTOR, HOST_GS_SELECTOR),
        base: GUEST_GS_BASE,
        host_base: Some(HOST_GS_BASE),
        limit: GUEST_GS_LIMIT,
        access_rights: GUEST_GS_ACCESS_RIGHTS,
    },
];

fn segments(vmcs01: &mut impl VmcsAccess, vmcs12: &Vmcs12, is_64: bool) {
    for segment in &DATA_SEGMENTS {
        let selector = vmcs12.get(segment.selector.1);
        vmcs01.write(segment.selector.0, selector);
        vmcs01.write(segment.base, segment.host_base.map_or(0, |base| vmcs12.get(base)));
        vmcs01.write(segment.limit, u32::MAX);
        vmcs01.write(segment.access_rights, if selector == 0 { access_rights::UNUSABLE } else { access_rights::DATA });
    }
    vmcs01.write(GUEST_CS_SELECTOR, vmcs12.get(HOST_CS_SELECTOR));
    vmcs01.write(GUEST_CS_BASE, 0);
    vmcs01.write(GUEST_CS_LIMIT, u32::MAX);
    vmcs01.write(GUEST_CS_ACCESS_RIGHTS, if is_64 { access_rights::CODE_64 } else { access_rights::CODE_32 });
}

fn descriptor_tables(vmcs01: &mut impl VmcsAccess, vmcs12: &Vmcs12) {
    vmcs01.write(GUEST_TR_SELECTOR, vmcs12.get(HOST_TR_SELECTOR));
    vmcs01.write(GUEST_TR_BASE, vmcs12.get(HOST_TR_BASE));
    vmcs01.write(GUEST_TR_LIMIT, 0x67);
    vmcs01.write(GUEST_TR_ACCESS_RIGHTS, access_rights::BUSY_TSS);
    vmcs01.write(GUEST_LDTR_SELECTOR, 0);
    vmcs01.write(GUEST_LDTR_ACCESS_RIGHTS, access_rights::UNUSABLE);
    vmcs01.write(GUEST_GDTR_BASE, vmcs12.get(HOST_GDTR_BASE));
    vmcs01.write(GUEST_GDTR_LIMIT, 0xffff);
    vmcs01.write(GUEST_IDTR_BASE, vmcs12.get(HOST_IDTR_BASE));
    vmcs01.write(GUEST_IDTR_LIMIT, 0xffff);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{FakeMemory, FakeVmcs, skylake_caps};
    use ept::Gpa;

    fn loaded(change: impl FnOnce(&mut Vmcs12)) -> FakeVmcs {
        let caps = skylake_caps();
        let mut vmcs12 = Vmcs12::new(Gpa(0), &caps.offered());
        let exit = ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER;
        vmcs12.set(EXIT_CONTROLS, caps.exit.must_be_1 | exit.bits());
        vmcs12.set(HOST_EFER, 0xd01);
        vmcs12.set(HOST_CR0, 0x8005_0033);
        vmcs12.set(HOST_CR4, 0x2020);
        vmcs12.set(HOST_CS_SELECTOR, 0x10);
        vmcs12.set(HOST_GS_BASE, 0xffff_8880_0000_0000);
        change(&mut vmcs12);
        let mut vmcs01 = FakeVmcs::new(&caps);
        let left = LeftBehind { pat: 0x0007_0406_0007_0406, efer: 0x500, nmi_blocked: true };
        load_host_state(&mut vmcs01, &vmcs12, &caps, &FakeMemory::new(0x1000), &left).unwrap();
        vmcs01
    }

    #[test]
    fn a_64_bit_guest_hypervisor_gets_64_bit_state() {
        let vmcs01 = loaded(|_| ());
        assert_eq!(vmcs01.read(GUEST_CS_ACCESS_RIGHTS), 0xa09b);
        assert_eq!(vmcs01.read(GUEST_SS_ACCESS_RIGHTS), access_rights::UNUSABLE, "a null selector");
        assert_eq!(vmcs01.read(GUEST_GS_BASE), 0xffff_8880_0000_0000);
        assert_eq!(vmcs01.read(GUEST_EFER), 0xd01);
        assert_eq!(vmcs01.read(GUEST_RFLAGS), 2);
        assert_eq!(vmcs01.read(GUEST_DR7), 0x400);
        assert_eq!(vmcs01.read(GUEST_GDTR_LIMIT), 0xffff);
        assert_eq!(vmcs01.read(GUEST_INTERRUPTIBILITY), BLOCKING_BY_NMI);
    }

    #[test]
    fn a_register_that_is_not_loaded_stays_as_the_nested_guest_left_it() {
        let vmcs01 = loaded(|_| ());
        assert_eq!(vmcs01.read(GUEST_PAT), 0x0007_0406_0007_0406);
    }

    #[test]
    fn a_32_bit_guest_hypervisor_gets_32_bit_state() {
        let vmcs01 = loaded(|vmcs12| {
            let exit = vmcs12.get(EXIT_CONTROLS) & !ExitControls::HOST_ADDRESS_SPACE_SIZE.bits();
            vmcs12.set(EXIT_CONTROLS, exit & !ExitControls::LOAD_EFER.bits());
        });
        assert_eq!(vmcs01.read(GUEST_CS_ACCESS_RIGHTS), 0xc09b);
        assert_eq!(vmcs01.read(GUEST_EFER), 0, "LMA and LME follow the address-space size");
    }
}
