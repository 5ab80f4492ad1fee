//! Posted-interrupt processing (SDM 30.6). The notification is an interrupt that the processor sends to itself.

use core::fmt;

use shadow::controls::{ExitControls, Pin};
use shadow::fields::*;

use super::super::{flip, values};
use super::{APIC, DELIVERY, IF, TPR, VirtualApic, status};
use crate::apic;
use crate::code;
use crate::fault::take_interrupt;
use crate::groups::entry_events::Delivered;
use crate::memory::{POSTED, VIRTUAL_APIC};
use crate::output::Suite;
use crate::vm::Vm;

const NOTIFICATION: u8 = 0xe2;
/// Outstanding notification, and suppress notification, which only senders read.
const ON: u64 = 1;
const SN: u64 = 1 << 1;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    every_vector(suite);
    combinations(suite);
    sent_by_the_guest(suite);
    flip(suite, "posted-descriptor", POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, 0..64, posting);
    flip(suite, "posted-vector", POSTED_INTERRUPT_NOTIFICATION_VECTOR, 0..16, posting);
    values(suite, "posted-controls", PIN_CONTROLS, [0x16, 0x17, 0x96, 0x97], posting);
    flip(suite, "posted-acknowledge", EXIT_CONTROLS, [15], posting);
}

fn posting(vm: &mut Vm) {
    DELIVERY.accesses(vm);
    POSTED.fill(0);
    vm.or(PIN_CONTROLS, Pin::PROCESS_POSTED_INTERRUPTS);
    vm.or(EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT);
    vm.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, POSTED.address());
    vm.set(POSTED_INTERRUPT_NOTIFICATION_VECTOR, NOTIFICATION.into());
}

fn post(vector: u8) {
    let word = usize::from(vector / 64);
    POSTED.set(word, POSTED.get(word) | 1 << (vector % 64));
}

/// Runs, and prints the verdict, the descriptor, and the interrupt that is still pending at the real APIC.
fn case(suite: &mut Suite, name: impl fmt::Display, vm: &mut Vm) {
    let verdict = vm.run();
    let status = vm.get(GUEST_INTERRUPT_STATUS);
    // An acknowledged interrupt is in service.
    apic::end_of_interrupt();
    let pending = take_interrupt();
    let descriptor: [u64; 5] = core::array::from_fn(|index| POSTED.get(index));
    suite.case(
        name,
        format_args!(
            "{} status={status:#x} descriptor={descriptor:x?} pending={pending:x?}{}",
            Delivered(verdict),
            VirtualApic(|_| 0)
        ),
    );
}

fn every_vector(suite: &mut Suite) {
    for vector in 0..=255 {
        for flags in [0, IF] {
            let mut vm = Vm::new(code!("nop", "nop"));
            posting(&mut vm);
            vm.or(GUEST_RFLAGS, flags);
            post(vector);
            POSTED.set(4, ON);
            apic::interrupt_self(NOTIFICATION);
            case(suite, format_args!("posted-{vector:#x}-if-{}", flags >> 9), &mut vm);
        }
    }
}

/// What was requested before, the TPR, the flags of the descriptor, the activity state, and other interrupts.
fn combinations(suite: &mut Suite) {
    for sent in [0, NOTIFICATION, 0x41, 0xf1] {
        for notice in [0, ON, SN, ON | SN] {
            for requesting in [0, 0x35, 0x85] {
                for (tpr, flags, activity) in [(0, IF, 0), (0x70, IF, 0), (0, 0, 0), (0, IF, 1)] {
                    let mut vm = Vm::new(code!("nop", "nop"));
                    posting(&mut vm);
                    vm.or(GUEST_RFLAGS, flags).set(GUEST_ACTIVITY_STATE, activity);
                    VIRTUAL_APIC.set_byte(TPR, tpr);
                    status(&mut vm, requesting, 0);
                    post(0x62);
                    post(0x30);
                    POSTED.set(4, notice | 0xffff_ff00);
                    if sent != 0 {
                        apic::interrupt_self(sent);
                    }
                    let name = format_args!(
                        "posted-sent-{sent:#x}-notice-{notice}-rvi-{requesting:#x}-tpr-{tpr:#x}-if-{}-activity-{activity}",
                        flags >> 9
                    );
                    case(suite, name, &mut vm);
                }
            }
        }
    }
}

/// The real APIC is mapped for the nested guest.
fn sent_by_the_guest(suite: &mut Suite) {
    for (name, code) in [
        ("notification", code!("mov eax, 0xfee00300", "mov dword ptr [rax], 0x440e2", "nop", "nop", "nop")),
        ("other", code!("mov eax, 0xfee00300", "mov dword ptr [rax], 0x44041", "nop", "nop", "nop")),
        ("hlt", code!("mov eax, 0xfee00300", "cli", "mov dword ptr [rax], 0x440e2", "sti", "hlt", "nop")),
        (
            "twice",
            code!(
                "mov eax, 0xfee00300",
                "cli",
                "mov dword ptr [rax], 0x440e2",
                "mov dword ptr [rax], 0x440e2",
                "sti",
                "nop",
                "nop"
            ),
        ),
    ] {
        for vector in [0, 0x62] {
            let mut vm = Vm::new(code);
            posting(&mut vm);
            vm.or(GUEST_RFLAGS, IF);
            vm.registers.rcx = APIC;
            if vector != 0 {
                post(vector);
            }
            case(suite, format_args!("posted-by-the-guest-{name}-{vector:#x}"), &mut vm);
        }
    }
}
