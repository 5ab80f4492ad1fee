//! Exits of a nested guest that no bare machine has: what the guest hypervisor hears of them.

use super::program::{self, Op};
use crate::controls::Secondary;
use crate::exit::{ExitReason, InterruptionInfo};
use crate::fake::{FakeMachine, Variant, hypervisor_registers};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::nested::{Running, VmcsPair};
use ept::Gpa;
use ept::violation::EptViolation;
use std::vec;
use std::vec::Vec;

/// A nested guest that is being entered, with these fields beside those of the programs' prologue.
fn entered(fields: &[(FieldId, u64)]) -> FakeMachine {
    entered_after(fields, |_| ())
}

/// The same, after something that the host or the hypervisor does first.
pub fn entered_after(fields: &[(FieldId, u64)], prepare: impl FnOnce(&mut FakeMachine)) -> FakeMachine {
    let variant = Variant { shadowing: false, ..Variant::default() };
    let mut machine = FakeMachine::new(&hypervisor_registers(), program::memory(), variant);
    let writes = fields.iter().map(|&(id, value)| Op::Write(id, value));
    for op in program::prologue().into_iter().chain(writes) {
        match op {
            Op::Write(id, value) => machine.vmwrite(id, value).unwrap(),
            Op::Load(number) => machine.vmptrld(program::VMCS_REGIONS[number]).unwrap(),
            Op::Store(at, word) => machine.vcpu.memory.write_u64(Gpa(at), word),
            _ => (),
        }
    }
    prepare(&mut machine);
    machine.exit(ExitReason::VMLAUNCH, 0).unwrap();
    assert_eq!(machine.vcpu.running, Running::Entering);
    machine
}

fn read(machine: &mut FakeMachine, fields: &[FieldId]) -> Vec<u64> {
    fields.iter().map(|&id| machine.vmread(id).unwrap()).collect()
}

/// Without EPT12, the nested guest's physical addresses are the guest hypervisor's, which end where EPT01 does.
#[test]
fn an_address_beyond_the_width_is_a_page_fault_of_a_nested_guest_without_ept() {
    const RESERVED_WRITE: u64 = 0b1011;
    let exception =
        [EXIT_REASON.id(), EXIT_INTERRUPTION_INFO.id(), EXIT_INTERRUPTION_ERROR_CODE.id(), EXIT_QUALIFICATION.id()];
    let write = EptViolation::LINEAR_ADDRESS_IS_VALID | EptViolation::IS_TRANSLATION | EptViolation::WRITE;
    let mask = (PAGE_FAULT_ERROR_CODE_MASK.id(), 0b1000);
    for (bitmap, matches, exits) in [(1 << 14, 0b1000, true), (1 << 14, 0, false), (0, 0, true), (0, 0b1000, false)] {
        let mut machine = entered(&[
            (SECONDARY_CONTROLS.id(), Secondary::ENABLE_VPID.bits().into()),
            (EXCEPTION_BITMAP.id(), bitmap),
            mask,
            (PAGE_FAULT_ERROR_CODE_MATCH.id(), matches),
        ]);
        let vmcs02 = &mut machine.vcpu.vmcs.vmcs02;
        vmcs02.poke(GUEST_PHYSICAL_ADDRESS.id(), 1 << 47);
        vmcs02.poke(GUEST_LINEAR_ADDRESS.id(), 0x7777);
        machine.nested_exit(ExitReason::EPT_VIOLATION, write.0);
        let info = if exits {
            assert_eq!(machine.vcpu.running, Running::GuestHypervisor);
            let seen = read(&mut machine, &exception);
            assert_eq!([seen[0], seen[2], seen[3]], [0, RESERVED_WRITE, 0x7777]);
            seen[1] as u32
        } else {
            assert_eq!(machine.vcpu.running, Running::NestedGuest);
            let vmcs02 = &machine.vcpu.vmcs.vmcs02;
            assert_eq!(u64::from(vmcs02.read(ENTRY_EXCEPTION_ERROR_CODE)), RESERVED_WRITE);
            vmcs02.read(ENTRY_INTERRUPTION_INFO)
        };
        assert_eq!(InterruptionInfo(info).vector(), 14);
        assert!(InterruptionInfo(info).is_valid());
    }
}

/// Were the fault delivered, the exit would come again and again.
#[test]
fn an_address_beyond_the_width_in_the_delivery_of_an_exception_is_a_triple_fault() {
    let mut machine = entered(&[(SECONDARY_CONTROLS.id(), 0)]);
    let vmcs02 = &mut machine.vcpu.vmcs.vmcs02;
    vmcs02.poke(GUEST_PHYSICAL_ADDRESS.id(), 1 << 47);
    vmcs02.poke(IDT_VECTORING_INFO.id(), 0x8000_0b0e);
    machine.nested_exit(ExitReason::EPT_VIOLATION, EptViolation::LINEAR_ADDRESS_IS_VALID.0);
    assert_eq!(read(&mut machine, &[EXIT_REASON.id()]), vec![u64::from(ExitReason::TRIPLE_FAULT.0)]);
}

/// A processor in enclave mode says so in the reason of each exit (SDM 25.9.1 "Basic VM-Exit Information").
#[test]
fn an_exit_from_an_enclave_goes_where_its_basic_reason_goes() {
    const FROM_ENCLAVE: u32 = 1 << 27;
    let mut machine = entered(&[(SECONDARY_CONTROLS.id(), Secondary::ENABLE_VPID.bits().into())]);
    machine.vcpu.vmcs.vmcs02.poke(GUEST_PHYSICAL_ADDRESS.id(), 0x1000);
    let read = EptViolation::LINEAR_ADDRESS_IS_VALID | EptViolation::READ;
    machine.nested_exit(ExitReason(ExitReason::EPT_VIOLATION.0 | FROM_ENCLAVE), read.0);
    assert_eq!(machine.vcpu.running, Running::NestedGuest);
    let mut machine = entered(&[]);
    machine.nested_exit(ExitReason(84 | FROM_ENCLAVE), 0x174);
    assert_eq!(machine.vcpu.running, Running::NestedGuest);
}

/// The guest hypervisor is told that the processor lacks these instructions, whatever its bitmap says of the MSR.
#[test]
fn an_instruction_that_the_guest_hypervisor_is_told_of_not_is_undefined_in_its_nested_guest() {
    const UD: u8 = 6;
    for number in [76, 77, 80, 81, 84, 85] {
        let mut machine = entered(&[]);
        machine.nested_exit(ExitReason(number), 0x174);
        assert_eq!(machine.vcpu.running, Running::NestedGuest, "{number}");
        let info = InterruptionInfo(machine.vcpu.vmcs.vmcs02().read(ENTRY_INTERRUPTION_INFO));
        assert!(info.is_valid() && info.vector() == UD, "{number}");
        let mut machine = entered(&[(EXCEPTION_BITMAP.id(), 1 << UD)]);
        machine.nested_exit(ExitReason(number), 0x174);
        let seen = read(&mut machine, &[EXIT_REASON.id(), EXIT_INTERRUPTION_INFO.id()]);
        assert_eq!((seen[0], InterruptionInfo(seen[1] as u32).vector()), (0, UD), "{number}");
    }
}
