//! VM entry and VM exit.

use core::arch::naked_asm;

use crate::cpu;
use crate::fault::Outcome;
use crate::memory::{HOST_IDT, gdt_table, host_cr3};

/// Registers that the VMCS does not hold.
#[repr(C)]
#[derive(Default)]
pub struct Registers {
    /// RAX.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RBX.
    pub rbx: u64,
    /// RBP.
    pub rbp: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RFLAGS right after the exit.
    pub host_rflags: u64,
    /// GDTR right after the exit: the limit in the first two bytes, then the base.
    pub host_gdtr: [u64; 2],
    /// IDTR right after the exit.
    pub host_idtr: [u64; 2],
}

unsafe extern "C" {
    fn vm_exit_point();
}

/// The address to which VM exits go.
pub fn exit_point() -> u64 {
    vm_exit_point as *const () as u64
}

/// VMLAUNCH or VMRESUME, until the next VM exit. After a VM exit the caller calls [`prepare_host`].
pub fn enter(registers: &mut Registers, resume: bool) -> Outcome {
    // SAFETY: a VM exit returns from this call; the caller restores the state that it may have changed.
    let result = unsafe { enter_guest(registers, u64::from(resume)) };
    match result {
        0 => Outcome::Success,
        flags => Outcome::of((flags == 1).into(), (flags == 2).into()),
    }
}

/// Restores the registers that the host state of a case may have loaded.
pub fn prepare_host() {
    const DR7_AT_RESET: u64 = 0x400;
    const PAT_AT_RESET: u64 = 0x0007_0406_0007_0406;
    const EFER_LME_LMA_NXE: u64 = 0xd00;
    cpu::load_tables(gdt_table().address(), HOST_IDT.address());
    let _ = cpu::set_cr0(CR0);
    let _ = cpu::set_cr3(host_cr3());
    let _ = cpu::set_cr4(CR4);
    let _ = cpu::set_dr7(DR7_AT_RESET);
    let _ = cpu::wrmsr(0x277, PAT_AT_RESET);
    let _ = cpu::wrmsr(0xc000_0080, EFER_LME_LMA_NXE);
    let _ = cpu::wrmsr(0x1d9, 0);
}

/// PG, WP, NE, ET, MP, PE.
pub const CR0: u64 = 0x8001_0033;
/// VMXE, PAE.
pub const CR4: u64 = 0x2020;
/// CR4.LA57: 5-level paging.
pub const CR4_LA57_BIT: u32 = 12;
/// CR4.LASS: linear-address space separation. The image is in the user's half of the address space, which LASS closes
/// to supervisor-mode accesses.
pub const CR4_LASS_BIT: u32 = 27;

/// Returns 0 after a VM exit, 1 for VMfailInvalid, 2 for VMfailValid.
#[unsafe(naked)]
unsafe extern "C" fn enter_guest(registers: *mut Registers, resume: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        // HOST_RSP
        "mov eax, 0x6c14",
        "vmwrite rax, rsp",
        "test rsi, rsi",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 32]",
        "mov rsi, [rdi + 40]",
        "mov rdi, [rdi + 48]",
        "jnz 2f",
        "vmlaunch",
        "jmp 3f",
        "2: vmresume",
        "3: mov eax, 1",
        "mov ecx, 2",
        "cmovnc eax, ecx",
        "jmp 4f",
        ".global vm_exit_point",
        "vm_exit_point:",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rdx",
        "mov [rdi + 24], rbx",
        "mov [rdi + 32], rbp",
        "mov [rdi + 40], rsi",
        "pop qword ptr [rdi + 48]",
        "pushfq",
        "pop qword ptr [rdi + 56]",
        "sgdt [rdi + 64]",
        "sidt [rdi + 80]",
        "xor eax, eax",
        "4: pop rdi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}
