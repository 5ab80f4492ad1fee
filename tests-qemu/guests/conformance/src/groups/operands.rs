//! Operand forms of the VMX instructions, and the faults of their memory operands (SDM 31.3; Volume 3A, 6.15).

use shadow::registers::CR4_OSXSAVE;

use core::arch::{asm, naked_asm};

use crate::attempt;
use crate::cpu::{vmwrite, wrmsr};
use crate::fault::{Outcome, RECOVERY, RECOVERY_RBX, RECOVERY_RSP};
use crate::memory::*;
use crate::output::Suite;
use crate::vm::load_fresh;

const GUEST_RIP: u64 = 0x681e;
const VALUE: u64 = 0x7654_3210_89ab_cdef;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    forms(suite);
    registers(suite);
    faults(suite);
    at_cpl_3(suite);
    others_at_cpl_3(suite);
    in_compatibility_mode(suite);
}

/// VMREAD to, VMWRITE from and VMPTRST to an operand; prints the quadword's index and its new value.
macro_rules! form {
    ($suite:ident, $name:literal, $operand:literal $(, $($operands:tt)*)?) => {{
        load_fresh(&VMCS);
        let _ = vmwrite(GUEST_RIP, VALUE);
        OPERANDS.fill(0);
        let read = attempt!(concat!("vmread ", $operand, ", rcx"); in("rcx") GUEST_RIP, $($($operands)*)?);
        $suite.case(concat!("vmread-", $name), format_args!("{read} {}", Written));
        OPERANDS.fill(0x5a5a);
        let write = attempt!(concat!("vmwrite rcx, ", $operand); in("rcx") GUEST_RIP, $($($operands)*)?);
        let value = crate::cpu::vmread(GUEST_RIP).unwrap_or(0);
        $suite.case(concat!("vmwrite-", $name), format_args!("{write} {value:#x}"));
        OPERANDS.fill(0);
        let store = attempt!(concat!("vmptrst ", $operand); $($($operands)*)?);
        $suite.case(concat!("vmptrst-", $name), format_args!("{store} {}", Written));
        OPERANDS.fill(VMCS.address());
        let load = attempt!(concat!("vmptrld ", $operand); $($($operands)*)?);
        $suite.case(concat!("vmptrld-", $name), format_args!("{load}"));
        let clear = attempt!(concat!("vmclear ", $operand); $($($operands)*)?);
        $suite.case(concat!("vmclear-", $name), format_args!("{clear} {:#x}", crate::cpu::vmptrst().1));
    }};
}

/// The first quadword of the operand page that is not 0.
struct Written;

impl core::fmt::Display for Written {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match (0..512).map(|index| (index, OPERANDS.get(index))).find(|(_, word)| *word != 0) {
            Some((index, word)) => write!(f, "[{index}]={word:#x}"),
            None => f.write_str("nothing"),
        }
    }
}

fn forms(suite: &mut Suite) {
    const IA32_FS_BASE: u32 = 0xc000_0100;
    const IA32_GS_BASE: u32 = 0xc000_0101;
    let page = OPERANDS.address();
    form!(suite, "base", "[{base}]", base = in(reg) page);
    form!(suite, "base-disp8", "[{base} + 8]", base = in(reg) page);
    form!(suite, "base-disp8-negative", "[{base} - 8]", base = in(reg) page + 32);
    form!(suite, "base-disp32", "[{base} + 0x7f8]", base = in(reg) page);
    form!(suite, "sib", "[{base} + {index} * 8]", base = in(reg) page, index = in(reg) 3_u64);
    form!(suite, "sib-1", "[{base} + {index} * 1 + 8]", base = in(reg) page, index = in(reg) 16_u64);
    form!(suite, "sib-2", "[{base} + {index} * 2 + 8]", base = in(reg) page, index = in(reg) 4_u64);
    form!(suite, "sib-4-negative", "[{base} + {index} * 4 + 80]", base = in(reg) page, index = in(reg) -4_i64);
    form!(suite, "sib-no-base", "[{index} * 8]", index = in(reg) page / 8 + 1);
    form!(suite, "r12-base", "[r12]", in("r12") page + 8);
    form!(suite, "r13-base", "[r13]", in("r13") page + 16);
    form!(suite, "r15-index", "[r14 + r15 * 8]", in("r14") page, in("r15") 4_u64);
    form!(suite, "rip", "[rip + {page}]", page = sym OPERANDS);
    form!(suite, "address-size-32", "[{base:e} + 16]", base = in(reg) page | 0xffff_ffff << 32);
    form!(suite, "address-size-32-wraps", "[{base:e} + 16]", base = in(reg) 0xffff_fff0_u64.wrapping_add(page));
    form!(suite, "misaligned", "[{base} + 3]", base = in(reg) page);
    let _ = wrmsr(IA32_FS_BASE, page);
    let _ = wrmsr(IA32_GS_BASE, page + 8);
    form!(suite, "fs", "fs:[{offset}]", offset = in(reg) 0x20_u64);
    form!(suite, "gs", "gs:[{offset}]", offset = in(reg) 0x20_u64);
    form!(suite, "gs-address-size-32", "gs:[{offset:e}]", offset = in(reg) 0x1_0000_0020_u64);
    form!(suite, "window", "[{base}]", base = in(reg) WINDOW);
    form!(suite, "window-user-alias", "[{base}]", base = in(reg) USER + page);
    let _ = wrmsr(IA32_FS_BASE, 0);
    let _ = wrmsr(IA32_GS_BASE, 0);
    // RSP as base register: the operand is on the stack.
    load_fresh(&VMCS);
    let mut pointer = 0_u64;
    let outcome = attempt!("push rcx", "vmptrst [rsp]", "pop {pointer}"; in("rcx") 0_u64, pointer = inout(reg) pointer);
    suite.case("vmptrst-rsp", format_args!("{outcome} {}", pointer == VMCS.address()));
}

/// Register operands of VMREAD and VMWRITE, RSP among them.
fn registers(suite: &mut Suite) {
    macro_rules! register {
        ($name:literal) => {{
            load_fresh(&VMCS);
            let _ = vmwrite(GUEST_RIP, VALUE);
            let mut value = 0_u64;
            let read = attempt!(
                concat!("xchg ", $name, ", {value}"), concat!("vmread ", $name, ", rcx"), concat!("xchg ", $name, ", {value}");
                in("rcx") GUEST_RIP, value = inout(reg) value
            );
            suite.case(concat!("vmread-to-", $name), format_args!("{read} {value:#x}"));
            let write = attempt!(
                concat!("xchg ", $name, ", {value}"), concat!("vmwrite rcx, ", $name), concat!("xchg ", $name, ", {value}");
                in("rcx") GUEST_RIP, value = inout(reg) VALUE ^ 1 => _
            );
            let value = crate::cpu::vmread(GUEST_RIP).unwrap_or(0);
            suite.case(concat!("vmwrite-from-", $name), format_args!("{write} {value:#x}"));
        }};
    }
    register!("rax");
    register!("rdx");
    register!("rbx");
    register!("rsp");
    register!("rbp");
    register!("rsi");
    register!("rdi");
    register!("r8");
    register!("r9");
    register!("r10");
    register!("r11");
    register!("r12");
    register!("r13");
    register!("r14");
    register!("r15");
    // A field narrower than its destination, a source wider than its field.
    for (name, field) in [("16", 0x0800), ("32", 0x4800), ("64-high", 0x2801)] {
        load_fresh(&VMCS);
        let write = vmwrite(field, u64::MAX);
        let value = crate::cpu::vmread(field).unwrap_or(0);
        suite.case(format_args!("width-{name}"), format_args!("{write} {value:#x}"));
    }
}

/// Linear addresses that fault, for each instruction.
fn faults(suite: &mut Suite) {
    let addresses = [
        ("not-present", WINDOW + 0x1000),
        ("read-only", WINDOW + 0x2000),
        ("reserved-bit", WINDOW + 0x3000),
        ("no-table", WINDOW + (1 << 30)),
        ("crossing", WINDOW + 0xffc),
        ("crossing-16", WINDOW + 0xff8),
        ("non-canonical", 1 << 47),
        ("non-canonical-high", 0xffff_7fff_ffff_fff8),
        ("canonical-edge", (1 << 47) - 4),
    ];
    for (name, address) in addresses {
        load_fresh(&VMCS);
        OPERANDS.fill(VMCS.address());
        let cases = [
            ("vmread", attempt!("vmread [{a}], {f}"; a = in(reg) address, f = in(reg) GUEST_RIP)),
            ("vmread-bad-field", attempt!("vmread [{a}], {f}"; a = in(reg) address, f = in(reg) 0x7000_u64)),
            ("vmwrite", attempt!("vmwrite {f}, [{a}]"; a = in(reg) address, f = in(reg) GUEST_RIP)),
            ("vmwrite-bad-field", attempt!("vmwrite {f}, [{a}]"; a = in(reg) address, f = in(reg) 0x7000_u64)),
            ("vmptrst", attempt!("vmptrst [{a}]"; a = in(reg) address)),
            ("vmptrld", attempt!("vmptrld [{a}]"; a = in(reg) address)),
            ("invept", attempt!("invept {k}, [{a}]"; a = in(reg) address, k = in(reg) 2_u64)),
            ("invept-bad-type", attempt!("invept {k}, [{a}]"; a = in(reg) address, k = in(reg) 9_u64)),
            ("invvpid", attempt!("invvpid {k}, [{a}]"; a = in(reg) address, k = in(reg) 2_u64)),
            ("invvpid-bad-type", attempt!("invvpid {k}, [{a}]"; a = in(reg) address, k = in(reg) 9_u64)),
            ("ss", attempt!("vmptrst ss:[{a}]"; a = in(reg) address)),
            ("vmclear", attempt!("vmclear [{a}]"; a = in(reg) address)),
            ("no-current-vmread", attempt!("vmread [{a}], {f}"; a = in(reg) address, f = in(reg) GUEST_RIP)),
            ("no-current-vmwrite", attempt!("vmwrite {f}, [{a}]"; a = in(reg) address, f = in(reg) GUEST_RIP)),
        ];
        for (instruction, outcome) in cases {
            suite.case(format_args!("{instruction}-{name}"), outcome);
        }
    }
}

type Code = extern "C" fn();

/// Each VMX instruction with its memory operand at RAX, then INT3.
macro_rules! instructions {
    ($($name:literal: $text:literal),* $(,)?) => {
        [$(($name, {
            #[unsafe(naked)]
            extern "C" fn code() {
                naked_asm!($text, "int3")
            }
            code as Code
        })),*]
    };
}

fn all_instructions() -> [(&'static str, Code); 14] {
    instructions! {
        "vmxon": "vmxon [rax]",
        "vmclear": "vmclear [rax]",
        "vmptrld": "vmptrld [rax]",
        "vmptrst": "vmptrst [rax]",
        "vmread": "vmread [rax], rcx",
        "vmread-register": "vmread rdx, rcx",
        "vmwrite": "vmwrite rcx, [rax]",
        "vmwrite-register": "vmwrite rcx, rdx",
        "vmlaunch": "vmlaunch",
        "vmresume": "vmresume",
        "vmcall": "vmcall",
        "vmxoff": "vmxoff",
        "invept": "invept rcx, [rax]",
        "invvpid": "invvpid rcx, [rax]",
    }
}

fn at_cpl_3(suite: &mut Suite) {
    for (name, code) in all_instructions() {
        for (place, operand) in [("", USER + OPERANDS.address()), ("-operand-not-present", WINDOW + 0x1000)] {
            load_fresh(&VMCS);
            let outcome = execute(code, USER, USER_CODE, USER_DATA, operand);
            suite.case(format_args!("cpl-3-{name}{place}"), outcome);
        }
    }
    let _ = crate::cpu::vmclear(VMCS.address());
    for (name, code) in all_instructions() {
        let outcome = execute(code, USER, USER_CODE, USER_DATA, USER + OPERANDS.address());
        suite.case(format_args!("cpl-3-no-current-{name}"), outcome);
    }
}

/// Instructions that exit from a guest hypervisor, and privileged ones that may exit: their faults come before the
/// exits.
fn others_at_cpl_3(suite: &mut Suite) {
    let before = crate::cpu::cr4();
    let _ = crate::cpu::set_cr4(before | CR4_OSXSAVE);
    let instructions = instructions! {
        "xsetbv": "xor ecx, ecx; mov eax, 3; xor edx, edx; xsetbv",
        "cpuid": "xor eax, eax; xchg rbx, r9; cpuid; xchg rbx, r9",
        "invd": "invd",
        "getsec": "xor eax, eax; .byte 0x0f, 0x37",
        "vmfunc": "xor eax, eax; vmfunc",
        "rdmsr": "mov ecx, 0x480; rdmsr",
        "wrmsr": "mov ecx, 0x480; wrmsr",
        "wrmsr-beyond": "mov ecx, 0x4b564d01; wrmsr",
        "read-cr3": "mov rdx, cr3",
        "write-cr0": "mov cr0, rax",
        "write-cr4": "mov cr4, rax",
        "clts": "clts",
        "lmsw": "lmsw ax",
        "hlt": "hlt",
    };
    for (name, code) in instructions {
        suite.case(format_args!("cpl-3-{name}"), execute(code, USER, USER_CODE, USER_DATA, 0));
    }
    let _ = crate::cpu::set_cr4(before);
}

fn in_compatibility_mode(suite: &mut Suite) {
    for (name, code) in all_instructions() {
        load_fresh(&VMCS);
        let outcome = execute(code, 0, CODE_32, DATA, OPERANDS.address());
        suite.case(format_args!("compatibility-{name}"), outcome);
    }
}

/// Executes `code` at its address plus `offset` with these segments and RAX, RCX = a type or field, until it faults.
fn execute(code: Code, offset: u64, cs: u16, ss: u16, operand: u64) -> Outcome {
    let rip = code as *const () as u64 + offset;
    let stack = guest_stack() + offset;
    // SAFETY: after the fault execution continues at the label, with this stack; the data segments are loaded again.
    unsafe {
        asm!(
            "lea {scratch}, [rip + 22f]",
            "mov [rip + {recovery}], {scratch}",
            "mov [rip + {recovery_rsp}], rsp",
            "mov [rip + {recovery_rbx}], rbx",
            "push {ss}", "push {stack}", "push 2", "push {cs}", "push {rip}",
            "iretq",
            "22:",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            scratch = out(reg) _, recovery = sym RECOVERY, recovery_rsp = sym RECOVERY_RSP, recovery_rbx = sym RECOVERY_RBX,
            ss = in(reg) u64::from(ss), stack = in(reg) stack, cs = in(reg) u64::from(cs), rip = in(reg) rip,
            data = in(reg) DATA,
            in("rax") operand, inout("rcx") 2_u64 => _, out("rdx") _, out("r9") _,
        );
    }
    Outcome::of(0, 0)
}
