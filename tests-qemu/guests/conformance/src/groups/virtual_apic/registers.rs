//! Accesses to the APIC-access page (SDM 30.4), at every offset, of every width, for each set of controls.

use shadow::fields::*;

use super::{APIC, MODES, Mode, PAGE, VirtualApic};
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::nested_paging::WINDOW;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    let accesses = [
        ("read-8", code!("mov al, [rcx]")),
        ("read-16", code!("mov ax, [rcx]")),
        ("read-32", code!("mov eax, [rcx]")),
        ("read-64", code!("mov rax, [rcx]")),
        ("write-8", code!("mov [rcx], al")),
        ("write-16", code!("mov [rcx], ax")),
        ("write-32", code!("mov [rcx], eax")),
        ("write-64", code!("mov [rcx], rax")),
    ];
    for mode in MODES {
        for (access, code) in accesses {
            for offset in (0..0x1000).step_by(0x10) {
                one(suite, mode, access, code, offset);
            }
            // Within a register, across its end, and between two registers.
            for offset in [TPR_REGISTER, EOI, ISR_FIRST, ICR_LOW, TIMER_DIVIDE] {
                for distance in 1..0x10 {
                    one(suite, mode, access, code, offset + distance);
                }
            }
        }
        several(suite, mode);
        by_the_processor(suite, mode);
    }
}

const TPR_REGISTER: u64 = 0x80;
const EOI: u64 = 0xb0;
const ISR_FIRST: u64 = 0x100;
const ICR_LOW: u64 = 0x300;
const TIMER_DIVIDE: u64 = 0x3e0;

/// The content of the virtual-APIC page: each register has another value.
fn pattern(index: usize) -> u64 {
    (index as u64 + 1) * 0x0101_0001_0003_0011
}

fn one(suite: &mut Suite, mode: Mode, access: &str, code: u64, offset: u64) {
    let mut vm = Vm::new(code);
    mode.accesses(&mut vm);
    for index in 0..512 {
        VIRTUAL_APIC.set(index, pattern(index));
    }
    vm.registers.rcx = APIC + offset;
    // A value that, written to ICR, sends an interrupt to this processor.
    vm.registers.rax = 0x1122_3344_0004_0041;
    let verdict = vm.run();
    let (rax, status) = (vm.registers.rax, vm.get(GUEST_INTERRUPT_STATUS));
    suite.case(
        format_args!("registers-{}-{access}-{offset:#x}", mode.name),
        format_args!("{verdict} rax={rax:#x} status={status:#x}{}", VirtualApic(pattern)),
    );
}

/// Instructions that access the page more than once, or read and write.
fn several(suite: &mut Suite, mode: Mode) {
    for (name, code) in [
        ("read-write", code!("lock or dword ptr [rcx], 0x20")),
        ("exchange", code!("xchg [rcx], eax")),
        ("compare-exchange-8", code!("lock cmpxchg8b [rcx]")),
        ("push", code!("lea rsp, [rcx + 8]", "push rax")),
        ("push-16", code!("lea rsp, [rcx + 2]", "push ax")),
        ("load-string", code!("mov rsi, rcx", "mov ecx, 3", "rep lodsd")),
        ("move-string", code!("mov rsi, rcx", "mov rdi, rcx", "movsd")),
        ("store-string", code!("mov rdi, rcx", "mov ecx, 3", "rep stosd")),
        ("call-through", code!("call qword ptr [rcx]")),
        ("clflush", code!("clflush [rcx]")),
        ("xmm", code!("movups xmm0, [rcx]")),
        ("fetch", code!("jmp rcx")),
    ] {
        for offset in [0x20, TPR_REGISTER, EOI, ISR_FIRST, ICR_LOW, 0x310, 0x380, 0x400] {
            one(suite, mode, name, code, offset);
        }
    }
}

/// Accesses that are not operands of an instruction: the delivery of an event, a walk of the guest's page tables.
fn by_the_processor(suite: &mut Suite, mode: Mode) {
    for (name, info) in [("exception", 0x8000_0306), ("interrupt", 0x8000_0041), ("software", 0x8000_0480)] {
        let mut vm = Vm::new(code!("nop"));
        mode.accesses(&mut vm);
        vm.or(GUEST_RFLAGS, super::IF).set(GUEST_RSP, APIC + 0x90);
        vm.set(ENTRY_INTERRUPTION_INFO, info).set(ENTRY_INSTRUCTION_LENGTH, 2);
        let verdict = vm.run();
        suite.case(format_args!("delivery-on-the-page-{}-{name}", mode.name), verdict);
    }
    let mut vm = Vm::new(code!("nop"));
    mode.accesses(&mut vm);
    vm.set(GUEST_CR3, WINDOW + PAGE as u64 * 4096);
    let verdict = vm.run();
    suite.case(format_args!("walk-on-the-page-{}", mode.name), verdict);
}
