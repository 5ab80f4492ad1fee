//! VM entry and VM exit: the few instructions between the host and a guest.

use core::arch::naked_asm;
use core::mem::offset_of;

/// General-purpose registers of whoever runs in VMX non-root operation, and where the host's stack was when it entered.
///
/// The VMCSs' host RSP points to [`Self::host_rsp`], so that the exit can push the registers right into their places and the host RSP
/// field never changes.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct GuestRegisters {
    /// By register number: RAX, RCX, RDX, RBX, (RSP: in the VMCS), RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    host_rsp: u64,
}

impl GuestRegisters {
    /// All zero.
    pub const fn new() -> Self {
        Self { gpr: [0; 16], host_rsp: 0 }
    }

    /// What goes into the host RSP field.
    pub fn exit_stack(&self) -> u64 {
        (&raw const self.host_rsp).addr() as u64
    }
}

/// What goes into the host RIP field.
pub fn exit_address() -> u64 {
    vm_exit as *const () as u64
}

/// What [`enter`] returns when the guest ran, or when the entry failed late: there is an exit reason. Everything else is VMfail.
pub const EXITED: u32 = 0;
const VMFAIL: u32 = 1;

/// Runs the guest of the current VMCS until its next exit.
///
/// # Safety
///
/// The current VMCS has its host state set to come back here with this very `registers`, and its guest state and controls confine
/// the guest to what is not the host's.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(registers: *mut GuestRegisters, launched: bool) -> u32 {
    naked_asm!(
        "push rbx; push rbp; push r12; push r13; push r14; push r15",
        "mov [rdi + {host_rsp}], rsp",
        "test sil, sil",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 1*8]",
        "mov rdx, [rdi + 2*8]",
        "mov rbx, [rdi + 3*8]",
        "mov rbp, [rdi + 5*8]",
        "mov rsi, [rdi + 6*8]",
        "mov r8, [rdi + 8*8]",
        "mov r9, [rdi + 9*8]",
        "mov r10, [rdi + 10*8]",
        "mov r11, [rdi + 11*8]",
        "mov r12, [rdi + 12*8]",
        "mov r13, [rdi + 13*8]",
        "mov r14, [rdi + 14*8]",
        "mov r15, [rdi + 15*8]",
        "mov rdi, [rdi + 7*8]",
        "jz 2f",
        "vmresume",
        "jmp 3f",
        "2: vmlaunch",
        "3: mov eax, {vmfail}", // not reached after a guest ran
        "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
        "ret",
        host_rsp = const offset_of!(GuestRegisters, host_rsp),
        vmfail = const VMFAIL,
    )
}

/// Where the processor arrives after an exit, with RSP at `GuestRegisters::host_rsp`.
#[unsafe(naked)]
unsafe extern "sysv64" fn vm_exit() {
    naked_asm!(
        "push r15; push r14; push r13; push r12; push r11; push r10; push r9; push r8",
        "push rdi; push rsi; push rbp",
        "sub rsp, 8", // RSP is in the VMCS
        "push rbx; push rdx; push rcx; push rax",
        "mov rsp, [rsp + {host_rsp}]",
        "mov eax, {exited}",
        "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
        "ret",
        host_rsp = const offset_of!(GuestRegisters, host_rsp),
        exited = const EXITED,
    )
}
