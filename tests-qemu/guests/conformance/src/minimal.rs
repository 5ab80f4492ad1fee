//! With the argument `minimal`, the image is the smallest guest hypervisor there is: it reads the exit reason, moves RIP over the instruction
//! and resumes. What an exit of its nested guest costs is the nesting alone.

use core::arch::{asm, naked_asm};

use shadow::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::cpu::{cr4, set_cr4, vmxon};
use crate::fault::Outcome;
use crate::mark;
use crate::memory::{MSR_BITMAPS, STACKS, VMXON};
use crate::output::{power_off, print};
use crate::vm::{CR4, Vm, prepare_host, revision};

#[path = "../../minimal.rs"]
mod abi;

use abi::{MARK, OPERATIONS, REPEATS};

const IA32_MCG_STATUS: u32 = 0x17a;

/// The argument.
pub const WORD: &str = "minimal";

/// VMXON, as the suite's own cases do it before.
pub fn enter_vmx_operation() -> Outcome {
    let _ = set_cr4(cr4() | CR4);
    VMXON.set(0, revision());
    let outcome = vmxon(VMXON.address());
    prepare_host();
    outcome
}

/// Runs the nested guest, which does each operation so many times, with a mark before each.
pub fn run() -> ! {
    print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
    let mut vm = Vm::new(nested_guest as *const () as u64);
    MSR_BITMAPS.fill(u64::MAX);
    vm.clear(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER.bits());
    vm.or(PIN_CONTROLS, (Pin::NMI_EXITING | Pin::VIRTUAL_NMIS).bits());
    vm.or(SECONDARY_CONTROLS, Secondary::ENABLE_VPID.bits());
    // Like every hypervisor it keeps its own state apart from its guest's.
    vm.or(ENTRY_CONTROLS, (EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::LOAD_PAT).bits());
    let exit = ExitControls::SAVE_DEBUG_CONTROLS | ExitControls::SAVE_PAT | ExitControls::LOAD_PAT;
    vm.or(EXIT_CONTROLS, exit.bits());
    vm.or(PRIMARY_CONTROLS, (Primary::HLT_EXITING | Primary::UNCONDITIONAL_IO_EXITING).bits());
    vm.set(HOST_RIP, exit_handler as *const () as u64).set(HOST_RSP, STACKS.address() + 0x1000);
    // SAFETY: what comes back of the nested guest goes to `exit_handler`, with a stack of its own, and ends in `end`.
    unsafe { asm!("vmlaunch") };
    print(format_args!("C-PANIC VM entry failed with error {}", vm.get(VM_INSTRUCTION_ERROR)));
    power_off()
}

/// All that this hypervisor does about an exit. INVD is the nested guest's last word.
#[unsafe(naked)]
extern "C" fn exit_handler() {
    naked_asm!(
        "push rax; push rcx; push rdx",
        "mov eax, {reason}",
        "vmread rcx, rax",
        "cmp ecx, {invd}",
        "je {end}",
        "mov eax, {length}",
        "vmread rcx, rax",
        "mov eax, {rip}",
        "vmread rdx, rax",
        "add rdx, rcx",
        "vmwrite rax, rdx",
        "pop rdx; pop rcx; pop rax",
        "vmresume",
        "jmp {end}",
        reason = const EXIT_REASON.id().encoding().0,
        length = const EXIT_INSTRUCTION_LENGTH.id().encoding().0,
        rip = const GUEST_RIP.id().encoding().0,
        invd = const ExitReason::INVD.0,
        end = sym end,
    )
}

extern "C" fn end() -> ! {
    print(format_args!("{WORD}: done"));
    power_off()
}

extern "C" fn nested_guest() -> ! {
    const { assert!(OPERATIONS.len() == 7) };
    // SAFETY: the instructions exit, and none changes anything of this guest's but the named registers.
    unsafe {
        counted(
            0,
            |_| asm!("xchg rbx, {0}", "cpuid", "xchg rbx, {0}", out(reg) _, inout("eax") 0 => _, out("ecx") _, out("edx") _),
        );
        counted(1, |_| asm!("vmcall"));
        counted(2, |_| asm!("rdmsr", in("ecx") IA32_MCG_STATUS, out("eax") _, out("edx") _));
        counted(3, |n| asm!("wrmsr", in("ecx") IA32_MCG_STATUS, in("eax") n, in("edx") 0));
        counted(4, |n| asm!("out dx, eax", in("edx") 0x80, in("eax") n));
        counted(5, |_| asm!("hlt"));
        counted(6, |n| {
            asm!("xchg rbx, {0}", "cpuid", "xchg rbx, {0}", out(reg) _, inout("eax") 0 => _, out("ecx") _, out("edx") _);
            asm!("vmcall");
            asm!("rdmsr", in("ecx") IA32_MCG_STATUS, out("eax") _, out("edx") _);
            asm!("wrmsr", in("ecx") IA32_MCG_STATUS, in("eax") n, in("edx") 0);
            asm!("out dx, eax", in("edx") 0x80, in("eax") n);
        });
        asm!("invd", options(noreturn))
    }
}

/// Repeats `once` with a mark before each and after the last.
fn counted(operation: u8, once: impl Fn(u32)) {
    let mut name = *MARK;
    name[MARK.len() - 1] += operation;
    let (low, high) = mark::words(&name);
    let count = || {
        // SAFETY: exchanges a register with itself; the inputs mean something to the emulator alone.
        unsafe { asm!("xchg bx, bx", in("rcx") mark::SIGNATURE, in("rax") low, in("rdx") high) }
    };
    for n in 0..REPEATS as u32 {
        count();
        once(n);
    }
    count();
}
