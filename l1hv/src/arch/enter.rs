//! VM entry and VM exit: the few instructions between the host and a guest.

use core::arch::{asm, naked_asm};
use core::mem::offset_of;
use core::ops::{Index, IndexMut};

use crate::processor::Processor;

/// General-purpose registers of the guest that runs, and the host's RSP at VM entry.
///
/// The VMCSs' host RSP points to [`Self::host_rsp`], so that the exit can push the registers directly into their
/// elements and the host RSP field never changes.
#[derive(Debug)]
#[repr(C, align(16))]
pub struct GuestRegisters {
    /// By register number: RAX, RCX, RDX, RBX, (RSP: in the VMCS), RBP, RSI, RDI, R8 to R15. The element of RSP holds
    /// all ones.
    gpr: [u64; 16],
    host_rsp: u64,
}

impl GuestRegisters {
    /// All zero.
    pub const fn new() -> Self {
        Self { gpr: Self::ZERO, host_rsp: 0 }
    }

    const ZERO: [u64; 16] = [0, 0, 0, 0, u64::MAX, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    /// Sets all to zero.
    pub fn clear(&mut self) {
        self.gpr = Self::ZERO;
    }

    /// The value for the host RSP field.
    pub fn exit_stack(&self) -> u64 {
        (&raw const self.host_rsp).addr() as u64
    }
}

impl Index<usize> for GuestRegisters {
    type Output = u64;

    #[inline(always)]
    fn index(&self, number: usize) -> &u64 {
        &self.gpr[number]
    }
}

impl IndexMut<usize> for GuestRegisters {
    #[inline(always)]
    fn index_mut(&mut self, number: usize) -> &mut u64 {
        &mut self.gpr[number]
    }
}

/// The value for the host RIP field.
pub fn exit_address() -> u64 {
    vm_exit as *const () as u64
}

/// [`enter`] returns this if the guest ran, or if the entry failed late: the VMCS has an exit reason.
const EXITED: u32 = 0;
/// [`enter`] returns this after VMfail.
const REFUSED: u32 = 1;
/// [`enter`] returns this if the processor must handle requests before the entry.
pub const REQUESTED: u32 = 2;

/// Runs the guest of the current VMCS until its next exit.
///
/// # Safety
///
/// The current VMCS's host state leads back here with these `registers`, and its guest state and controls keep the
/// guest out of the host's memory.
#[inline(always)]
pub unsafe fn enter(registers: &mut GuestRegisters, launched: bool) -> u32 {
    let how;
    // SAFETY: the caller's promise. The guest's changes of registers are declared as clobbers, or `vm_entry` and
    // `vm_exit` undo them.
    unsafe {
        asm!(
            "call {vm_entry}",
            vm_entry = sym vm_entry,
            in("rdi") registers,
            in("esi") u32::from(launched),
            lateout("eax") how,
            lateout("r12") _, lateout("r13") _, lateout("r14") _, lateout("r15") _,
            clobber_abi("sysv64"),
        );
    }
    how
}

unsafe extern "C" {
    static vm_entry_begin: u8;
    static vm_entry_end: u8;
    static vm_not_entered: u8;
}

/// Where execution continues after an NMI at `rip`. An NMI between the test of the requests and the VM entry cancels
/// the entry, which would otherwise miss the NMI's own request.
pub fn landing_after_nmi(rip: u64) -> u64 {
    let address = |symbol: *const u8| symbol.addr() as u64;
    let entry = address(&raw const vm_entry_begin)..address(&raw const vm_entry_end);
    if entry.contains(&rip) { address(&raw const vm_not_entered) } else { rip }
}

/// RDI: the registers; SIL: whether to execute VMRESUME. Saves the two registers that inline assembly cannot declare.
#[unsafe(naked)]
unsafe extern "sysv64" fn vm_entry() {
    naked_asm!(
        "push rbx; push rbp",
        "mov [rdi + {host_rsp}], rsp",
        "vm_entry_begin:",
        "cmp dword ptr gs:[{requests}], 0",
        "jne vm_not_entered",
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
        "jmp 3f", // not reached after a guest ran
        "2: vmlaunch",
        "vm_entry_end:",
        "3: mov eax, {refused}",
        "4:",
        "pop rbp; pop rbx",
        "ret",
        "vm_not_entered:",
        "mov eax, {requested}",
        "jmp 4b",
        requests = const offset_of!(Processor, requests),
        requested = const REQUESTED,
        host_rsp = const offset_of!(GuestRegisters, host_rsp),
        refused = const REFUSED,
    )
}

/// The processor continues here after a VM exit, with RSP at `GuestRegisters::host_rsp`.
#[unsafe(naked)]
unsafe extern "sysv64" fn vm_exit() {
    naked_asm!(
        "push r15; push r14; push r13; push r12; push r11; push r10; push r9; push r8",
        "push rdi; push rsi; push rbp",
        "sub rsp, 8", // RSP is in the VMCS
        "push rbx; push rdx; push rcx; push rax",
        "mov rsp, [rsp + {host_rsp}]",
        "mov eax, {exited}",
        "pop rbp; pop rbx",
        "ret",
        host_rsp = const offset_of!(GuestRegisters, host_rsp),
        exited = const EXITED,
    )
}
