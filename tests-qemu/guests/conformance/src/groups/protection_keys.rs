//! Protection keys of the pages that hold operands (SDM Volume 3A, 4.6.2 "Protection Keys"): VMX instructions access
//! them as a supervisor. A processor without keys refuses CR4.PKE and CR4.PKS.

use shadow::registers::CR0_WP;

use crate::attempt;
use crate::cpu::*;
use crate::fault::Outcome;
use crate::memory::{OPERANDS, VMCS, WINDOW, set_window};
use crate::output::Suite;
use crate::vm::{load_fresh, prepare_host};

const IA32_PKRS: u32 = 0x6e1;
const PAGE: usize = 5;
const KEY: u64 = 1;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    const USER: u64 = 1 << 2;
    load_fresh(&VMCS);
    for (page, user) in [("user", USER), ("supervisor", 0)] {
        set_window(PAGE, OPERANDS.address() | 3 | user | KEY << 59);
        for (feature, bit) in [("none", 0), ("pke", 1 << 22), ("pks", 1 << 24), ("both", 1 << 22 | 1 << 24)] {
            for (what, rights) in [("all", 0), ("no-access", 1), ("no-write", 2), ("nothing", 3)] {
                for (wp, cr0_wp) in [("wp", CR0_WP), ("no-wp", 0)] {
                    let enabled = set_cr4(cr4() | bit);
                    let pkru = attempt!("wrpkru"; in("eax") rights << (2 * KEY), in("ecx") 0, in("edx") 0);
                    let pkrs = wrmsr(IA32_PKRS, rights << (2 * KEY));
                    let _ = set_cr0(cr0() & !CR0_WP | cr0_wp);
                    let (read, written) = accesses();
                    let _ = attempt!("wrpkru"; in("eax") 0, in("ecx") 0, in("edx") 0);
                    let _ = wrmsr(IA32_PKRS, 0);
                    prepare_host();
                    suite.case(
                        format_args!("{page}-{feature}-{what}-{wp}"),
                        format_args!("{enabled} {pkru} {pkrs} read={read} written={written}"),
                    );
                }
            }
        }
    }
    set_window(PAGE, 0);
}

/// An instruction that reads its operand, and one that writes it.
fn accesses() -> (Outcome, Outcome) {
    let at = WINDOW + PAGE as u64 * 4096;
    OPERANDS.set(0, VMCS.address());
    (attempt!("vmptrld [rcx]"; in("rcx") at), attempt!("vmptrst [rcx]"; in("rcx") at))
}
