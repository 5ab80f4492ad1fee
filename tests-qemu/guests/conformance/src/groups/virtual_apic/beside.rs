//! The virtual APIC together with other controls of an access: MSR bitmaps (SDM 26.1.3), EPT12's rights (30.4.1
//! "Priority of APIC-Access VM Exits"); the processor priority after writes of the TPR (30.1.3 "PPR Virtualization");
//! and CR8 without a TPR shadow, which is the processor's own.

use shadow::controls::{Primary, Secondary};
use shadow::fields::*;

use super::{BOTH, DELIVERY, MODES, PAGE, TPR, case, status};
use crate::code;
use crate::cpu::{cr8, invept, set_cr8};
use crate::memory::{MSR_BITMAPS, SPARE, VIRTUAL_APIC};
use crate::nested_paging::WINDOW_PT;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    msr_bitmaps(suite);
    ept_rights(suite);
    processor_priority(suite);
    real_cr8(suite);
}

/// Exits that the MSR bitmap asks for, for MSRs that would else be virtualized.
fn msr_bitmaps(suite: &mut Suite) {
    const WRITES: usize = 0x800 / 8;
    for mode in MODES {
        for msr in 0x800..0x840 {
            for (access, code, half) in [("read", code!("rdmsr"), 0), ("write", code!("wrmsr"), WRITES)] {
                for (other, place) in [("exits", half), ("other-exits", half ^ WRITES)] {
                    let mut vm = Vm::new(code);
                    mode.x2apic(&mut vm);
                    MSR_BITMAPS.set(place + msr / 64, 1 << (msr % 64));
                    (vm.registers.rcx, vm.registers.rax) = (msr as u64, 0x41);
                    case(suite, format_args!("x2apic-bitmap-{}-{access}-{msr:#x}-{other}", mode.name), &mut vm);
                }
            }
        }
    }
}

/// An access that EPT12 does not allow is an EPT violation, also on the APIC-access page.
fn ept_rights(suite: &mut Suite) {
    const WRITE_BACK: u64 = 6 << 3;
    let accesses = [
        ("read", code!("mov eax, [rcx + 0x80]")),
        ("write", code!("mov [rcx + 0x80], eax")),
        ("read-write", code!("lock inc dword ptr [rcx + 0x80]")),
        ("fetch", code!("jmp rcx")),
    ];
    for mode in MODES {
        for rights in 0..8 {
            for (access, code) in accesses {
                let mut vm = Vm::new(code);
                mode.accesses(&mut vm);
                WINDOW_PT.set(PAGE, SPARE.address() | WRITE_BACK | rights);
                let _ = invept(2, [0; 2]);
                case(suite, format_args!("rights-{}-{access}-{rights:03b}", mode.name), &mut vm);
            }
        }
    }
}

/// VPPR as a read returns it after a write of VTPR, with a vector in service.
fn processor_priority(suite: &mut Suite) {
    let page = code!("mov [rcx + 0x80], eax", "mov eax, [rcx + 0xa0]");
    let msr = code!("mov ecx, 0x808", "xor edx, edx", "wrmsr", "mov ecx, 0x80a", "rdmsr");
    for servicing in [0, 0x35, 0x41, 0xff] {
        for requesting in [0, 0x22, 0x61] {
            for tpr in (0..256).step_by(0x10).chain([0x3f, 0x47]) {
                for (way, code) in [("page", page), ("msr", msr)] {
                    let mut vm = Vm::new(code);
                    if way == "page" {
                        BOTH.accesses(&mut vm)
                    } else {
                        BOTH.x2apic(&mut vm)
                    }
                    status(&mut vm, requesting, servicing);
                    vm.registers.rax = tpr;
                    let name = format_args!("priority-{way}-tpr-{tpr:#x}-svi-{servicing:#x}-rvi-{requesting:#x}");
                    case(suite, name, &mut vm);
                }
            }
        }
    }
}

/// The nested guest's CR8 is its hypervisor's, with or without a virtual-APIC page that is not used.
fn real_cr8(suite: &mut Suite) {
    let code = code!("mov rdx, cr8", "mov cr8, rax", "mov rax, cr8");
    for exiting in [Primary::empty(), Primary::CR8_LOAD_EXITING, Primary::CR8_STORE_EXITING] {
        for value in (0..16).chain([16, 1 << 63]) {
            let mut vm = Vm::new(code);
            vm.or(PRIMARY_CONTROLS, exiting);
            VIRTUAL_APIC.set_byte(TPR, 0x90);
            let _ = set_cr8(5);
            vm.registers.rax = value;
            let verdict = vm.run();
            let (rax, rdx, afterwards) = (vm.registers.rax, vm.registers.rdx, cr8());
            let _ = set_cr8(0);
            suite.case(
                format_args!("real-cr8-{value:#x}-exits-{:#x}", exiting.bits()),
                format_args!("{verdict} rax={rax:#x} rdx={rdx:#x} afterwards={afterwards:#x}"),
            );
        }
    }
    // Virtual-interrupt delivery without "virtualize APIC accesses" and without x2APIC mode: the nested guest can use
    // only CR8 of the APIC.
    for value in 0..16 {
        let mut vm = Vm::new(code!("mov cr8, rax", "nop", "mov rax, cr8"));
        DELIVERY.accesses(&mut vm);
        vm.clear(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES);
        vm.or(GUEST_RFLAGS, super::IF);
        VIRTUAL_APIC.set_byte(TPR, 0xf0);
        status(&mut vm, 0x51, 0);
        vm.registers.rax = value;
        case(suite, format_args!("delivery-by-cr8-{value}"), &mut vm);
    }
}
