//! I/O ports that the host looks at, for the guest hypervisor and for nested guests alike: there are a few on some
//! machines, and all others are the guests'.
//!
//! vmcs01 uses I/O bitmaps of the host's. In vmcs02 it depends on VMCS12:
//!
//! | VMCS12 | vmcs02 |
//! |---|---|
//! | unconditional I/O exiting | the same: the guest hypervisor gets every exit |
//! | neither control | the host's bitmaps |
//! | I/O bitmaps | both together, merged again after a write ([`crate::watch`]) |

use crate::Vmcs12;
use crate::controls::Primary;
use crate::exit::{ExitReason, IoAccess};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::outcome::Fault;
use crate::registers::{RAX, RCX};
use crate::watch::MergedAs;
use ept::{Gpa, Hpa};

use super::fault::raise;
use super::held_ports::{Bitmaps02, HeldPorts, PORTS_OF_A_BITMAP, bits, set_bits};
use super::machine::{Machine, VmcsPair};
use super::reflect::{Reflected, complete_instruction, reflect};
use super::vcpu::{Action, Vcpu};
use super::watching::merged;

/// I/O bitmap A is of ports 0 to 7FFFH, B of the others.
const KINDS: [MergedAs; 2] = [MergedAs::IoBitmapA, MergedAs::IoBitmapB];

/// The bitmap of vmcs02 that stands for VMCS12's `bitmap12`. To be called before the EPTP of vmcs02 is determined,
/// because EPT01 may permit less afterwards.
fn merge_one<M: Machine>(held: &mut HeldPorts, vcpu: &mut Vcpu<M>, number: usize, bitmap12: Gpa) -> Hpa {
    if bits(&held.ports, number).next().is_none() {
        return vcpu.memory.translate(bitmap12);
    }
    let HeldPorts { ports, merged: copies, .. } = held;
    merged(vcpu, KINDS[number], bitmap12, &mut copies[number], |bytes| set_bits(ports, number, bytes))
}

/// Merges VMCS12's bitmaps where it has any. Nothing if vmcs02 has what VMCS12 has.
pub fn merge<M: Machine>(vcpu: &mut Vcpu<M>) -> Option<Bitmaps02> {
    let held = vcpu.nested.ports.take()?;
    let controls = vcpu.vmx.vmcs12.get(PRIMARY_CONTROLS);
    let bitmaps02 = if controls.contains(Primary::USE_IO_BITMAPS) {
        let bitmaps12 = [IO_BITMAP_A, IO_BITMAP_B].map(|field| Gpa(vcpu.vmx.vmcs12.get(field)));
        let addresses = [0, 1].map(|number| merge_one(held, vcpu, number, bitmaps12[number]));
        Some(Bitmaps02 { addresses, are_merged: true })
    } else {
        let is_any = controls.contains(Primary::UNCONDITIONAL_IO_EXITING);
        (!is_any).then_some(Bitmaps02 { addresses: held.host, are_merged: false })
    };
    vcpu.nested.ports = Some(held);
    bitmaps02
}

/// An I/O instruction of the guest hypervisor.
pub fn of_guest_hypervisor<M: Machine>(vcpu: &mut Vcpu<M>) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let access = IoAccess(vmcs01.read(EXIT_QUALIFICATION));
    let count = count_register(vmcs01.read(EXIT_INSTRUCTION_INFO));
    match carry_out(vcpu, access, count) {
        Ok(()) => Action::Advance,
        Err(fault) => Action::Inject(fault),
    }
}

/// An I/O instruction of a nested guest whose hypervisor lets some through.
#[cold]
pub fn of_nested_guest<M: Machine>(vcpu: &mut Vcpu<M>) {
    let access = IoAccess(vcpu.vmcs.vmcs02().read(EXIT_QUALIFICATION));
    if vcpu.nested.ports.is_none() || intercepts(&vcpu.vmx.vmcs12, &vcpu.memory, access) {
        return reflect(vcpu, Reflected::AsTaken(ExitReason::IO_INSTRUCTION));
    }
    let count = count_register(vcpu.vmcs.vmcs02().read(EXIT_INSTRUCTION_INFO));
    match carry_out(vcpu, access, count) {
        Ok(()) => complete_instruction(vcpu),
        Err(fault) => raise(vcpu, fault),
    }
}

/// Whether VMCS12 makes an access exit (SDM 26.1.3 "Instructions That Cause VM Exits Conditionally").
fn intercepts(vmcs12: &Vmcs12, memory: &impl GuestMemory, access: IoAccess) -> bool {
    let controls = vmcs12.get(PRIMARY_CONTROLS);
    if !controls.contains(Primary::USE_IO_BITMAPS) {
        return controls.contains(Primary::UNCONDITIONAL_IO_EXITING);
    }
    let first = u32::from(access.port());
    let ports = first..first + u32::from(access.bytes());
    ports.end > 2 * PORTS_OF_A_BITMAP
        || ports.into_iter().any(|port| {
            let field = if port < PORTS_OF_A_BITMAP { IO_BITMAP_A } else { IO_BITMAP_B };
            let mut byte = [0];
            memory.read(Gpa(vmcs12.get(field)) + u64::from(port % PORTS_OF_A_BITMAP / 8), &mut byte);
            byte[0] >> (port % 8) & 1 != 0
        })
}

/// The bits of RCX that count the repetitions of INS or OUTS, by the address size in the instruction information (SDM
/// Table 28-8).
const fn count_register(information: u32) -> u64 {
    match information >> 7 & 7 {
        0 => 0xffff,
        1 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Carries out IN or OUT on behalf of the guest that runs. DEVIATION: INS and OUTS of these ports are #GP; no software
/// uses them there. With a prefix and a `count` of 0 they do nothing.
fn carry_out<M: Machine>(vcpu: &mut Vcpu<M>, access: IoAccess, count: u64) -> Result<(), Fault> {
    if access.is_string() {
        let is_nothing = access.is_repeated() && vcpu.registers[RCX] & count == 0;
        return if is_nothing { Ok(()) } else { Err(Fault::GeneralProtection) };
    }
    let old = vcpu.registers[RAX];
    let mask = u32::MAX >> (32 - 8 * u32::from(access.bytes()));
    let value = vcpu.machine.access_port(access, old as u32 & mask);
    if access.is_in() {
        // Four bytes clear the upper half of RAX; fewer leave the rest.
        let kept = if access.bytes() == 4 { 0 } else { old & !u64::from(mask) };
        vcpu.registers[RAX] = kept | u64::from(value & mask);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::InterruptionInfo;
    use crate::fake::{FakeMachine, skylake_caps};
    use crate::msr::BITMAP_BYTES;
    use crate::nested::Running;
    use crate::nested::tests::host_made::entered_after;
    use crate::policy::IoExits;
    use crate::watch::MergedBitmap;
    use arrayvec::ArrayVec;
    use std::boxed::Box;
    use std::vec;

    const PORT: u16 = 0x1805;
    const HOST: [Hpa; 2] = [Hpa(0x66_0000_0000), Hpa(0x66_0000_1000)];
    const BITMAPS12: [u64; 2] = [0xa000, 0xb000];

    /// A nested guest of a machine with one port that the host looks at.
    fn entered(controls: Primary, prepare: impl FnOnce(&mut FakeMachine)) -> FakeMachine {
        let bitmap = |number: u64| MergedBitmap { bytes: vec![0; BITMAP_BYTES].leak(), address: Hpa(number << 12) };
        let merged = [0, 1].map(|half| core::array::from_fn(|slot| bitmap(0x66_1000 + half * 0x100 + slot as u64)));
        let controls =
            Primary::from_bits_retain(skylake_caps().primary.must_be_1) | Primary::ACTIVATE_SECONDARY | controls;
        let fields = [
            (PRIMARY_CONTROLS.id(), u64::from(controls.bits())),
            (IO_BITMAP_A.id(), BITMAPS12[0]),
            (IO_BITMAP_B.id(), BITMAPS12[1]),
        ];
        entered_after(&fields, |machine| {
            let held = HeldPorts::new(ArrayVec::from_iter([PORT]), HOST, merged);
            machine.vcpu.nested.ports = Some(Box::leak(Box::new(held)));
            prepare(machine);
        })
    }

    /// OUT to the port, or with `1 << 3` IN from it.
    fn exit(machine: &mut FakeMachine, flags: u64) {
        machine.vcpu.registers[RAX] = 0x1_2345_6789;
        machine.nested_exit(ExitReason::IO_INSTRUCTION, u64::from(PORT) << 16 | flags);
    }

    fn intercepts02(machine: &mut FakeMachine, port: u16) -> bool {
        let address = machine.vcpu.vmcs.vmcs02().read(IO_BITMAP_A);
        let ports = machine.vcpu.nested.ports.as_ref().unwrap();
        let merged = ports.merged[0].iter().find(|merged| merged.address.0 == address).unwrap();
        merged.bytes[usize::from(port / 8)] >> (port % 8) & 1 != 0
    }

    #[test]
    fn the_bits_of_ports_lie_where_the_sdm_puts_them() {
        let (mut a, mut b) = ([0; BITMAP_BYTES], [0; BITMAP_BYTES]);
        HeldPorts::intercept(&[0, 0x7fff, 0x8000, 0xb005], [&mut a, &mut b]);
        assert_eq!((a[0], a[0xfff], b[0], b[0x3005 / 8]), (1, 0x80, 1, 0x20));
        assert_eq!(a.iter().chain(&b).map(|byte| byte.count_ones()).sum::<u32>(), 4);
    }

    #[test]
    fn without_io_exiting_vmcs02_has_the_bitmaps_of_the_host_and_the_host_carries_out_what_exits() {
        let mut machine = entered(Primary::empty(), |_| ());
        let vmcs02 = machine.vcpu.vmcs.vmcs02();
        assert!(vmcs02.read(PRIMARY_CONTROLS).contains(Primary::USE_IO_BITMAPS));
        assert_eq!([vmcs02.read(IO_BITMAP_A), vmcs02.read(IO_BITMAP_B)], HOST.map(|address| address.0));
        assert_eq!(machine.vmread(PRIMARY_CONTROLS.id()).unwrap() >> 25 & 1, 0);
        exit(&mut machine, 1);
        let accesses = machine.vcpu.machine.port_accesses.take();
        assert_eq!((accesses.len(), accesses[0].0.port(), accesses[0].1), (1, PORT, 0x6789));
        assert_eq!((machine.vcpu.running, machine.vcpu.registers[RAX]), (Running::NestedGuest, 0x1_2345_6789));
        for (flags, rax) in [(1 << 3, 0x1_2345_67ff), (1 << 3 | 1, 0x1_2345_ffff), (1 << 3 | 3, 0xffff_ffff)] {
            exit(&mut machine, flags);
            assert_eq!(machine.vcpu.registers[RAX], rax, "{flags:x}");
        }
        machine.vcpu.machine.port_accesses.take();
        exit(&mut machine, 1 << 4);
        assert!(machine.vcpu.machine.port_accesses.take().is_empty(), "OUTS is #GP");
        let faults = |machine: &mut FakeMachine| {
            InterruptionInfo(machine.vcpu.vmcs.vmcs02().read(ENTRY_INTERRUPTION_INFO)).is_valid()
        };
        assert!(faults(&mut machine));
        // By address size: CX is 0, ECX is not; then both are.
        for (size, count, is_nothing) in
            [(0, 0x1_0000, true), (1, 0x1_0000, false), (1, 1 << 32, true), (2, 1 << 32, false)]
        {
            let vmcs02 = machine.vcpu.vmcs.vmcs02();
            vmcs02.write(ENTRY_INTERRUPTION_INFO, 0);
            vmcs02.write(EXIT_INSTRUCTION_INFO, size << 7);
            machine.vcpu.registers[RCX] = count;
            exit(&mut machine, 1 << 4 | 1 << 5);
            assert_eq!(faults(&mut machine), !is_nothing, "size {size}, count {count:x}");
        }
        assert!(machine.vcpu.machine.port_accesses.take().is_empty());
    }

    #[test]
    fn with_unconditional_io_exiting_every_exit_is_the_guest_hypervisors() {
        let mut machine = entered(Primary::UNCONDITIONAL_IO_EXITING, |_| ());
        assert!(!machine.vcpu.vmcs.vmcs02().read(PRIMARY_CONTROLS).contains(Primary::USE_IO_BITMAPS));
        assert_eq!(machine.vcpu.nested.shortcut.io, IoExits::GuestHypervisors);
        exit(&mut machine, 1);
        assert_eq!(machine.vcpu.running, Running::GuestHypervisor);
    }

    #[test]
    fn bitmaps_of_the_guest_hypervisor_are_merged_and_merged_again_after_a_write() {
        const OTHER: u16 = 0x60;
        let write = |machine: &mut FakeMachine, port: u16| {
            machine.vcpu.memory.write(Gpa(BITMAPS12[0] + u64::from(port / 8)), &[1 << (port % 8)]);
        };
        let mut machine = entered(Primary::USE_IO_BITMAPS, |machine| write(machine, OTHER));
        assert!(intercepts02(&mut machine, PORT) && intercepts02(&mut machine, OTHER));
        assert!(!intercepts02(&mut machine, OTHER + 1));
        assert_eq!(machine.vcpu.vmcs.vmcs02().read(IO_BITMAP_B), BITMAPS12[1], "none of the host's is in it");
        exit(&mut machine, 0);
        assert_eq!(machine.vcpu.machine.port_accesses.take().len(), 1);
        // The guest hypervisor wants the port now.
        machine.nested_exit(ExitReason::CPUID, 0);
        write(&mut machine, PORT);
        write(&mut machine, OTHER + 8);
        machine.exit(ExitReason::VMRESUME, 0).unwrap();
        assert!(intercepts02(&mut machine, PORT) && intercepts02(&mut machine, OTHER + 8));
        exit(&mut machine, 0);
        assert_eq!(machine.vcpu.running, Running::GuestHypervisor);
        assert!(machine.vcpu.machine.port_accesses.take().is_empty());
    }

    #[test]
    fn an_instruction_that_the_host_carries_out_is_followed_by_the_monitor_trap_flag() {
        let mut machine = entered(Primary::MONITOR_TRAP_FLAG, |_| ());
        exit(&mut machine, 1);
        assert_eq!(machine.vcpu.machine.port_accesses.take().len(), 1);
        assert_eq!(machine.vmread(EXIT_REASON.id()), Ok(ExitReason::MONITOR_TRAP_FLAG.0.into()));
    }
}
