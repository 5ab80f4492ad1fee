//! Traps on the instructions that write registers of the guest hypervisor which its nested guest's exits load: see
//! [`crate::write_trap`].
//!
//! The guest hypervisor does not notice the traps. The exit of a caught instruction removes the trap, and the
//! instruction is executed again without it.

use crate::VmxCaps;
use crate::controls::{Control, Primary, Secondary};
use crate::fields::*;
use crate::host_load::{Kept, TRAPPED_MSRS};
use crate::hw::VmcsAccess;
use crate::write_trap::WriteTrap;

use super::machine::{Machine, VmcsPair};
use super::vcpu::{Action, Vcpu};

/// The registers that a caught instruction writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrappedWrite {
    /// DR7 or one of [`TRAPPED_MSRS`].
    Registers,
    /// TR, LDTR, GDTR or IDTR. Instructions that read one of them are caught too.
    Tables,
}

/// The initial traps on a processor with these capabilities.
pub fn kept_at_first(caps: &VmxCaps) -> Kept {
    let trap = |control| if caps.may_be_1(control) { WriteTrap::new() } else { WriteTrap::impossible() };
    Kept {
        registers: trap(Control::Primary(Primary::MOV_DR_EXITING)),
        tables: trap(Control::Secondary(Secondary::DESCRIPTOR_TABLE_EXITING)),
        interruptibility: u32::MAX,
        stack_rights: u32::MAX,
    }
}

fn set_trap<M: Machine>(vcpu: &mut Vcpu<M>, what: TrappedWrite, set: bool) {
    let bitmap = vcpu.msr_bitmaps01[usize::from(set)];
    let vmcs01 = vcpu.vmcs.vmcs01();
    match what {
        TrappedWrite::Registers => {
            let others = vmcs01.read(PRIMARY_CONTROLS) - Primary::MOV_DR_EXITING;
            vmcs01.write(PRIMARY_CONTROLS, others | if set { Primary::MOV_DR_EXITING } else { Primary::empty() });
            vmcs01.write(MSR_BITMAP, bitmap.0);
        }
        TrappedWrite::Tables => {
            let others = vmcs01.read(SECONDARY_CONTROLS) - Secondary::DESCRIPTOR_TABLE_EXITING;
            let control = if set { Secondary::DESCRIPTOR_TABLE_EXITING } else { Secondary::empty() };
            vmcs01.write(SECONDARY_CONTROLS, others | control);
        }
    }
}

/// Loads the registers that no trap protects, and sets the traps that are due.
#[cold]
pub fn load<M: Machine>(vcpu: &mut Vcpu<M>, registers_hold: bool, tables_hold: bool) {
    if !registers_hold {
        vcpu.nested.host_image.load_registers(vcpu.vmcs.vmcs01());
        if vcpu.nested.kept.registers.loaded() {
            set_trap(vcpu, TrappedWrite::Registers, true);
        }
    }
    if !tables_hold {
        vcpu.nested.host_image.load_tables(vcpu.vmcs.vmcs01());
        if vcpu.nested.kept.tables.loaded() {
            set_trap(vcpu, TrappedWrite::Tables, true);
        }
    }
}

/// Whether a trap made this WRMSR exit.
pub fn has_caught<M: Machine>(vcpu: &Vcpu<M>, msr: u32) -> bool {
    vcpu.nested.kept.registers.is_set() && TRAPPED_MSRS.contains(&msr)
}

/// Handles the exit of a caught instruction.
pub fn spring<M: Machine>(vcpu: &mut Vcpu<M>, what: TrappedWrite) -> Action {
    match what {
        TrappedWrite::Registers => vcpu.nested.kept.registers.sprung(),
        TrappedWrite::Tables => vcpu.nested.kept.tables.sprung(),
    }
    set_trap(vcpu, what, false);
    Action::Resume
}
