//! Checks on the host-state area and on its relation to the mode of the processor (SDM 27.2.2 to 27.2.4).

use super::{Check, pat_is_valid, require};
use crate::caps::VmxCaps;
use crate::controls::{EntryControls, ExitControls};
use crate::fields::*;
use crate::index::FieldSet;
use crate::registers::*;
use crate::vmcs12::Vmcs12;

/// Whether the guest hypervisor executes VMLAUNCH or VMRESUME in IA-32e mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostMode {
    /// IA32_EFER.LMA is 1.
    Ia32e,
    /// IA32_EFER.LMA is 0.
    Legacy,
}

impl HostMode {
    /// The bits of a register operand of a VMX instruction.
    #[inline(always)]
    pub const fn operand_mask(self) -> u64 {
        match self {
            Self::Ia32e => u64::MAX,
            Self::Legacy => 0xffff_ffff,
        }
    }
}

/// All host-state checks. Failing one is VM-instruction error 8.
///
/// # Errors
///
/// The first check that fails.
pub fn host_state(vmcs12: &Vmcs12, caps: &VmxCaps, mode: HostMode) -> Check {
    let exit = vmcs12.get(EXIT_CONTROLS);
    let is_64 = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
    registers(vmcs12, caps)?;
    msrs(vmcs12, exit, is_64)?;
    passing_registers(vmcs12, caps, exit, is_64)?;
    segments(vmcs12, caps, is_64)?;
    address_space(vmcs12, mode, is_64)
}

/// The checks of [`HOST_BASES`] alone, for a VMCS12 whose other fields have passed.
///
/// # Errors
///
/// The first check that fails.
pub fn host_bases(vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let bases = [vmcs12.get(HOST_FS_BASE), vmcs12.get(HOST_GS_BASE)];
    require(bases.into_iter().all(|base| caps.is_canonical(base)), "host base address")
}

/// Host state that a guest hypervisor writes whenever it runs another of its processes.
pub const HOST_BASES: FieldSet = FieldSet::of(&[HOST_FS_BASE.id(), HOST_GS_BASE.id()]);

fn registers(vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let (cr0, cr4) = (vmcs12.get(HOST_CR0), vmcs12.get(HOST_CR4));
    require(is_fixed(cr0, caps.cr0_fixed0, caps.cr0_fixed1), "host CR0: fixed bits")?;
    require(is_fixed(cr4, caps.cr4_fixed0, caps.cr4_fixed1), "host CR4: fixed bits")?;
    require(cr4 & CR4_CET == 0 || cr0 & CR0_WP != 0, "host CR4.CET without CR0.WP")?;
    require(caps.is_physical(vmcs12.get(HOST_CR3)), "host CR3")?;
    require(caps.is_canonical(vmcs12.get(HOST_SYSENTER_ESP)), "host IA32_SYSENTER_ESP")?;
    require(caps.is_canonical(vmcs12.get(HOST_SYSENTER_EIP)), "host IA32_SYSENTER_EIP")
}

const LONG_MODE: u64 = EFER_LME | EFER_LMA;

fn msrs(vmcs12: &Vmcs12, exit: ExitControls, is_64: bool) -> Check {
    if exit.contains(ExitControls::LOAD_PAT) {
        require(pat_is_valid(vmcs12.get(HOST_PAT)), "host IA32_PAT")?;
    }
    if exit.contains(ExitControls::LOAD_EFER) {
        let efer = vmcs12.get(HOST_EFER);
        require(efer & !EFER_DEFINED == 0, "host IA32_EFER: reserved bits")?;
        require(efer & LONG_MODE == if is_64 { LONG_MODE } else { 0 }, "host IA32_EFER: LMA and LME")?;
    }
    Ok(())
}

/// The checks of the registers of [`crate::passing`]. The processor repeats them on vmcs02, except those that depend on
/// the address-space size.
fn passing_registers(vmcs12: &Vmcs12, caps: &VmxCaps, exit: ExitControls, is_64: bool) -> Check {
    if exit.contains(ExitControls::LOAD_CET) {
        let (s_cet, ssp) = (vmcs12.get(HOST_S_CET), vmcs12.get(HOST_SSP));
        require(caps.is_canonical(s_cet) && s_cet_is_valid(s_cet), "host IA32_S_CET")?;
        require(caps.is_canonical(ssp) && ssp.is_multiple_of(4), "host SSP")?;
        require(is_64 || (s_cet | ssp) >> 32 == 0, "32-bit host with 64-bit CET state")?;
        require(caps.is_canonical(vmcs12.get(HOST_SSP_TABLE)), "host IA32_INTERRUPT_SSP_TABLE_ADDR")?;
    }
    require(!exit.contains(ExitControls::LOAD_PKRS) || vmcs12.get(HOST_PKRS) >> 32 == 0, "host IA32_PKRS")
}

/// Reserved bits of IA32_S_CET, and SUPPRESS with TRACKER (SDM Volume 1, 17.3.1 "State and MSRs for CET").
const fn s_cet_is_valid(s_cet: u64) -> bool {
    const RESERVED: u64 = 0x3c0;
    const SUPPRESS_AND_TRACKER: u64 = 3 << 10;
    s_cet & RESERVED == 0 && s_cet & SUPPRESS_AND_TRACKER != SUPPRESS_AND_TRACKER
}

fn segments(vmcs12: &Vmcs12, caps: &VmxCaps, is_64: bool) -> Check {
    /// RPL and TI.
    const NOT_INDEX: u16 = 7;
    for field in [
        HOST_ES_SELECTOR,
        HOST_CS_SELECTOR,
        HOST_SS_SELECTOR,
        HOST_DS_SELECTOR,
        HOST_FS_SELECTOR,
        HOST_GS_SELECTOR,
        HOST_TR_SELECTOR,
    ] {
        require(vmcs12.get(field) & NOT_INDEX == 0, "host selector: RPL or TI")?;
    }
    require(vmcs12.get(HOST_CS_SELECTOR) != 0, "host CS selector")?;
    require(vmcs12.get(HOST_TR_SELECTOR) != 0, "host TR selector")?;
    require(is_64 || vmcs12.get(HOST_SS_SELECTOR) != 0, "host SS selector")?;
    for field in [HOST_FS_BASE, HOST_GS_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_TR_BASE] {
        require(caps.is_canonical(vmcs12.get(field)), "host base address")?;
    }
    Ok(())
}

fn address_space(vmcs12: &Vmcs12, mode: HostMode, is_64: bool) -> Check {
    let (cr4, rip) = (vmcs12.get(HOST_CR4), vmcs12.get(HOST_RIP));
    let ia32e_guest = vmcs12.get(ENTRY_CONTROLS).contains(EntryControls::IA32E_MODE_GUEST);
    match mode {
        HostMode::Legacy => require(!ia32e_guest && !is_64, "64-bit guest or host entered from legacy mode")?,
        HostMode::Ia32e => require(is_64, "32-bit host entered from IA-32e mode")?,
    }
    if is_64 {
        require(cr4 & CR4_PAE != 0, "64-bit host without CR4.PAE")?;
        // RIP is accessed in the paging mode that the exit loads.
        require(is_canonical(rip, linear_bits_of(cr4)), "host RIP")
    } else {
        require(!ia32e_guest, "IA-32e mode guest with a 32-bit host")?;
        require(cr4 & CR4_PCIDE == 0, "32-bit host with CR4.PCIDE")?;
        require(rip >> 32 == 0, "host RIP")
    }
}

/// Whether a control register has its fixed bits (SDM A.7 and A.8).
pub const fn is_fixed(value: u64, fixed0: u64, fixed1: u64) -> bool {
    value & fixed0 == fixed0 && value & !fixed1 == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::CapabilityWord;
    use crate::caps::Policy;
    use crate::check::Violation;
    use crate::fake::skylake_caps;
    use ept::Gpa;

    fn plain(caps: &VmxCaps) -> Vmcs12 {
        let mut vmcs12 = Vmcs12::new(Gpa(0), caps);
        vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(caps).0 | ExitControls::HOST_ADDRESS_SPACE_SIZE);
        vmcs12.set(HOST_CR0, 0x8000_0031);
        vmcs12.set(HOST_CR4, 0x2020);
        vmcs12.set(HOST_CS_SELECTOR, 0x10);
        vmcs12.set(HOST_TR_SELECTOR, 0x40);
        vmcs12
    }

    fn verdict(change: impl FnOnce(&mut Vmcs12)) -> Result<(), Violation> {
        let caps = skylake_caps().offered(&Policy::EVERYTHING);
        let mut vmcs12 = plain(&caps);
        change(&mut vmcs12);
        host_state(&vmcs12, &caps, HostMode::Ia32e)
    }

    #[test]
    fn a_plain_64_bit_host_passes() {
        assert_eq!(verdict(|_| ()), Ok(()));
    }

    #[test]
    fn each_violation_is_found() {
        type Case = (&'static str, fn(&mut Vmcs12));
        let cases: &[Case] = &[
            ("host CR0: fixed bits", |v| v.set(HOST_CR0, 0x31)),
            ("host CR4: fixed bits", |v| v.set(HOST_CR4, 0x20)),
            ("host CR4: fixed bits", |v| v.set(HOST_CR4, 1 << 15 | 0x2020)),
            ("host CR3", |v| v.set(HOST_CR3, 1 << 40)),
            ("host IA32_SYSENTER_EIP", |v| v.set(HOST_SYSENTER_EIP, 1 << 47)),
            ("host selector: RPL or TI", |v| v.set(HOST_TR_SELECTOR, 0x44)),
            ("host base address", |v| v.set(HOST_FS_BASE, 1 << 47)),
            ("host base address", |v| v.set(HOST_GDTR_BASE, 1 << 47)),
            ("host base address", |v| v.set(HOST_IDTR_BASE, 1 << 47)),
            ("host base address", |v| v.set(HOST_TR_BASE, 1 << 47)),
            ("host IA32_SYSENTER_ESP", |v| v.set(HOST_SYSENTER_ESP, 1 << 47)),
            ("host selector: RPL or TI", |v| v.set(HOST_DS_SELECTOR, 3)),
            ("host CS selector", |v| v.set(HOST_CS_SELECTOR, 0)),
            ("host TR selector", |v| v.set(HOST_TR_SELECTOR, 0)),
            ("host base address", |v| v.set(HOST_GS_BASE, 1 << 63)),
            ("64-bit host without CR4.PAE", |v| v.set(HOST_CR4, 0x2000)),
            ("host RIP", |v| v.set(HOST_RIP, 1 << 50)),
            ("host SS selector", |v| v.set(EXIT_CONTROLS, ExitControls::empty())),
            ("32-bit host entered from IA-32e mode", |v| {
                v.set(EXIT_CONTROLS, ExitControls::empty());
                v.set(HOST_SS_SELECTOR, 0x18);
            }),
        ];
        for (name, change) in cases {
            assert_eq!(verdict(change), Err(Violation(name)));
        }
    }

    #[test]
    fn addresses_are_canonical_by_the_processor_and_rip_by_the_mode_that_the_exit_loads() {
        let caps = VmxCaps { linear_bits: 57, cr4_fixed1: u64::MAX, ..skylake_caps().offered(&Policy::EVERYTHING) };
        let verdict = |change: fn(&mut Vmcs12)| {
            let mut vmcs12 = plain(&caps);
            change(&mut vmcs12);
            host_state(&vmcs12, &caps, HostMode::Ia32e)
        };
        assert_eq!(verdict(|v| v.set(HOST_GS_BASE, 1 << 47)), Ok(()));
        assert_eq!(verdict(|v| v.set(HOST_GS_BASE, 1 << 56)), Err(Violation("host base address")));
        assert_eq!(verdict(|v| v.set(HOST_RIP, 1 << 47)), Err(Violation("host RIP")));
        let five_levels = |v: &mut Vmcs12| {
            v.set(HOST_CR4, v.get(HOST_CR4) | CR4_LA57);
            v.set(HOST_RIP, 1 << 47);
        };
        assert_eq!(verdict(five_levels), Ok(()));
    }

    #[test]
    fn passing_registers_are_checked_only_when_loaded() {
        type Case = (&'static str, ExitControls, fn(&mut Vmcs12));
        let cases: &[Case] = &[
            ("host IA32_S_CET", ExitControls::LOAD_CET, |v| v.set(HOST_S_CET, 1 << 6)),
            ("host IA32_S_CET", ExitControls::LOAD_CET, |v| v.set(HOST_S_CET, 3 << 10)),
            ("host IA32_S_CET", ExitControls::LOAD_CET, |v| v.set(HOST_S_CET, 1 << 47)),
            ("host SSP", ExitControls::LOAD_CET, |v| v.set(HOST_SSP, 2)),
            ("host IA32_INTERRUPT_SSP_TABLE_ADDR", ExitControls::LOAD_CET, |v| v.set(HOST_SSP_TABLE, 1 << 47)),
            ("host IA32_PKRS", ExitControls::LOAD_PKRS, |v| v.set(HOST_PKRS, 1 << 32)),
        ];
        let caps = skylake_caps();
        let may_be_1 = caps.exit.may_be_1 | crate::passing::EXIT.bits();
        let caps =
            VmxCaps { exit: crate::controls::Allowed { may_be_1, ..caps.exit }, ..caps }.offered(&Policy::EVERYTHING);
        for (name, control, change) in cases {
            let mut vmcs12 = plain(&caps);
            change(&mut vmcs12);
            assert_eq!(host_state(&vmcs12, &caps, HostMode::Ia32e), Ok(()));
            vmcs12.set(EXIT_CONTROLS, vmcs12.get(EXIT_CONTROLS) | *control);
            assert_eq!(host_state(&vmcs12, &caps, HostMode::Ia32e), Err(Violation(name)));
        }
    }

    #[test]
    fn loaded_msrs_are_checked_only_when_loaded() {
        assert_eq!(verdict(|v| v.set(HOST_PAT, 2)), Ok(()));
        let load = |v: &mut Vmcs12, control: ExitControls| v.set(EXIT_CONTROLS, v.get(EXIT_CONTROLS) | control);
        assert!(
            verdict(|v| {
                load(v, ExitControls::LOAD_PAT);
                v.set(HOST_PAT, 2)
            })
            .is_err()
        );
        assert!(verdict(|v| load(v, ExitControls::LOAD_EFER)).is_err());
        assert_eq!(
            verdict(|v| {
                load(v, ExitControls::LOAD_EFER);
                v.set(HOST_EFER, 0xd01)
            }),
            Ok(())
        );
    }

    #[test]
    fn a_32_bit_host_has_its_own_rules() {
        let caps = skylake_caps().offered(&Policy::EVERYTHING);
        let verdict = |mode, change: fn(&mut Vmcs12)| {
            let mut vmcs12 = Vmcs12::new(Gpa(0), &caps);
            vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(&caps).0);
            vmcs12.set(HOST_CR0, 0x8000_0031);
            vmcs12.set(HOST_CR4, 0x2000);
            for field in [HOST_CS_SELECTOR, HOST_SS_SELECTOR, HOST_TR_SELECTOR] {
                vmcs12.set(field, 0x10);
            }
            change(&mut vmcs12);
            host_state(&vmcs12, &caps, mode)
        };
        let refused = |name| Err(Violation(name));
        assert_eq!(verdict(HostMode::Legacy, |_| ()), Ok(()));
        assert_eq!(verdict(HostMode::Ia32e, |_| ()), refused("32-bit host entered from IA-32e mode"));
        let long_guest: fn(&mut Vmcs12) = |v| v.set(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
        assert_eq!(verdict(HostMode::Legacy, long_guest), refused("64-bit guest or host entered from legacy mode"));
        assert_eq!(verdict(HostMode::Legacy, |v| v.set(HOST_CR4, 0x2_2000)), refused("32-bit host with CR4.PCIDE"));
        assert_eq!(verdict(HostMode::Legacy, |v| v.set(HOST_RIP, 1 << 32)), refused("host RIP"));
        assert_eq!(verdict(HostMode::Legacy, |v| v.set(HOST_RIP, 0xffff_ffff)), Ok(()));
        assert_eq!(verdict(HostMode::Legacy, |v| v.set(HOST_SS_SELECTOR, 0)), refused("host SS selector"));
    }

    #[test]
    fn loaded_efer_agrees_with_the_address_space_and_has_no_reserved_bit() {
        let with_efer = |efer| {
            verdict(|v| {
                v.set(EXIT_CONTROLS, v.get(EXIT_CONTROLS) | ExitControls::LOAD_EFER);
                v.set(HOST_EFER, efer);
            })
        };
        assert_eq!(with_efer(0x500), Ok(()));
        assert_eq!(with_efer(0x502), Err(Violation("host IA32_EFER: reserved bits")));
        for efer in [0, 0x100, 0x400] {
            assert_eq!(with_efer(efer), Err(Violation("host IA32_EFER: LMA and LME")), "{efer:#x}");
        }
    }
}
