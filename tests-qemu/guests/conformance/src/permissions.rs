//! Under l1hv, with the argument `permissions=SEED`: after each case, other fields exit on VMREAD and VMWRITE. No
//! result may change.

use core::arch::asm;

use protocol::hypercall::{GET_ACCESS, SET_ACCESS, SIGNATURE, Status};
use shadow::FieldId;
use shadow::fields::FIELD_COUNT;

const OPTION: &str = "permissions=";

/// Fields that change from one case to the next.
const CHANGES: usize = 4;

const SUCCESS: u64 = Status::Success as u64;
const NO_SUCH_FIELD: u64 = Status::NoSuchField as u64;

/// Changes of permissions, by a seed.
pub struct Permissions {
    state: u64,
}

impl Permissions {
    /// The changes that the arguments ask for.
    pub fn from_arguments(arguments: &str) -> Option<Self> {
        let seed = arguments.split(' ').find_map(|word| word.strip_prefix(OPTION))?;
        Some(Self { state: seed.parse().ok().filter(|&seed| seed != 0)? })
    }

    /// Grants random accesses to some fields, as far as they can be granted.
    pub fn change(&mut self) {
        for _ in 0..CHANGES {
            let id = FieldId::all().nth(self.random() % FIELD_COUNT).map_or(0, |id| id.encoding().0);
            let (status, _, most) = hypercall(GET_ACCESS, id, 0);
            if status == NO_SUCH_FIELD {
                continue;
            }
            let wanted = self.random() as u64 & most;
            let outcome = (status, hypercall(SET_ACCESS, id, wanted).0, hypercall(GET_ACCESS, id, 0).1);
            assert!(outcome == (SUCCESS, SUCCESS, wanted), "{id:#x}, access {wanted}: {outcome:?}");
        }
    }

    /// Xorshift.
    fn random(&mut self) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) as usize
    }
}

/// Makes a hypercall. Returns RAX, RBX and RDX.
fn hypercall(function: u32, encoding: u32, access: u64) -> (u64, u64, u64) {
    let (status, granted, most);
    // SAFETY: the hypercall changes only these registers.
    unsafe {
        asm!(
            "xchg rbx, {rbx}",
            "vmcall",
            "xchg rbx, {rbx}",
            rbx = inout(reg) access => granted,
            inout("rax") u64::from(SIGNATURE) => status,
            in("rcx") u64::from(function),
            inout("rdx") u64::from(encoding) => most,
            options(nostack)
        );
    }
    (status, granted, most)
}
