//! Hypercalls: VMCALL at CPL 0 with EAX 6C316876H ("l1hv" in ASCII), where the option `hypercalls` allows them. Everything else is VMCALL as
//! the bare processor has it.
//!
//! | ECX | in | out, if RAX is 0 |
//! |---|---|---|
//! | 0: version | | RDX: 1 |
//! | 1: grant access to a field, from the next VM entry on | EDX: encoding; EBX: bit 0 VMREAD, bit 1 VMWRITE | |
//! | 2: ask for the access to a field | EDX: encoding | RBX: granted; RDX: the most that can be |
//! | 3: ask for the accesses that were counted (option `profile`) | EDX: encoding | RBX: VMREADs; RDX: VMWRITEs |
//!
//! RAX is one of [`Status`]; no other register changes.

use shadow::FieldId;
use shadow::encoding::Encoding;
use shadow::nested::Action;
use shadow::permission::{Access, Denied};
use shadow::registers::{RAX, RBX, RDX};

use crate::hw::Vcpu;

const SIGNATURE: u32 = 0x6c31_6876;
const VERSION: u64 = 1;

/// How a hypercall ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
enum Status {
    Success = 0,
    /// No function has this number.
    NoSuchFunction = 1,
    /// The encoding names no field that is offered.
    NoSuchField = 2,
    /// The field's value in vmcs02 is the host's.
    NotTheGuests = 3,
    /// The field is read-only.
    ReadOnly = 4,
    /// Bits of EBX that mean nothing.
    BadAccess = 5,
    /// There is no VMCS shadowing.
    NoShadowing = 6,
    /// Accesses are not counted.
    NoProfile = 7,
}

impl From<Denied> for Status {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::NoShadowing => Self::NoShadowing,
            Denied::NoSuchField(_) => Self::NoSuchField,
            Denied::NotTheGuests(_) => Self::NotTheGuests,
            Denied::ReadOnly(_) => Self::ReadOnly,
        }
    }
}

/// Whether a VMCALL is a hypercall.
pub fn is_meant(vcpu: &mut Vcpu) -> bool {
    vcpu.machine.takes_hypercalls && vcpu.registers[RAX] as u32 == SIGNATURE && vcpu.cpl() == 0
}

/// Carries it out.
pub fn handle(vcpu: &mut Vcpu) -> Action {
    let outcome = match vcpu.ecx() {
        0 => version(vcpu),
        1 => set_access(vcpu),
        2 => access(vcpu),
        3 => accesses(vcpu),
        _ => Err(Status::NoSuchFunction),
    };
    vcpu.registers[RAX] = outcome.err().unwrap_or(Status::Success) as u64;
    Action::Advance
}

fn version(vcpu: &mut Vcpu) -> Result<(), Status> {
    vcpu.registers[RDX] = VERSION;
    Ok(())
}

fn set_access(vcpu: &mut Vcpu) -> Result<(), Status> {
    let id = field(vcpu)?;
    let wanted = u8::try_from(vcpu.registers[RBX] as u32).ok().and_then(Access::from_bits);
    vcpu.machine.shadow_fields.set(id, wanted.ok_or(Status::BadAccess)?)?;
    Ok(())
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
