//! With the argument `minimal`, the image is a minimal guest hypervisor: it reads the exit reason, moves RIP over the
//! instruction and resumes. So an exit of its nested guest costs little besides the nesting. A second nested guest
//! halts, and an interrupt wakes it.

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicUsize, Ordering};

use guest_abi::mark;
use guest_abi::minimal::{MARK, OPERATIONS, REPEATS};
use shadow::controls::{EntryControls, ExitControls, Pin, Primary};
use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::cpu::{cr4, set_cr4, vmxon};
use crate::fault::Outcome;
use crate::memory::{CODE, GUEST_IDT, MSR_BITMAPS, STACKS, VMXON};
use crate::output::{abandon, power_off, print};
use crate::vm::{CR4, Vm, prepare_host, revision};

const IA32_MCG_STATUS: u32 = 0x17a;

/// The argument.
pub const WORD: &str = "minimal";

/// Executes VMXON, after the preparations that the suite's cases make otherwise.
pub fn enter_vmx_operation() -> Outcome {
    let _ = set_cr4(cr4() | CR4);
    VMXON.set(0, revision());
    let outcome = vmxon(VMXON.address());
    prepare_host();
    outcome
}

/// Nested guests, each with the handler of its exits.
const GUESTS: [(extern "C" fn() -> !, extern "C" fn()); 2] =
    [(nested_guest, exit_handler), (halting_guest, waking_exit_handler)];

/// Nested guests that have begun.
static BEGUN: AtomicUsize = AtomicUsize::new(0);

/// Interrupts that the nested guest has taken.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The interrupt that ends a HLT.
const WAKE_VECTOR: u8 = 0x20;

/// Runs the nested guests, which repeat each operation, with a mark before each time.
pub fn run() -> ! {
    print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
    GUEST_IDT.set_gate(WAKE_VECTOR.into(), interrupt_handler as *const () as u64, CODE);
    run_next()
}

/// Begins the next nested guest, or ends the machine after the last one.
extern "C" fn run_next() -> ! {
    let Some((guest, handler)) = GUESTS.get(BEGUN.fetch_add(1, Ordering::Relaxed)) else { end() };
    let mut vm = Vm::new(*guest as *const () as u64);
    MSR_BITMAPS.fill(u64::MAX);
    vm.clear(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER);
    // Like every hypervisor, this one keeps its own state apart from its guest's.
    vm.or(ENTRY_CONTROLS, EntryControls::LOAD_DEBUG_CONTROLS);
    vm.or(EXIT_CONTROLS, ExitControls::SAVE_DEBUG_CONTROLS);
    vm.or(PRIMARY_CONTROLS, Primary::HLT_EXITING | Primary::UNCONDITIONAL_IO_EXITING);
    vm.set(HOST_RIP, *handler as *const () as u64).set(HOST_RSP, STACKS.address() + 0x1000);
    // SAFETY: exits of the nested guest go to its handler, which has a stack of its own and ends in `run_next`.
    unsafe { asm!("vmlaunch") };
    print(format_args!("C-PANIC VM entry failed with error {}", vm.get(VM_INSTRUCTION_ERROR)));
    abandon()
}

/// The whole handling of an exit. INVD ends the nested guest.
#[unsafe(naked)]
extern "C" fn exit_handler() {
    naked_asm!(
        "push rax; push rcx; push rdx",
        "mov eax, {reason}",
        "vmread rcx, rax",
        "cmp ecx, {invd}",
        "je {next}",
        "mov eax, {length}",
        "vmread rcx, rax",
        "mov eax, {rip}",
        "vmread rdx, rax",
        "add rdx, rcx",
        "vmwrite rax, rdx",
        "pop rdx; pop rcx; pop rax",
        "vmresume",
        "jmp {failed}",
        reason = const EXIT_REASON.id().encoding().0,
        length = const EXIT_INSTRUCTION_LENGTH.id().encoding().0,
        rip = const GUEST_RIP.id().encoding().0,
        invd = const ExitReason::INVD.0,
        next = sym run_next,
        failed = sym entry_failed,
    )
}

/// The handling of an exit of a nested guest that sleeps in HLT: the next VM entry delivers an interrupt. At a HLT
/// right after STI, blocking by STI is in effect, and an interrupt can only be injected without blocking (SDM 26.3.1.5,
/// "Checks on Guest Non-Register State").
#[unsafe(naked)]
extern "C" fn waking_exit_handler() {
    naked_asm!(
        "push rax; push rcx",
        "mov eax, {interruptibility}",
        "xor ecx, ecx",
        "vmwrite rax, rcx",
        "mov eax, {event}",
        "mov ecx, {wake}",
        "vmwrite rax, rcx",
        "pop rcx; pop rax",
        "jmp {handler}",
        interruptibility = const GUEST_INTERRUPTIBILITY.id().encoding().0,
        event = const ENTRY_INTERRUPTION_INFO.id().encoding().0,
        wake = const 1_u32 << 31 | WAKE_VECTOR as u32,
        handler = sym exit_handler,
    )
}

extern "C" fn entry_failed() -> ! {
    print(format_args!("C-PANIC VM entry failed"));
    abandon()
}

fn end() -> ! {
    let taken = TAKEN.load(Ordering::Relaxed);
    if taken != REPEATS {
        print(format_args!("C-PANIC {taken} interrupts of {REPEATS} were taken"));
        abandon()
    }
    print(format_args!("{WORD}: done"));
    power_off()
}

/// The nested guest's handler of [`WAKE_VECTOR`].
#[unsafe(naked)]
extern "C" fn interrupt_handler() {
    naked_asm!("inc qword ptr [rip + {taken}]", "iretq", taken = sym TAKEN)
}

extern "C" fn halting_guest() -> ! {
    // SAFETY: this guest's only interrupt goes to `interrupt_handler`, which changes only its counter.
    unsafe {
        counted(7, |_| asm!("sti", "hlt", "cli"));
        asm!("invd", options(noreturn))
    }
}

extern "C" fn nested_guest() -> ! {
    const { assert!(OPERATIONS.len() == 8) };
    // SAFETY: the instructions exit, and change only the named registers of this guest.
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
        // SAFETY: the instruction exchanges a register with itself; only the emulator uses the inputs.
        unsafe { asm!("xchg bx, bx", in("rcx") mark::SIGNATURE, in("rax") low, in("rdx") high) }
    };
    for n in 0..REPEATS as u32 {
        count();
        once(n);
    }
    count();
}
