//! The other processors after their start: their state, their VMX capabilities, and a nested guest on each.

use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::code;
use crate::cpu::{cr0, cr4, rdmsr};
use crate::output::Suite;
use crate::smp::{self, Processors};
use crate::vm::Vm;

const IA32_APIC_BASE: u32 = 0x1b;
const IA32_FEATURE_CONTROL: u32 = 0x3a;
/// The capability MSRs of VMX.
const CAPABILITIES: core::ops::RangeInclusive<u32> = 0x480..=0x492;

/// Runs all cases. Ends with every processor in VMX operation.
pub fn run(suite: &mut Suite, processors: &Processors) {
    suite.case("count", processors.count());
    let [behind, too_many, tss @ ..] = smp::faults();
    suite.case("real-mode-fault", format_args!("{behind} {too_many}"));
    suite.case("16-bit-tss-fault", format_args!("{tss:x?}"));
    for number in processors.others() {
        for (name, register) in [("cr0", CR0), ("cr4", CR4), ("apic-id", APIC_ID)] {
            let value = processors.run_on(number, registers, register);
            suite.case(format_args!("{number}-{name}"), format_args!("{value:#x}"));
        }
        for msr in [IA32_APIC_BASE, IA32_FEATURE_CONTROL] {
            let value = processors.run_on(number, msr_value, msr.into());
            suite.case(format_args!("{number}-msr-{msr:#x}"), format_args!("{value:#x}"));
        }
        for msr in CAPABILITIES {
            let is_same = processors.run_on(number, msr_value, msr.into()) == msr_value(msr.into());
            suite.case(format_args!("{number}-has-the-same-msr-{msr:#x}"), is_same);
        }
        suite.case(format_args!("{number}-vmxon"), processors.run_on(number, smp::enter_vmx, 0));
        for word in 0..4 {
            let value = processors.run_on(number, nested_cpuid, word);
            suite.case(format_args!("{number}-nested-cpuid-{word}"), format_args!("{value:#x}"));
        }
    }
    let results = processors.run_on_all(many_nested_cpuids, 0);
    suite.case("all-at-once", format_args!("{:?}", &results[..processors.count()]));
}

const CR0: u64 = 0;
const CR4: u64 = 1;
const APIC_ID: u64 = 2;

fn registers(which: u64) -> u64 {
    match which {
        CR0 => cr0(),
        CR4 => cr4(),
        _ => crate::apic::id() as u64,
    }
}

fn msr_value(msr: u64) -> u64 {
    rdmsr(msr as u32).unwrap_or(u64::MAX)
}

/// Runs a nested guest until its CPUID. Returns one word of the exit that its hypervisor gets.
fn nested_cpuid(word: u64) -> u64 {
    let mut vm = Vm::new(code!("mov eax, 0x77", "cpuid"));
    let _ = vm.run();
    match word {
        0 => vm.get(EXIT_REASON).into(),
        1 => vm.get(GUEST_RIP),
        2 => vm.registers.rax,
        _ => vm.get(EXIT_INSTRUCTION_LENGTH).into(),
    }
}

/// Counts the CPUIDs of a nested guest that exit as they should.
fn many_nested_cpuids(_: u64) -> u64 {
    const COUNT: u64 = 1000;
    let mut vm = Vm::new(code!("2: inc rax", "xchg rax, rdx", "cpuid", "jmp 2b"));
    let mut right = 0;
    for round in 0..COUNT {
        let verdict = vm.run();
        let counted = [vm.registers.rax, vm.registers.rdx].contains(&(round / 2 + 1));
        right += u64::from(verdict.is(ExitReason::CPUID) && counted);
        vm.set(GUEST_RIP, vm.get(GUEST_RIP) + 2);
    }
    right
}
