//! Hypercalls, as [`protocol::hypercall`] describes them, if the option `hypercalls` allows them. Any other VMCALL
//! behaves as on the bare processor.

use protocol::hypercall::{GET_ACCESS, GET_COUNTS, SET_ACCESS, SIGNATURE, Status, VERSION};
use shadow::FieldId;
use shadow::encoding::Encoding;
use shadow::nested::Action;
use shadow::permission::{Access, Denied};
use shadow::registers::{RAX, RBX, RDX};

use crate::hw::Vcpu;

/// The version of the interface.
const VERSION_NUMBER: u64 = 1;

/// The status of a hypercall whose access is denied.
const fn status(denied: Denied) -> Status {
    match denied {
        Denied::NoShadowing => Status::NoShadowing,
        Denied::NoSuchField(_) => Status::NoSuchField,
        Denied::NotTheGuests(_) => Status::NotTheGuests,
        Denied::ReadOnly(_) => Status::ReadOnly,
    }
}

/// Whether a VMCALL is a hypercall.
pub fn is_meant(vcpu: &mut Vcpu) -> bool {
    vcpu.machine.takes_hypercalls && vcpu.registers[RAX] as u32 == SIGNATURE && vcpu.cpl() == 0
}

/// Carries out a hypercall.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    let outcome = match vcpu.ecx() {
        VERSION => version(vcpu),
        SET_ACCESS => set_access(vcpu),
        GET_ACCESS => access(vcpu),
        GET_COUNTS => accesses(vcpu),
        _ => Err(Status::NoSuchFunction),
    };
    vcpu.registers[RAX] = outcome.err().unwrap_or(Status::Success) as u64;
    Action::Advance
}

fn version(vcpu: &mut Vcpu) -> Result<(), Status> {
    vcpu.registers[RDX] = VERSION_NUMBER;
    Ok(())
}

fn set_access(vcpu: &mut Vcpu) -> Result<(), Status> {
    let id = field(vcpu)?;
    let wanted = u8::try_from(vcpu.registers[RBX] as u32).ok().and_then(Access::from_bits);
    vcpu.machine.shadow_fields.set(id, wanted.ok_or(Status::BadAccess)?).map_err(status)
}

fn access(vcpu: &mut Vcpu) -> Result<(), Status> {
    let id = field(vcpu)?;
    let (granted, most) = vcpu.machine.shadow_fields.access(id);
    vcpu.registers[RBX] = granted.bits().into();
    vcpu.registers[RDX] = most.bits().into();
    Ok(())
}

fn accesses(vcpu: &mut Vcpu) -> Result<(), Status> {
    let accesses = vcpu.machine.shadow_fields.accesses(field(vcpu)?).ok_or(Status::NoProfile)?;
    vcpu.registers[RBX] = accesses.reads;
    vcpu.registers[RDX] = accesses.writes;
    Ok(())
}

/// The field that EDX names, by either of its encodings.
fn field(vcpu: &Vcpu) -> Result<FieldId, Status> {
    let encoding = Encoding(vcpu.registers[RDX] as u32);
    vcpu.field_table.find(encoding).ok_or(Status::NoSuchField)
}
