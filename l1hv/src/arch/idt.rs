//! The host's exceptions. Interrupts are always off in the host, so only the 32 exception vectors have gates.
//!
//! An NMI is a request to the run loop, which passes it on to the guest; a foreseen #GP resumes at its
//! [`super::fixup`]; everything else is a defect of the host and stops the machine with the exception's name and place.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;

use x86_64::VirtAddr;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::DescriptorTablePointer;

use super::enter::landing_after_nmi;
use super::{cpu, fixup};
use crate::processor::{Processor, Requests};
use crate::stop::stop_internal;

const VECTORS: usize = 32;
const VECTOR_NMI: usize = 2;
const VECTOR_DOUBLE_FAULT: usize = 8;
const VECTOR_GENERAL_PROTECTION: usize = 13;
const VECTOR_MACHINE_CHECK: usize = 18;
const RFLAGS_CF: u64 = 1 << 0;

const NAMES: [&str; VECTORS] = [
    "#DE",
    "#DB",
    "NMI",
    "#BP",
    "#OF",
    "#BR",
    "#UD",
    "#NM",
    "#DF",
    "coprocessor segment overrun",
    "#TS",
    "#NP",
    "#SS",
    "#GP",
    "#PF",
    "reserved",
    "#MF",
    "#AC",
    "#MC",
    "#XM",
    "#VE",
    "#CP",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
];

/// The stacks of exceptions, in the order of the TSS's interrupt stack table (IST 1 and up).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum InterruptStack {
    /// An NMI may come at any instruction.
    Nmi = 0,
    /// A double fault is most likely an overflow of the current stack.
    DoubleFault = 1,
    /// A machine check may come at any instruction.
    MachineCheck = 2,
}

impl InterruptStack {
    /// The number of stacks.
    pub const COUNT: usize = 3;
}

/// What the entry stubs leave on the stack, lowest address first.
#[repr(C)]
struct ExceptionFrame {
    general_registers: [u64; 15],
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

// One stub per vector, 16 bytes apart; those without an error code push a zero in its place.
global_asm!(
    ".balign 16",
    "exception_stubs:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    ".if ((0x60227d00 >> vector) & 1) == 0", // vectors 8, 10 to 14, 17, 21, 29 and 30 push an error code
    "push 0",
    ".endif",
    "push vector",
    "jmp exception_common",
    ".set vector, vector + 1",
    ".endr",
    "exception_common:",
    "push rax; push rbx; push rcx; push rdx; push rsi; push rdi; push rbp",
    "push r8; push r9; push r10; push r11; push r12; push r13; push r14; push r15",
    "cld",
    "mov rdi, rsp",
    "call {handler}",
    "pop r15; pop r14; pop r13; pop r12; pop r11; pop r10; pop r9; pop r8",
    "pop rbp; pop rdi; pop rsi; pop rdx; pop rcx; pop rbx; pop rax",
    "add rsp, 16",
    "iretq",
    handler = sym handle,
);

extern "sysv64" fn handle(frame: &mut ExceptionFrame) {
    match frame.vector as usize {
        VECTOR_NMI => {
            this_processor().request(Requests::NMI);
            frame.rip = landing_after_nmi(frame.rip);
        }
        VECTOR_GENERAL_PROTECTION => match fixup::landing(frame.rip) {
            Some(rip) => {
                frame.rip = rip;
                frame.rflags |= RFLAGS_CF;
            }
            None => unexpected(frame),
        },
        _ => unexpected(frame),
    }
}

/// The processor that executes this.
fn this_processor() -> &'static Processor {
    let address: *const Processor;
    // SAFETY: in the host the base of GS is the address of a `Processor` that lives for ever and that holds its own
    // address in the second quadword.
    unsafe {
        asm!("mov {}, gs:[{this}]", out(reg) address, this = const Processor::THIS, options(nostack, preserves_flags, readonly));
        &*address
    }
}

fn unexpected(frame: &ExceptionFrame) -> ! {
    let name = NAMES.get(frame.vector as usize).copied().unwrap_or("unknown");
    stop_internal!(
        "exception {name} (vector {}) at rip {:#x}, rsp {:#x}, error code {:#x}, cr2 {:#x}",
        frame.vector,
        frame.rip,
        frame.rsp,
        frame.error_code,
        cpu::cr2()
    )
}

/// A gate of the IDT. SDM Vol. 3A, 6.14.1 "64-Bit Mode IDT".
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Gate([u64; 2]);

impl Gate {
    const ABSENT: Self = Self([0; 2]);
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e << 40;

    const fn new(handler: u64, code: SegmentSelector, stack: Option<InterruptStack>) -> Self {
        let ist = match stack {
            Some(stack) => stack as u64 + 1,
            None => 0,
        };
        let low = handler & 0xffff
            | (code.0 as u64) << 16
            | ist << 32
            | Self::PRESENT_INTERRUPT_GATE
            | (handler >> 16 & 0xffff) << 48;
        Self([low, handler >> 32])
    }
}

struct IdtCell(UnsafeCell<[Gate; VECTORS]>);

// SAFETY: written once by `fill`, before the table is loaded; only the processor reads it afterwards.
unsafe impl Sync for IdtCell {}

static IDT: IdtCell = IdtCell(UnsafeCell::new([Gate::ABSENT; VECTORS]));

unsafe extern "C" {
    static exception_stubs: u8;
}

/// Fills and loads the IDT; returns its linear address. Called once.
pub(super) fn fill(code: SegmentSelector) -> u64 {
    const STUB_BYTES: u64 = 16;
    let stubs = (&raw const exception_stubs).addr() as u64;
    // SAFETY: called once, before the table is loaded.
    let gates = unsafe { &mut *IDT.0.get() };
    for (vector, gate) in gates.iter_mut().enumerate() {
        let stack = match vector {
            VECTOR_NMI => Some(InterruptStack::Nmi),
            VECTOR_DOUBLE_FAULT => Some(InterruptStack::DoubleFault),
            VECTOR_MACHINE_CHECK => Some(InterruptStack::MachineCheck),
            _ => None,
        };
        *gate = Gate::new(stubs + vector as u64 * STUB_BYTES, code, stack);
    }
    load()
}

/// Loads the IDT; returns its linear address.
pub(super) fn load() -> u64 {
    let base = IDT.0.get().addr() as u64;
    let pointer =
        DescriptorTablePointer { limit: (size_of::<[Gate; VECTORS]>() - 1) as u16, base: VirtAddr::new_truncate(base) };
    // SAFETY: the gates are complete, lead to the stubs above and live for ever.
    unsafe { x86_64::instructions::tables::lidt(&pointer) };
    base
}
