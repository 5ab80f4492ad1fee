//! "Virtualize APIC accesses" and "use TPR shadow": accesses to the APIC-access page (SDM 30.4).

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use crate::code;
use crate::cpu::invept;
use crate::memory::{SPARE, VIRTUAL_APIC};
use crate::nested_paging::{LEAF, WINDOW_PT};
use crate::output::Suite;
use crate::vm::Vm;

/// The window's page that EPT12 maps to the APIC-access page.
const PAGE: usize = 1;

/// Reads and writes every register's offset, also with other widths, with and without TPR shadow.
pub fn run(suite: &mut Suite) {
    let accesses = [
        ("read", code!("mov eax, [rcx]")),
        ("write", code!("mov dword ptr [rcx], 0x30")),
        ("read-8", code!("mov al, [rcx]")),
        ("write-64", code!("mov qword ptr [rcx], 0")),
        ("read-write", code!("lock or dword ptr [rcx], 0x20")),
        ("push", code!("lea rsp, [rcx + 8]", "push 0")),
    ];
    for tpr_shadow in [false, true] {
        for (access, code) in accesses {
            for offset in (0..0x400_u64).step_by(0x10).chain([0x81, 0x84, 0x3fc, 0x400, 0xff8]) {
                one(suite, access, code, offset, tpr_shadow);
            }
        }
    }
}

fn one(suite: &mut Suite, access: &str, code: u64, offset: u64, tpr_shadow: bool) {
    let mut vm = Vm::new(code);
    vm.set(APIC_ACCESS_ADDRESS, SPARE.address());
    vm.or(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES);
    if tpr_shadow {
        vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
    }
    VIRTUAL_APIC.set_byte(0x80, 0x50);
    WINDOW_PT.set(PAGE, SPARE.address() | LEAF);
    let _ = invept(2, [0; 2]);
    vm.registers.rcx = 0x4000_1000 + offset;
    let verdict = vm.run();
    let (rax, vtpr, memory) = (vm.registers.rax, VIRTUAL_APIC.get(0x80 / 8), SPARE.get(0x80 / 8));
    suite.case(
        format_args!("{access}-{offset:#x}-tpr-shadow-{tpr_shadow}"),
        format_args!("{verdict} rax={rax:#x} vtpr={vtpr:#x} memory={memory:#x}"),
    );
}
