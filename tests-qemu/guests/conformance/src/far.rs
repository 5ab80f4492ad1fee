//! With the argument `far`, on a processor with more physical-address bits than four levels of EPT map: what comes of
//! addresses that have them. A bare machine finds no memory there; a host tells of a narrower processor.

use core::arch::x86_64::__cpuid;

use shadow::controls::Secondary;
use shadow::fields::*;

use crate::cpu::{rdmsr, vmptrld, wrmsr};
use crate::memory::{OPERANDS, VMCS, WINDOW, host_cr3, set_window};
use crate::minimal::enter_vmx_operation;
use crate::output::{power_off, print};
use crate::vm::Vm;
use crate::{attempt, code};

/// The argument.
pub const WORD: &str = "far";

const FAR: u64 = 1 << 48;
/// The page of [`WINDOW`] that leads there: an address that differs from one in use by that bit only.
const PAGE: u64 = 4;

/// Tries, and switches the machine off.
pub fn run() -> ! {
    const IA32_APIC_BASE: u32 = 0x1b;
    const PRESENT_WRITE: u64 = 3;
    print(format_args!("{WORD}: {} bits", __cpuid(0x8000_0008).eax & 0xff));
    OPERANDS.set(0, 0x1234_5678);
    set_window(PAGE as usize, FAR | OPERANDS.address() | PRESENT_WRITE);
    let linear = WINDOW + PAGE * 0x1000;
    print(format_args!(
        "{WORD}: read: {}",
        attempt!("mov {value}, [{linear}]"; value = out(reg) _, linear = in(reg) linear)
    ));
    print(format_args!("{WORD}: write: {}", attempt!("mov [{linear}], {linear}"; linear = in(reg) linear)));
    print(format_args!("{WORD}: near memory holds {:#x}", OPERANDS.get(0)));
    let apic_base = rdmsr(IA32_APIC_BASE).unwrap_or(0);
    print(format_args!("{WORD}: APIC: {}", wrmsr(IA32_APIC_BASE, apic_base | FAR)));
    print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
    print(format_args!("{WORD}: VMPTRLD: {}", vmptrld(VMCS.address() | FAR)));
    let mut vm = Vm::new(code!("mov rax, [rsi]"));
    vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
    vm.set(GUEST_CR3, host_cr3());
    vm.registers.rsi = linear;
    let verdict = vm.run();
    print(format_args!("{WORD}: a nested guest without EPT: {verdict}"));
    power_off()
}
