//! The events right after an instruction that a hypervisor emulates: the single-step trap, and interrupts that MOV SS
//! or STI blocked (SDM Volume 3A, 6.8.3 and 18.3.1.4).

use crate::apic;
use crate::attempt;
use crate::fault::{last_interrupt, last_rip};
use crate::memory::{DATA, OPERANDS, VMCS, VMXON};
use crate::output::Suite;
use crate::vm::load_fresh;

const GUEST_RIP: u64 = 0x681e;
const VECTOR: u8 = 0x42;

/// Executes the instruction after POPF has set TF, and after STI with an interrupt pending. Prints where the trap or
/// the interrupt came.
macro_rules! case {
    ($suite:ident, $name:literal, $instruction:literal $(, $($operands:tt)*)?) => {{
        load_fresh(&VMCS);
        OPERANDS.fill(VMCS.address());
        let mut start = 0_u64;
        let trap = attempt!(
            "pushfq", "or dword ptr [rsp], 0x100", "lea r8, [rip + 33f]", "popfq", concat!("33: ", $instruction), "nop", "nop", "pushfq",
            "and dword ptr [rsp], 0xfffffeff", "popfq";
            out("r8") start, $($($operands)*)?
        );
        let distance = last_rip().wrapping_sub(start);
        $suite.case(concat!("trap-after-", $name), format_args!("{trap} rip=+{distance:#x}"));
        load_fresh(&VMCS);
        apic::interrupt_self(VECTOR);
        let outcome = attempt!("lea r8, [rip + 33f]", "sti", concat!("33: ", $instruction), "nop", "nop", "cli"; out("r8") start, $($($operands)*)?);
        let (vector, distance) = (last_interrupt(), last_rip().wrapping_sub(start));
        $suite.case(concat!("interrupt-after-", $name), format_args!("{outcome} {vector:x?} rip=+{distance:#x}"));
        load_fresh(&VMCS);
        apic::interrupt_self(VECTOR);
        let outcome = attempt!(
            "lea r8, [rip + 33f]", "sti", "mov ss, {data:x}", concat!("33: ", $instruction), "nop", "nop", "cli";
            out("r8") start, data = in(reg) DATA, $($($operands)*)?
        );
        let (vector, distance) = (last_interrupt(), last_rip().wrapping_sub(start));
        $suite.case(concat!("mov-ss-interrupt-after-", $name), format_args!("{outcome} {vector:x?} rip=+{distance:#x}"));
    }};
}

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    case!(suite, "nop", "nop");
    case!(suite, "cpuid", "xchg r9, rbx; cpuid; xchg r9, rbx", out("rax") _, out("rcx") _, out("rdx") _, out("r9") _);
    case!(suite, "vmread", "vmread rax, rcx", out("rax") _, in("rcx") GUEST_RIP);
    case!(suite, "vmread-memory", "vmread [rax], rcx", in("rax") OPERANDS.address(), in("rcx") GUEST_RIP);
    case!(suite, "vmwrite", "vmwrite rcx, rax", in("rax") 0_u64, in("rcx") GUEST_RIP);
    case!(suite, "vmwrite-that-fails", "vmwrite rcx, rax", in("rax") 0_u64, in("rcx") 0x7000_u64);
    case!(suite, "vmptrst", "vmptrst [rax]", in("rax") OPERANDS.address());
    case!(suite, "vmptrld", "vmptrld [rax]", in("rax") OPERANDS.address());
    case!(suite, "vmclear", "vmclear [rax]", in("rax") OPERANDS.address());
    case!(suite, "vmxon", "vmxon [rax]", in("rax") &raw const VMXON);
    case!(suite, "vmlaunch", "vmlaunch");
    case!(suite, "vmresume", "vmresume");
    case!(suite, "invept", "invept rcx, [rax]", in("rax") OPERANDS.address(), in("rcx") 2_u64);
    case!(suite, "invvpid", "invvpid rcx, [rax]", in("rax") OPERANDS.address(), in("rcx") 2_u64);
    case!(suite, "rdmsr", "rdmsr", in("ecx") 0x480, out("eax") _, out("edx") _);
    case!(suite, "rdmsr-that-faults", "rdmsr", in("ecx") 0x493, out("eax") _, out("edx") _);
    case!(suite, "wrmsr-that-faults", "wrmsr", in("ecx") 0x480, in("eax") 0, in("edx") 0);
    case!(suite, "mov-cr0", "mov cr0, rax", in("rax") crate::cpu::cr0());
    case!(suite, "mov-cr0-that-faults", "mov cr0, rax", in("rax") 0_u64);
    case!(suite, "mov-cr4", "mov cr4, rax", in("rax") crate::cpu::cr4());
    case!(suite, "read-cr4", "mov rax, cr4", out("rax") _);
    case!(suite, "clts", "clts");
    case!(suite, "lmsw", "lmsw ax", in("rax") crate::cpu::cr0());
    case!(suite, "wbinvd", "wbinvd");
    case!(suite, "xsetbv-without-osxsave", "xsetbv", in("ecx") 0, in("eax") 7, in("edx") 0);
    case!(suite, "getsec", ".byte 0x0f, 0x37", in("eax") 0);
    case!(suite, "vmfunc", "vmfunc", in("eax") 0, in("ecx") 0);
}
