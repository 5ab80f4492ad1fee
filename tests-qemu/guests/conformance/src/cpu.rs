//! Instructions.

use core::arch::asm;

use protocol::statistics;

use crate::attempt;
use crate::fault::Outcome;
use crate::memory::{CODE, CODE_32};

/// Reads an MSR.
pub fn rdmsr(msr: u32) -> Result<u64, Outcome> {
    let (mut low, mut high) = (0_u32, 0_u32);
    match attempt!("rdmsr"; in("ecx") msr, inout("eax") low, inout("edx") high) {
        Outcome::Success => Ok(u64::from(high) << 32 | u64::from(low)),
        fault => Err(fault),
    }
}

/// Writes an MSR.
pub fn wrmsr(msr: u32, value: u64) -> Outcome {
    attempt!("wrmsr"; in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32)
}

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// XSETBV.
pub fn xsetbv(register: u32, value: u64) -> Outcome {
    attempt!("xsetbv"; in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32)
}

/// Makes a host that was started with `stats` print its counters. Any other processor has no such leaf, and answers
/// without meaning.
pub fn request_host_statistics() {
    let _ = core::arch::x86_64::__cpuid_count(statistics::LEAF, statistics::SUBLEAF);
}

/// VMREAD.
pub fn vmread(encoding: u64) -> Result<u64, Outcome> {
    let value;
    match attempt!("vmread {value}, {encoding}"; encoding = in(reg) encoding, value = out(reg) value) {
        Outcome::Success => Ok(value),
        failure => Err(failure),
    }
}

/// VMWRITE.
pub fn vmwrite(encoding: u64, value: u64) -> Outcome {
    attempt!("vmwrite {encoding}, {value}"; encoding = in(reg) encoding, value = in(reg) value)
}

/// VMXON.
pub fn vmxon(region: u64) -> Outcome {
    attempt!("vmxon [{operand}]"; operand = in(reg) &raw const region)
}

/// VMXOFF.
pub fn vmxoff() -> Outcome {
    attempt!("vmxoff")
}

/// VMCLEAR.
pub fn vmclear(region: u64) -> Outcome {
    attempt!("vmclear [{operand}]"; operand = in(reg) &raw const region)
}

/// VMPTRLD.
pub fn vmptrld(region: u64) -> Outcome {
    attempt!("vmptrld [{operand}]"; operand = in(reg) &raw const region)
}

/// VMPTRST.
pub fn vmptrst() -> (Outcome, u64) {
    let mut region = 0_u64;
    (attempt!("vmptrst [{operand}]"; operand = in(reg) &raw mut region), region)
}

/// INVEPT.
pub fn invept(kind: u64, descriptor: [u64; 2]) -> Outcome {
    attempt!("invept {kind}, [{operand}]"; kind = in(reg) kind, operand = in(reg) &raw const descriptor)
}

/// INVVPID.
pub fn invvpid(kind: u64, descriptor: [u64; 2]) -> Outcome {
    attempt!("invvpid {kind}, [{operand}]"; kind = in(reg) kind, operand = in(reg) &raw const descriptor)
}

macro_rules! read_register {
    ($read:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reading the register has no effect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
    };
}

macro_rules! write_register {
    ($write:ident, $name:literal) => {
        #[doc = concat!("Writes ", $name, ".")]
        pub fn $write(value: u64) -> Outcome {
            attempt!(concat!("mov ", $name, ", {value}"), "test rsp, rsp"; value = in(reg) value)
        }
    };
}

read_register!(cr0, "cr0");
read_register!(cr2, "cr2");
read_register!(cr3, "cr3");
read_register!(cr4, "cr4");
read_register!(cr8, "cr8");
read_register!(dr7, "dr7");
write_register!(set_cr0, "cr0");
write_register!(set_cr3, "cr3");
write_register!(set_cr4, "cr4");
write_register!(set_cr8, "cr8");
write_register!(set_dr7, "dr7");

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

/// Loads GDTR and IDTR, with limits of the tables in memory.rs.
pub fn load_tables(gdt: u64, idt: u64) {
    const GDT_LIMIT: u16 = 0x5f;
    const IDT_LIMIT: u16 = 0xfff;
    let (gdt, idt) = (TablePointer { limit: GDT_LIMIT, base: gdt }, TablePointer { limit: IDT_LIMIT, base: idt });
    // SAFETY: both tables are complete and static.
    unsafe { asm!("lgdt [{}]", "lidt [{}]", in(reg) &raw const gdt, in(reg) &raw const idt, options(nostack)) };
}

/// Leaves 64-bit mode for a mode without paging, by way of 32-bit code, and comes back: CR0 on the way and after it.
#[unsafe(naked)]
pub extern "C" fn without_paging(without: u32, with: u32) {
    core::arch::naked_asm!(
        "lea rcx, [rip + 3f]",
        "lea rax, [rip + 2f]",
        "push {code_32}",
        "push rax",
        "retfq",
        ".code32",
        "2: mov cr0, edi",
        "mov cr0, esi",
        "push {code}",
        "push ecx",
        "retf",
        ".code64",
        "3: ret",
        code_32 = const CODE_32,
        code = const CODE,
    )
}

/// Loads TR.
pub fn load_task_register(selector: u16) {
    // SAFETY: the descriptor is that of an available TSS.
    unsafe { asm!("ltr {:x}", in(reg) selector, options(nostack)) };
}
