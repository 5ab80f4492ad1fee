//! Traps on the instructions that write registers of the guest hypervisor which its nested guest's exits load: see [`shadow::write_trap`].
//!
//! The guest hypervisor does not notice them. An instruction that is caught takes the trap away, and is executed again without it.

use shadow::VmxCaps;
use shadow::controls::{Control, Primary, Secondary};
use shadow::fields::*;
use shadow::host_load::{Kept, TRAPPED_MSRS};
use shadow::hw::VmcsAccess;
use shadow::write_trap::WriteTrap;

use crate::exit::Action;
use crate::vcpu::Vcpu;

/// What a caught instruction writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrappedWrite {
    /// DR7 or one of [`TRAPPED_MSRS`].
    Registers,
    /// TR, LDTR, GDTR or IDTR; or it reads one of them.
    Tables,
}

impl Vcpu {
    /// What its exits keep at first, on a processor with these capabilities.
    pub fn kept_at_first(caps: &VmxCaps) -> Kept {
        let trap = |control| if caps.may_be_1(control) { WriteTrap::new() } else { WriteTrap::impossible() };
        Kept {
            registers: trap(Control::Primary(Primary::MOV_DR_EXITING)),
            tables: trap(Control::Secondary(Secondary::DESCRIPTOR_TABLE_EXITING)),
            interruptibility: u32::MAX,
            stack_rights: u32::MAX,
        }
    }

    fn set_trap(&mut self, what: TrappedWrite, set: bool) {
        let bitmap = self.msr_bitmaps01[usize::from(set)];
        let mut vmcs01 = self.vmcs.vmcs01();
        match what {
            TrappedWrite::Registers => {
                let others = vmcs01.read(PRIMARY_CONTROLS) & !Primary::MOV_DR_EXITING.bits();
                vmcs01.write(PRIMARY_CONTROLS, others | if set { Primary::MOV_DR_EXITING.bits() } else { 0 });
                vmcs01.write(MSR_BITMAP, bitmap.0);
            }
            TrappedWrite::Tables => {
                let others = vmcs01.read(SECONDARY_CONTROLS) & !Secondary::DESCRIPTOR_TABLE_EXITING.bits();
                let control = if set { Secondary::DESCRIPTOR_TABLE_EXITING.bits() } else { 0 };
                vmcs01.write(SECONDARY_CONTROLS, others | control);
            }
        }
    }
}

/// Loads what no trap holds, and sets the traps that are due.
#[cold]
pub fn load(vcpu: &mut Vcpu, registers_hold: bool, tables_hold: bool) {
    if !registers_hold {
        vcpu.nested.host_image.load_registers(&mut vcpu.vmcs.vmcs01());
        if vcpu.nested.kept.registers.loaded() {
            vcpu.set_trap(TrappedWrite::Registers, true);
        }
    }
    if !tables_hold {
        vcpu.nested.host_image.load_tables(&mut vcpu.vmcs.vmcs01());
        if vcpu.nested.kept.tables.loaded() {
            vcpu.set_trap(TrappedWrite::Tables, true);
        }
    }
}

/// Whether a WRMSR that exited was caught.
pub fn has_caught(vcpu: &Vcpu, msr: u32) -> bool {
    vcpu.nested.kept.registers.is_set() && TRAPPED_MSRS.contains(&msr)
}

/// An instruction was caught.
pub fn spring(vcpu: &mut Vcpu, what: TrappedWrite) -> Action {
    match what {
        TrappedWrite::Registers => vcpu.nested.kept.registers.sprung(),
        TrappedWrite::Tables => vcpu.nested.kept.tables.sprung(),
    }
    vcpu.set_trap(what, false);
    Action::Resume
}
