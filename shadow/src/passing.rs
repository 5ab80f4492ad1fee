//! "Passing registers": registers of the guests that the host has no use for. They are CET state, IA32_PKRS and UINV.
//!
//! Their values do not affect the host, whose CR4 has their features off, so the host never loads them. vmcs01 leaves
//! them alone, and vmcs02 has VMCS12's host-state fields and VM-exit controls for them. So an exit of the nested guest
//! loads the guest hypervisor's values directly, and registers that it does not load keep the nested guest's values, as
//! on the bare machine. A VMCS12 that has none of these controls costs nothing.
//!
//! ```text
//!                        "load" on VM entry                     "load" or "clear" on VM exit
//!   processor            vmcs02 as VMCS12                       vmcs02 as VMCS12
//!   software             also if only exits load: after an      an exit that the processor did not take loads nothing:
//!                        exit that the host handles, the        vmcs01's next entry does (after_exit)
//!                        nested guest's value comes back
//! ```

use crate::controls::{EntryControls, ExitControls};
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::vmcs12::Vmcs12;
use arrayvec::ArrayVec;

/// Registers that the same two controls load. Every VM exit saves them if the processor has the controls (SDM 28.3.1
/// "Saving Control Registers, Debug Registers, and MSRs").
struct Passing {
    entry: EntryControls,
    exit: ExitControls,
    /// Guest-state fields, each with the host-state field that an exit loads; without one, the exit loads 0.
    registers: &'static [(FieldId, Option<FieldId>)],
}

const PASSING: [Passing; 3] = [
    Passing {
        entry: EntryControls::LOAD_CET,
        exit: ExitControls::LOAD_CET,
        registers: &[
            (GUEST_S_CET.id(), Some(HOST_S_CET.id())),
            (GUEST_SSP.id(), Some(HOST_SSP.id())),
            (GUEST_SSP_TABLE.id(), Some(HOST_SSP_TABLE.id())),
        ],
    },
    Passing {
        entry: EntryControls::LOAD_PKRS,
        exit: ExitControls::LOAD_PKRS,
        registers: &[(GUEST_PKRS.id(), Some(HOST_PKRS.id()))],
    },
    Passing { entry: EntryControls::LOAD_UINV, exit: ExitControls::CLEAR_UINV, registers: &[(GUEST_UINV.id(), None)] },
];

/// The VM-entry controls that load passing registers.
pub const ENTRY: EntryControls =
    EntryControls::LOAD_CET.union(EntryControls::LOAD_PKRS).union(EntryControls::LOAD_UINV);
/// The VM-exit controls that load or clear passing registers.
pub const EXIT: ExitControls = ExitControls::LOAD_CET.union(ExitControls::LOAD_PKRS).union(ExitControls::CLEAR_UINV);

/// Guest-state fields of passing registers, with values.
pub type Values = ArrayVec<(FieldId, u64), 5>;

/// Writes values to their fields.
pub fn write(vmcs: &mut impl VmcsAccess, values: &Values) {
    for &(id, value) in values {
        vmcs.write_raw(id, value);
    }
}

impl Passing {
    fn is_loaded(&self, vmcs12: &Vmcs12) -> (bool, bool) {
        let entry = vmcs12.get(ENTRY_CONTROLS);
        let exit = vmcs12.get(EXIT_CONTROLS);
        (entry.contains(self.entry), exit.contains(self.exit))
    }
}

/// vmcs02's VM-entry controls for these registers.
#[inline]
pub fn entry_controls(vmcs12: &Vmcs12) -> EntryControls {
    let exit = vmcs12.get(EXIT_CONTROLS);
    let entry = vmcs12.get(ENTRY_CONTROLS).intersection(ENTRY);
    if exit.intersects(EXIT) { entry | inherited(vmcs12) } else { entry }
}

/// The controls for registers that exits load and entries do not: the nested guest begins with the guest hypervisor's
/// values.
#[cold]
fn inherited(vmcs12: &Vmcs12) -> EntryControls {
    PASSING.iter().filter(|passing| passing.is_loaded(vmcs12) == (false, true)).map(|passing| passing.entry).collect()
}

/// Whether the nested guest begins with a value of the guest hypervisor's that vmcs02 has to hold.
#[inline]
pub fn inherits(vmcs12: &Vmcs12) -> bool {
    vmcs12.get(EXIT_CONTROLS).intersects(EXIT) && !inherited(vmcs12).is_empty()
}

/// The values that the nested guest inherits, read from vmcs01, which must be current.
#[cold]
pub fn read_inherited(vmcs01: &impl VmcsAccess, vmcs12: &Vmcs12) -> Values {
    let inherits = PASSING.iter().filter(|passing| passing.is_loaded(vmcs12) == (false, true));
    let fields = inherits.flat_map(|passing| passing.registers).map(|&(guest, _)| guest);
    fields.map(|guest| (guest, vmcs01.read_raw(guest))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmxCaps;
    use crate::controls::Allowed;
    use crate::fake::{FakeVmcs, skylake_caps};
    use ept::Gpa;

    /// A processor with all these controls.
    fn caps() -> VmxCaps {
        let caps = skylake_caps();
        let entry = Allowed { may_be_1: caps.entry.may_be_1 | ENTRY.bits(), ..caps.entry };
        let exit = Allowed { may_be_1: caps.exit.may_be_1 | EXIT.bits(), ..caps.exit };
        VmxCaps { entry, exit, ..caps }
    }

    fn vmcs12(entry: EntryControls, exit: ExitControls) -> Vmcs12 {
        let mut vmcs12 = Vmcs12::new(Gpa(0), &caps());
        vmcs12.set(ENTRY_CONTROLS, entry);
        vmcs12.set(EXIT_CONTROLS, exit);
        vmcs12.set(HOST_PKRS, 7);
        vmcs12
    }

    #[test]
    fn the_table_has_every_control_once() {
        let (entry, exit) = (PASSING.iter().map(|row| row.entry), PASSING.iter().map(|row| row.exit));
        assert_eq!(entry.clone().collect::<EntryControls>(), ENTRY);
        assert_eq!(exit.clone().collect::<ExitControls>(), EXIT);
        assert_eq!(EntryControls::COMPUTED, ENTRY);
        assert!(ExitControls::FROM_GUEST.contains(EXIT));
    }

    #[test]
    fn what_only_exits_load_the_nested_guest_inherits_and_gets_back() {
        let vmcs12 = vmcs12(EntryControls::LOAD_PKRS, ExitControls::LOAD_PKRS | ExitControls::CLEAR_UINV);
        assert_eq!(entry_controls(&vmcs12), EntryControls::LOAD_PKRS | EntryControls::LOAD_UINV);
        assert!(inherits(&vmcs12));
        let mut vmcs01 = FakeVmcs::new(&caps());
        vmcs01.poke(GUEST_UINV.id(), 0x55);
        assert_eq!(read_inherited(&vmcs01, &vmcs12)[..], [(GUEST_UINV.id(), 0x55)]);
    }

    #[test]
    fn a_vmcs12_without_the_controls_leaves_the_registers_alone() {
        let vmcs12 = vmcs12(EntryControls::empty(), ExitControls::empty());
        assert!(entry_controls(&vmcs12).is_empty() && !inherits(&vmcs12));
    }
}
