//! 5-level paging: of the guest hypervisor, where exits switch it on and off, and of the nested guest (SDM Volume 3A,
//! 4.5 "4-Level Paging and 5-Level Paging"). On a processor without it every entry fails.
//!
//! ```text
//!   linear    0 .. 2^48          as with four levels
//!             ALIAS .. + 2^48    the same once more
//!             ABSENT             not present in the table of the fifth level
//! ```

use shadow::controls::Secondary;
use shadow::fields::*;

use super::enter;
use crate::attempt;
use crate::code;
use crate::cpu::*;
use crate::fault::Outcome;
use crate::memory::*;
use crate::nested_paging::{LINEAR, WINDOW_PT, guest_cr3};
use crate::output::Suite;
use crate::vm::{CR4_LA57_BIT, Verdict, Vm};

const EPT_VIOLATION: u64 = 48;
const LA57: u64 = 1 << CR4_LA57_BIT;
const ALIAS: u64 = 1 << 48;
const ABSENT: u64 = 2 << 48;
const NON_CANONICAL: u64 = 1 << 56;
/// Canonical, non-canonical and absent addresses, and those at the borders.
const ADDRESSES: [(&str, u64); 8] = [
    ("low", 0),
    ("alias", ALIAS),
    ("absent", ABSENT),
    ("non-canonical", NON_CANONICAL),
    ("bit-47", 1 << 47),
    ("bit-57", 1 << 57),
    ("high-absent", 0xff00_0000_0000_0000),
    ("high-non-canonical", 0xfe80_0000_0000_0000),
];

static HOST_PML5: Page = Page::new();
static GUEST_PML5: Page = Page::new();

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    const PRESENT_WRITE_USER: u64 = 7;
    for index in [0, 1] {
        HOST_PML5.set(index, host_cr3() | PRESENT_WRITE_USER);
        GUEST_PML5.set(index, guest_cr3() | PRESENT_WRITE_USER);
    }
    host(suite);
    host_addresses(suite);
    guest_accesses(suite);
    guest_registers(suite);
}

/// The guest hypervisor in 5-level paging: its control registers, and its VMX instructions with operands at all these
/// addresses.
fn host(suite: &mut Suite) {
    let mut vm = Vm::new(code!("cpuid"));
    let (entered, returned) = vm.with_five_levels(HOST_PML5.address(), || {
        suite.case("host-cr4", format_args!("{:#x}", cr4()));
        suite.case("host-clear-la57", set_cr4(cr4() & !LA57));
        suite.case("host-clear-vmxe", set_cr4(cr4() & !(1 << 13)));
        for (name, offset) in ADDRESSES {
            operands(suite, name, offset);
            let base = wrmsr(0xc000_0102, offset);
            suite.case(format_args!("host-kernel-gs-base-{name}"), base);
        }
        let _ = wrmsr(0xc000_0102, 0);
    });
    suite.case("host-entered", entered);
    suite.case("host-returned", returned);
}

fn operands(suite: &mut Suite, name: &str, offset: u64) {
    let at = OPERANDS.address() + offset;
    let mut operand = |what: &str, value: [u64; 2], attempt: &dyn Fn() -> Outcome| {
        OPERANDS.set(0, value[0]);
        OPERANDS.set(1, value[1]);
        let outcome = attempt();
        suite.case(format_args!("host-{what}-{name}"), format_args!("{outcome} {:#x}", OPERANDS.get(0)));
    };
    operand("vmptrst", [0, 0], &|| attempt!("vmptrst [rcx]"; in("rcx") at));
    operand("vmptrld", [VMCS.address(), 0], &|| attempt!("vmptrld [rcx]"; in("rcx") at));
    operand("vmclear", [OTHER_VMCS.address(), 0], &|| attempt!("vmclear [rcx]"; in("rcx") at));
    operand("vmread", [0, 0], &|| attempt!("vmread [rcx], rax"; in("rcx") at, in("rax") 0x681e));
    operand("vmwrite", [0x1234, 0], &|| attempt!("vmwrite rax, [rcx]"; in("rcx") at, in("rax") 0x681c));
    operand("invept", [0, 0], &|| attempt!("invept rax, [rcx]"; in("rcx") at, in("rax") 2_u64));
    operand("invvpid", [1, offset], &|| attempt!("invvpid rax, [rcx]"; in("rcx") at, in("rax") 0_u64));
    operand("vmptrst-across-the-end", [0, 0], &|| attempt!("vmptrst [rcx]"; in("rcx") offset.wrapping_sub(4)));
}

/// Host-state fields with such addresses, in either paging mode.
fn host_addresses(suite: &mut Suite) {
    type Set = fn(&mut Vm, u64);
    let fields: [(&str, Set); 4] = [
        ("rip", |vm, offset| _ = vm.set(HOST_RIP, vm.get(HOST_RIP).wrapping_add(offset))),
        ("gdtr", |vm, offset| _ = vm.set(HOST_GDTR_BASE, vm.get(HOST_GDTR_BASE).wrapping_add(offset))),
        ("idtr", |vm, offset| _ = vm.set(HOST_IDTR_BASE, vm.get(HOST_IDTR_BASE).wrapping_add(offset))),
        ("gs", |vm, offset| _ = vm.set(HOST_GS_BASE, offset)),
    ];
    for (field, set) in fields {
        for (name, offset) in [("alias", ALIAS), ("non-canonical", NON_CANONICAL)] {
            let mut vm = Vm::new(code!("cpuid"));
            set(&mut vm, offset);
            let (entered, returned) = vm.with_five_levels(HOST_PML5.address(), || {
                let fault = attempt!("mov rax, [rcx]"; in("rcx") ABSENT, out("rax") _);
                suite.case(format_args!("host-{field}-{name}-fault"), fault);
            });
            suite.case(format_args!("host-{field}-{name}-entered"), entered);
            suite.case(format_args!("host-{field}-{name}-returned"), returned);
            if field != "rip" || offset != ALIAS {
                suite
                    .case(format_args!("host-{field}-{name}-four-levels"), enter(code!("cpuid"), |vm| set(vm, offset)));
            }
        }
    }
}

fn five_levels(vm: &mut Vm) {
    vm.or(GUEST_CR4, LA57).set(GUEST_CR3, GUEST_PML5.address());
}

/// The addresses that the nested guest can access, with EPT12 and without, and those that EPT12 refuses.
fn guest_accesses(suite: &mut Suite) {
    let accesses = [
        ("read", code!("mov rcx, [rax]")),
        ("write", code!("mov [rax], rcx")),
        ("fetch", code!("jmp rax")),
        ("mov-cr4", code!("mov rcx, cr4", "btc rcx, 12", "mov cr4, rcx")),
        ("invlpg", code!("invlpg [rax]", "mov rcx, [rax]")),
    ];
    for (access, code) in accesses {
        for (name, offset) in ADDRESSES {
            for (what, ept, refused) in [("", true, false), ("-refused", true, true), ("-no-ept", false, false)] {
                let mut vm = Vm::new(code);
                five_levels(&mut vm);
                crate::nested_paging::answer_calls();
                let linear = if ept { LINEAR } else { OPERANDS.address() };
                OPERANDS.set(0, crate::nested_paging::VMCALL);
                if !ept {
                    vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
                }
                if refused {
                    WINDOW_PT.set(0, 0);
                    let _ = invept(2, [0; 2]);
                }
                vm.registers.rax = linear.wrapping_add(offset);
                let verdict = vm.run();
                let is_violation = matches!(&verdict, Verdict::Exited(exit) if exit.reason == EPT_VIOLATION);
                let linear = if is_violation { vm.get(GUEST_LINEAR_ADDRESS) } else { 0 };
                let (rcx, cr4) = (vm.registers.rcx, vm.get(GUEST_CR4));
                suite.case(
                    format_args!("guest-{access}-{name}{what}"),
                    format_args!("{verdict} rcx={rcx:#x} linear={linear:#x} cr4={cr4:#x}"),
                );
            }
        }
    }
}

/// RIP beyond four levels, 5-level paging in modes that do not use it, and tables of the other depth.
fn guest_registers(suite: &mut Suite) {
    let code = code!("cpuid");
    for (name, offset) in ADDRESSES {
        let verdict = enter(code, |vm| {
            five_levels(vm);
            vm.set(GUEST_RIP, code.wrapping_add(offset));
        });
        suite.case(format_args!("guest-rip-{name}"), verdict);
        let verdict = enter(code, |vm| {
            five_levels(vm);
            vm.set(GUEST_GDTR_BASE, offset).set(GUEST_FS_BASE, offset).set(GUEST_SYSENTER_EIP, offset);
        });
        suite.case(format_args!("guest-bases-{name}"), verdict);
    }
    suite.case("guest-la57-alone", enter(code, |vm| _ = vm.or(GUEST_CR4, LA57)));
    suite.case("guest-cr3-alone", enter(code, |vm| _ = vm.set(GUEST_CR3, GUEST_PML5.address())));
    suite.case(
        "guest-la57-32-bit",
        enter(code, |vm| {
            super::entry_guest::protected(vm);
            vm.or(GUEST_CR4, LA57);
        }),
    );
}
