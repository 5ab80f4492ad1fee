//! VM entry's checks of the host-state area (SDM 27.2.2 to 27.2.4): VM-instruction error 8. Values that pass are loaded
//! by the exit.

use shadow::controls::{EntryControls, ExitControls};
use shadow::fields::*;

use super::{as_it_is, flip, values};
use crate::output::Suite;
use crate::vm::{CR4_LA57_BIT, CR4_LASS_BIT, Vm};

const CANONICAL: [u64; 8] =
    [0, 1, 0x7fff_ffff_ffff, 1 << 47, 0x1_0000_0000_0000, 0xffff_7fff_ffff_ffff, 0xffff_8000_0000_0000, 1 << 63];

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    // With CR0.PE, CR0.PG or CR4.PAE clear, the exit could not return. They are fixed or required, so these entries
    // fail.
    flip(suite, "cr0", HOST_CR0, 0..64, as_it_is);
    // With LASS the exit could not return either, and with LA57 only to tables of five levels.
    let comes_back = |bit: &u32| *bit != CR4_LASS_BIT && *bit != CR4_LA57_BIT;
    flip(suite, "cr4", HOST_CR4, (0..64).filter(comes_back), as_it_is);
    flip(suite, "cr3", HOST_CR3, [0, 1, 2, 3, 4, 5, 6, 11].into_iter().chain(40..64), as_it_is);
    selectors(suite);
    for (name, field) in [
        ("fs-base", HOST_FS_BASE),
        ("gs-base", HOST_GS_BASE),
        ("tr-base", HOST_TR_BASE),
        ("gdtr-base", HOST_GDTR_BASE),
        ("idtr-base", HOST_IDTR_BASE),
        ("sysenter-esp", HOST_SYSENTER_ESP),
        ("sysenter-eip", HOST_SYSENTER_EIP),
    ] {
        values(suite, name, field, CANONICAL, as_it_is);
    }
    values(suite, "rip", HOST_RIP, [1 << 47, 0x1_0000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63], as_it_is);
    values(suite, "sysenter-cs", HOST_SYSENTER_CS, [0, 8, 0xffff_ffff], as_it_is);
    msrs(suite);
    address_space(suite);
}

fn selectors(suite: &mut Suite) {
    for (name, field) in [
        ("es", HOST_ES_SELECTOR),
        ("cs", HOST_CS_SELECTOR),
        ("ss", HOST_SS_SELECTOR),
        ("ds", HOST_DS_SELECTOR),
        ("fs", HOST_FS_SELECTOR),
        ("gs", HOST_GS_SELECTOR),
        ("tr", HOST_TR_SELECTOR),
    ] {
        flip(suite, name, field, 0..3, as_it_is);
        values(suite, name, field, [0], as_it_is);
    }
}

fn msrs(suite: &mut Suite) {
    let no_pat = |vm: &mut Vm| _ = vm.clear(EXIT_CONTROLS, ExitControls::LOAD_PAT);
    const PAT: u64 = 0x0007_0406_0007_0406;
    for byte in 0..8 {
        let with = |value: u64| PAT & !(0xff << (8 * byte)) | value << (8 * byte);
        values(suite, format_args!("pat-byte-{byte}"), HOST_PAT, (0..9).chain([0xff]).map(with), as_it_is);
    }
    values(suite, "unused-pat", HOST_PAT, [2, 3, u64::MAX], no_pat);
    flip(suite, "efer", HOST_EFER, 0..64, as_it_is);
    flip(suite, "unused-efer", HOST_EFER, 0..64, |vm| _ = vm.clear(EXIT_CONTROLS, ExitControls::LOAD_EFER));
}

/// "Host address-space size" with other modes, and values of CR4 and RIP.
fn address_space(suite: &mut Suite) {
    let legacy = |vm: &mut Vm| {
        vm.clear(EXIT_CONTROLS, ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::LOAD_EFER);
    };
    let both_legacy = |vm: &mut Vm| {
        legacy(vm);
        vm.clear(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
    };
    values(suite, "legacy-rip", HOST_RIP, [0, 1 << 32], legacy);
    values(suite, "legacy-ss", HOST_SS_SELECTOR, [0, 0x10], legacy);
    values(suite, "both-legacy-rip", HOST_RIP, [0, 1 << 32], both_legacy);
    flip(suite, "both-legacy-cr4", HOST_CR4, [5, 17], both_legacy);
}
