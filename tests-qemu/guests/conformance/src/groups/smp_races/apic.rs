//! Virtual-APIC pages and posted-interrupt descriptors, edited while the processor delivers from them.

use shadow::controls::{ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;

use super::arena::{self, mine, own};
use super::{FAILS, Race, VMCALL, enter};
use crate::apic::{self, Message};
use crate::code;
use crate::random::Random;
use crate::vm::{Verdict, Vm};

const EXCEPTION: u64 = 0;
const TPR_BELOW_THRESHOLD: u64 = 43;
const VIRTUALIZED_EOI: u64 = 45;
/// A self-IPI with one of the vectors that no APIC delivers.
const APIC_WRITE: u64 = 56;
const WRMSR: u64 = 32;
const RDMSR: u64 = 31;
const INVALID_CONTROLS: u64 = 7;

const TPR: usize = 0x80;
const NOTIFICATION: u8 = 0xe2;
/// "Outstanding notification", in the word after the requests.
const FLAGS: usize = 4;
const OUTSTANDING: u64 = 1;

pub const RACES: &[Race] = &[
    Race {
        name: "tpr",
        build: arena::clear,
        exists: || true,
        prepare: |vm| {
            vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
            vm.set(VIRTUAL_APIC_ADDRESS, mine().address()).set(TPR_THRESHOLD, 7);
        },
        step: |vm, random| {
            vm.registers.rax = random.below(16);
            enter(vm, if random.below(2) == 0 { code!("mov rax, cr8") } else { code!("mov cr8, rax") })
        },
        edit: |random, user| own(user).set(TPR / 8, random.below(256)),
        allowed: &[VMCALL, TPR_BELOW_THRESHOLD, FAILS | INVALID_CONTROLS],
    },
    Race {
        name: "virtual-apic-page",
        build: arena::clear,
        exists: || true,
        prepare: |vm| {
            deliver_virtual_interrupts(vm);
            vm.set(VIRTUAL_APIC_ADDRESS, mine().address());
        },
        step: |vm, random| {
            vm.set(GUEST_INTERRUPT_STATUS, random.below(0x1_0000) as u16);
            access_apic(vm, random)
        },
        // Most registers are 16 bytes apart, with nothing between.
        edit: |random, user| own(user).set(random.below(0x40) as usize * 2, random.below(1 << 32)),
        allowed: &[VMCALL, VIRTUALIZED_EOI, APIC_WRITE, RDMSR, WRMSR, EXCEPTION],
    },
    Race {
        name: "posted-interrupts",
        build: arena::clear,
        exists: || true,
        prepare: |vm| {
            deliver_virtual_interrupts(vm);
            vm.or(PIN_CONTROLS, Pin::PROCESS_POSTED_INTERRUPTS);
            vm.or(EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT);
            vm.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, mine().address());
            vm.set(POSTED_INTERRUPT_NOTIFICATION_VECTOR, NOTIFICATION.into());
        },
        step: access_apic,
        edit: |random, user| {
            own(user).set(random.below(4) as usize, 1 << random.below(64));
            own(user).set(FLAGS, random.below(4) | OUTSTANDING);
            apic::send(user * 2, Message::Interrupt(NOTIFICATION));
        },
        allowed: &[VMCALL, VIRTUALIZED_EOI, APIC_WRITE, RDMSR, WRMSR, EXCEPTION],
    },
];

fn deliver_virtual_interrupts(vm: &mut Vm) {
    vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING);
    vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
    let secondary = Secondary::VIRTUALIZE_X2APIC_MODE
        | Secondary::APIC_REGISTER_VIRTUALIZATION
        | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
    vm.or(SECONDARY_CONTROLS, secondary);
    vm.set(EOI_EXIT_BITMAP_1, 0xffff_0000_ffff);
}

/// TPR, EOI, self-IPI, a register that is only read.
fn access_apic(vm: &mut Vm, random: &mut Random) -> Verdict {
    vm.registers.rcx = [0x808, 0x80b, 0x83f, 0x810][random.below(4) as usize];
    (vm.registers.rax, vm.registers.rdx) = (random.below(256), 0);
    enter(
        vm,
        if random.below(2) == 0 { code!("sti", "nop", "rdmsr", "nop") } else { code!("sti", "nop", "wrmsr", "nop") },
    )
}
