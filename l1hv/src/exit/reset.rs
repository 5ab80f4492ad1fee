//! INIT and SIPI (SDM Volume 3A, 10.4 "Multiple-Processor (MP) Initialization", Table 11-1 "IA-32 and Intel 64
//! Processor States Following Power-up, Reset, or INIT").

use shadow::controls::EntryControls;
use shadow::event::WAIT_FOR_SIPI;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::msr::IA32_APIC_BASE;
use shadow::nested::control_registers::masks;
use shadow::nested::{Action, Invvpid, Machine, VPID01, VmcsPair};
use shadow::operand::Segment;
use shadow::registers::*;

use crate::arch::{apic, msr, on_behalf};
use crate::hw::Vcpu;

const ACTIVE: u32 = 0;

/// INIT. In VMX root operation it is blocked until VM entry or VMXOFF (SDM 24.8 "Restrictions on VMX Operation").
pub fn init(vcpu: &mut Vcpu) -> Action {
    if vcpu.machine.processor.take_kick() {
        return Action::Resume;
    }
    vcpu.init_blocked = true;
    // The next VM entry must deliver the INIT, which the short way does not do.
    vcpu.vmx.vmcs12.settle();
    deliver_blocked_init(vcpu);
    Action::Resume
}

/// Delivers a blocked INIT outside VMX operation: the bootstrap processor begins again at the reset vector, another
/// processor waits for a SIPI.
pub fn deliver_blocked_init(vcpu: &mut Vcpu) {
    const BOOTSTRAP: u64 = 1 << 8;
    if vcpu.vmx.vmxon_region.is_some() || !core::mem::take(&mut vcpu.init_blocked) {
        return;
    }
    apic::reset();
    reset_registers(vcpu);
    let bootstrap = msr::try_read(IA32_APIC_BASE).unwrap_or(BOOTSTRAP) & BOOTSTRAP != 0;
    if bootstrap {
        vcpu.vmcs.vmcs01().write(GUEST_ACTIVITY_STATE, ACTIVE);
    } else {
        wait_for_sipi(vcpu);
    }
}

/// Resets a processor that the guest has not started yet, and makes it wait for a SIPI.
pub fn wait_for_start(vcpu: &mut Vcpu) {
    reset_registers(vcpu);
    wait_for_sipi(vcpu);
}

/// Begins in real mode at an offset in a segment, in the state after a reset else.
pub fn start_in_real_mode(vcpu: &mut Vcpu, segment: u16, offset: u16) {
    reset_registers(vcpu);
    let vmcs01 = vcpu.vmcs.vmcs01();
    vmcs01.write(GUEST_CS_SELECTOR, segment);
    vmcs01.write(GUEST_CS_BASE, u64::from(segment) << 4);
    vmcs01.write(GUEST_RIP, offset.into());
}

fn wait_for_sipi(vcpu: &mut Vcpu) {
    vcpu.vmcs.vmcs01().write(GUEST_ACTIVITY_STATE, WAIT_FOR_SIPI);
    vcpu.machine.processor.set_waits_for_sipi(true);
}

/// SIPI: the processor begins in real mode at the page that the vector names.
pub fn startup(vcpu: &mut Vcpu) -> Action {
    let vmcs01 = vcpu.vmcs.vmcs01();
    let vector = vmcs01.read(EXIT_QUALIFICATION) as u8;
    vmcs01.write(GUEST_CS_SELECTOR, u16::from(vector) << 8);
    vmcs01.write(GUEST_CS_BASE, u64::from(vector) << 12);
    vmcs01.write(GUEST_RIP, 0);
    vmcs01.write(GUEST_ACTIVITY_STATE, ACTIVE);
    vcpu.machine.processor.set_waits_for_sipi(false);
    Action::Resume
}

fn reset_registers(vcpu: &mut Vcpu) {
    const AT_0: Segment = Segment { base: 0, limit: 0xffff, access_rights: 0 };
    const CODE: Segment = Segment { base: 0xffff_0000, access_rights: 0x9b, ..AT_0 };
    const DATA: Segment = Segment { access_rights: 0x93, ..AT_0 };
    const LDT: Segment = Segment { access_rights: 0x82, ..AT_0 };
    const TSS: Segment = Segment { access_rights: access_rights::BUSY_TSS, ..AT_0 };
    let masks = masks(vcpu);
    let signature = on_behalf::signature();
    vcpu.nested.kept.forget();
    vcpu.registers.clear();
    vcpu.registers[RDX] = signature.into();
    let vmcs01 = vcpu.vmcs.vmcs01();
    let cache = vmcs01.read(GUEST_CR0) & (CR0_CD | CR0_NW);
    FORCED_CR0.show(vmcs01, CR0_ET | cache, masks.cr0);
    vmcs01.write(GUEST_CR3, 0);
    FORCED_CR4.show(vmcs01, 0, masks.cr4);
    vmcs01.write(GUEST_EFER, 0);
    let entry = vmcs01.read(ENTRY_CONTROLS) - EntryControls::IA32E_MODE_GUEST;
    vmcs01.write(ENTRY_CONTROLS, entry);
    for register in &GUEST_SEGMENTS {
        DATA.load(vmcs01, register, 0);
    }
    CODE.load(vmcs01, &GUEST_SEGMENTS[CS], 0xf000);
    LDT.load(vmcs01, &GUEST_LDTR, 0);
    TSS.load(vmcs01, &GUEST_TR, 0);
    for (base, limit) in [(GUEST_GDTR_BASE, GUEST_GDTR_LIMIT), (GUEST_IDTR_BASE, GUEST_IDTR_LIMIT)] {
        vmcs01.write(base, 0);
        vmcs01.write(limit, 0xffff);
    }
    vmcs01.write(GUEST_RIP, 0xfff0);
    vmcs01.write(GUEST_RSP, 0);
    vmcs01.write(GUEST_RFLAGS, 2);
    vmcs01.write(GUEST_DR7, 0x400);
    vmcs01.write(GUEST_INTERRUPTIBILITY, 0);
    vmcs01.write(GUEST_PENDING_DEBUG, 0);
    vcpu.machine.invvpid(Invvpid::Single(VPID01));
}
