//! Hypercalls: VMCALL at CPL 0 with [`SIGNATURE`] in EAX, if l1hv's option `hypercalls` allows them.
//!
//! | ECX | in | out, if RAX is [`Status::Success`] |
//! |---|---|---|
//! | [`VERSION`] | | RDX: 1 |
//! | [`SET_ACCESS`] to a field, from the next VM entry on | EDX: encoding; EBX: bit 0 VMREAD, bit 1 VMWRITE | |
//! | [`GET_ACCESS`] to a field | EDX: encoding | RBX: granted; RDX: the most that can be |
//! | [`GET_COUNTS`] of accesses (option `profile`) | EDX: encoding | RBX: VMREADs; RDX: VMWRITEs |
//!
//! RAX is one of [`Status`]; no other register changes.

/// "l1hv" in ASCII: 6C316876H.
pub const SIGNATURE: u32 = crate::SIGNATURE;

/// Ask for the version of this interface.
pub const VERSION: u32 = 0;
/// Grant accesses without an exit.
pub const SET_ACCESS: u32 = 1;
/// Ask which accesses are granted.
pub const GET_ACCESS: u32 = 2;
/// Ask how many accesses exited.
pub const GET_COUNTS: u32 = 3;

/// The outcome of a hypercall.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Status {
    /// The hypercall was carried out.
    Success = 0,
    /// No function has this number.
    NoSuchFunction = 1,
    /// The encoding names no field that is offered.
    NoSuchField = 2,
    /// Access cannot be granted: the field's value in vmcs02 is the host's.
    NotTheGuests = 3,
    /// The field is read-only.
    ReadOnly = 4,
    /// EBX has bits without a meaning.
    BadAccess = 5,
    /// There is no VMCS shadowing.
    NoShadowing = 6,
    /// Accesses are not counted.
    NoProfile = 7,
}
