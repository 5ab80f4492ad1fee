//! INIT and SIPI (SDM Volume 3A, 10.4 "Multiple-Processor (MP) Initialization", Table 11-1 "IA-32 and Intel 64 Processor States
//! Following Power-up, Reset, or INIT").

use shadow::controls::EntryControls;
use shadow::fields::*;
use shadow::hw::VmcsAccess;
use shadow::msr::IA32_APIC_BASE;

use super::{Action, cr};
use crate::arch::vmx::{Invvpid, invvpid};
use crate::arch::{msr, on_behalf};
use crate::vcpu::{VPID01, Vcpu};

const ACTIVE: u32 = 0;
const WAIT_FOR_SIPI: u32 = 3;

struct SegmentFields {
    selector: Field<u16>,
    base: Field<u64>,
    limit: Field<u32>,
    access_rights: Field<u32>,
}

macro_rules! segment_fields {
    ($selector:ident, $base:ident, $limit:ident, $rights:ident) => {
        SegmentFields { selector: $selector, base: $base, limit: $limit, access_rights: $rights }
    };
}

const CS: SegmentFields = segment_fields!(GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS);
const DATA: [SegmentFields; 5] = [
    segment_fields!(GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS),
    segment_fields!(GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
    segment_fields!(GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS),
    segment_fields!(GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS),
    segment_fields!(GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
];
const LDTR: SegmentFields =
    segment_fields!(GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_ACCESS_RIGHTS);
const TR: SegmentFields = segment_fields!(GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS);

/// INIT. In VMX root operation it is blocked until VMXOFF (SDM 24.8).
pub fn init(vcpu: &mut Vcpu) -> Action {
    vcpu.init_blocked = true;
    deliver_blocked_init(vcpu);
    Action::Resume
}

/// Outside VMX operation a bootstrap processor begins again at the reset vector, another one waits for a SIPI.
pub fn deliver_blocked_init(vcpu: &mut Vcpu) {
    const BOOTSTRAP: u64 = 1 << 8;
    if vcpu.vmx.vmxon_region.is_some() || !core::mem::take(&mut vcpu.init_blocked) {
        return;
    }
    reset_registers(vcpu);
    let bootstrap = msr::try_read(IA32_APIC_BASE).unwrap_or(BOOTSTRAP) & BOOTSTRAP != 0;
    let activity = if bootstrap { ACTIVE } else { WAIT_FOR_SIPI };
    vcpu.vmcs.vmcs01().write(GUEST_ACTIVITY_STATE, activity);
}

/// SIPI: begins in real mode at the page that the vector names.
pub fn startup(vcpu: &mut Vcpu) -> Action {
    let mut vmcs01 = vcpu.vmcs.vmcs01();
    let vector = vmcs01.read(EXIT_QUALIFICATION) as u8;
    vmcs01.write(GUEST_CS_SELECTOR, u16::from(vector) << 8);
    vmcs01.write(GUEST_CS_BASE, u64::from(vector) << 12);
    vmcs01.write(GUEST_RIP, 0);
    vmcs01.write(GUEST_ACTIVITY_STATE, ACTIVE);
    Action::Resume
}

fn reset_registers(vcpu: &mut Vcpu) {
    const CR0_ET: u64 = 1 << 4;
    const CR0_CACHE: u64 = 3 << 29;
    const CODE: u32 = 0x9b;
    const DATA_RIGHTS: u32 = 0x93;
    const LDT: u32 = 0x82;
    const BUSY_TSS: u32 = 0x8b;
    let (cr0_mask, cr4_mask) = cr::masks(vcpu);
    let signature = on_behalf::signature();
    vcpu.registers.gpr = [0; 16];
    vcpu.registers.gpr[2] = signature.into();
    let mut vmcs01 = vcpu.vmcs.vmcs01();
    let cache = vmcs01.read(GUEST_CR0) & CR0_CACHE;
    vmcs01.write(GUEST_CR0, CR0_ET | cache | cr0_mask);
    vmcs01.write(CR0_READ_SHADOW, CR0_ET | cache);
    vmcs01.write(GUEST_CR3, 0);
    vmcs01.write(GUEST_CR4, cr4_mask);
    vmcs01.write(CR4_READ_SHADOW, 0);
    vmcs01.write(GUEST_EFER, 0);
    let entry = EntryControls::from_bits_retain(vmcs01.read(ENTRY_CONTROLS)) - EntryControls::IA32E_MODE_GUEST;
    vmcs01.write(ENTRY_CONTROLS, entry.bits());
    let mut set = |segment: &SegmentFields, selector, base, rights| {
        vmcs01.write(segment.selector, selector);
        vmcs01.write(segment.base, base);
        vmcs01.write(segment.limit, 0xffff);
        vmcs01.write(segment.access_rights, rights);
    };
    set(&CS, 0xf000, 0xffff_0000, CODE);
    for segment in &DATA {
        set(segment, 0, 0, DATA_RIGHTS);
    }
    set(&LDTR, 0, 0, LDT);
    set(&TR, 0, 0, BUSY_TSS);
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
    invvpid(Invvpid::Single(VPID01));
}
