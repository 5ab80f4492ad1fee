//! Copies state from vmcs02 back to VMCS12 after a nested guest has run (SDM 28.2 and 28.3: recording exit information,
//! saving guest state).

use crate::caps::VmxCaps;
use crate::controls::{EntryControls, ExitControls, Pin, Secondary};
use crate::exit::InterruptionInfo;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::index::{FieldSet, OFTEN_ACCESSED, with_merge};
use crate::vmcs12::{ExitEffects, Vmcs12};

/// Guest state that a VM exit saves, whatever the controls.
const SAVED: FieldSet = with_merge(Merge::Guest);
/// The part of [`SAVED`] that a guest hypervisor accesses on most exits: every exit copies it. The rest is copied when
/// it is read.
const HOT: FieldSet = SAVED.and(&OFTEN_ACCESSED);
const RARE: FieldSet = SAVED.minus(&HOT);

const EXIT_INFO: FieldSet = with_merge(Merge::ExitInfo);
const DEBUG: FieldSet = FieldSet::of(&[GUEST_DEBUGCTL.id(), GUEST_DR7.id()]);
const PAT: FieldSet = FieldSet::of(&[GUEST_PAT.id()]);
const EFER: FieldSet = FieldSet::of(&[GUEST_EFER.id()]);
const PDPTES: FieldSet = FieldSet::of(&[GUEST_PDPTE0.id(), GUEST_PDPTE1.id(), GUEST_PDPTE2.id(), GUEST_PDPTE3.id()]);

/// The sets of fields that the functions here work through, for one set of capabilities: computed once.
#[derive(Clone, Debug)]
pub struct SyncSets {
    hot: FieldSet,
    rare: FieldSet,
    exit_info: FieldSet,
    stores_lma: bool,
}

impl SyncSets {
    /// The sets for a guest hypervisor that is offered `caps` and accesses the fields `live` directly in vmcs02.
    pub fn new(caps: &VmxCaps, live: &FieldSet) -> Self {
        let fields = caps.fields().minus(live);
        Self {
            hot: HOT.and(&fields),
            rare: RARE.and(&fields),
            exit_info: EXIT_INFO.and(&fields),
            stores_lma: caps.stores_lma(),
        }
    }
}

/// The effects of exits on a VMCS12 with its present controls.
pub fn exit_effects(vmcs12: &Vmcs12, sets: &SyncSets) -> ExitEffects {
    let exit = vmcs12.get(EXIT_CONTROLS);
    let mut effects = ExitEffects { stale: sets.rare.or(&vmcs12.live), ..ExitEffects::default() };
    for (control, fields) in
        [(ExitControls::SAVE_DEBUG_CONTROLS, &DEBUG), (ExitControls::SAVE_PAT, &PAT), (ExitControls::SAVE_EFER, &EFER)]
    {
        if exit.contains(control) {
            effects.stale = effects.stale.or(fields);
        } else {
            effects.reloaded = effects.reloaded.or(fields);
        }
    }
    if vmcs12.has_secondary(Secondary::ENABLE_EPT) {
        effects.stale = effects.stale.or(&PDPTES);
    }
    if vmcs12.has_secondary(Secondary::VMCS_SHADOWING) {
        // A VMREAD or VMWRITE of the nested guest that fails stores its error number in the current VMCS, which is
        // vmcs02.
        effects.stale.insert(VM_INSTRUCTION_ERROR.id());
    }
    if sets.stores_lma {
        effects.stale.insert(ENTRY_CONTROLS.id());
    }
    effects.rewritten = effects.reloaded.iter().collect();
    if vmcs12.get(PIN_CONTROLS).contains(Pin::ACTIVATE_PREEMPTION_TIMER) {
        // The processor counts vmcs02's timer down. Either the remaining count is saved, or VMCS12's value is loaded
        // again.
        if exit.contains(ExitControls::SAVE_PREEMPTION_TIMER) {
            effects.stale.insert(PREEMPTION_TIMER_VALUE.id());
        } else {
            effects.rewritten.push(PREEMPTION_TIMER_VALUE.id());
        }
    }
    effects
}

/// Saves the guest state and the controls that an exit of a nested guest changes, or marks them stale to be saved on
/// demand.
#[inline]
pub fn save_guest_state(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, sets: &SyncSets) {
    if vmcs12.live.is_empty() {
        save_hot_state(vmcs02, vmcs12, sets);
    }
    vmcs12.exit_is_unsettled = true;
    vmcs12.settle();
}

/// Without VMCS shadowing: saves the state that the guest hypervisor will read, and the injection whose valid bit the
/// exit cleared.
fn save_hot_state(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, sets: &SyncSets) {
    for id in sets.hot.iter() {
        vmcs12.set_synced(id, vmcs02.read_raw(id));
    }
    let injected = InterruptionInfo(vmcs12.get(ENTRY_INTERRUPTION_INFO));
    if injected.is_valid() {
        vmcs12.set_synced(ENTRY_INTERRUPTION_INFO.id(), injected.invalidated().0.into());
    }
}

/// Records the exit information of the exit that vmcs02 just took.
pub fn save_exit_info(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, sets: &SyncSets) {
    for id in sets.exit_info.iter() {
        vmcs12.set_synced(id, vmcs02.read_raw(id));
    }
}

/// Brings all stale fields up to date. Live fields stay stale.
pub fn save_stale(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12) {
    let stale = core::mem::replace(&mut vmcs12.stale, vmcs12.live);
    for id in stale.iter() {
        save_field(vmcs02, vmcs12, id);
    }
}

/// Brings one stale field up to date, and returns its value. A live field stays stale.
pub fn save_stale_field(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, id: FieldId) -> u64 {
    save_field(vmcs02, vmcs12, id);
    if !vmcs12.live.contains(id) {
        vmcs12.stale.remove(id);
    }
    vmcs12.word(id)
}

/// Brings those stale fields up to date that are not in `still`, before vmcs02 gets other values.
pub fn save_stale_except(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, still: &FieldSet) {
    for id in vmcs12.stale.minus(still).iter() {
        save_stale_field(vmcs02, vmcs12, id);
    }
}

/// Brings the controls that exits change up to date, as checks and merge need them.
#[inline]
pub fn save_stale_controls(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12) {
    if vmcs12.stale.contains(ENTRY_CONTROLS.id()) {
        save_field(vmcs02, vmcs12, ENTRY_CONTROLS.id());
        vmcs12.stale.remove(ENTRY_CONTROLS.id());
    }
}

fn save_field(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, id: FieldId) {
    // An exit stores one bit of the VM-entry controls; vmcs02's other bits are merged ones.
    const STORED: u64 = EntryControls::IA32E_MODE_GUEST.bits() as u64;
    let word = vmcs02.read_raw(id);
    let word = if id == ENTRY_CONTROLS.id() { vmcs12.word(id) & !STORED | word & STORED } else { word };
    vmcs12.set_synced(id, word);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Policy;
    use crate::fake::{FakeVmcs, skylake_caps};
    use ept::Gpa;

    fn vmcs12() -> Vmcs12 {
        let mut vmcs12 = Vmcs12::new(Gpa(0), &skylake_caps().offered(&Policy::EVERYTHING));
        vmcs12.dirty = FieldSet::EMPTY;
        vmcs12
    }

    #[test]
    fn hot_guest_state_comes_back_at_once_and_the_rest_on_demand() {
        let caps = skylake_caps();
        let (mut vmcs02, mut vmcs12, sets) =
            (FakeVmcs::new(&caps), vmcs12(), SyncSets::new(&caps.offered(&Policy::EVERYTHING), &FieldSet::EMPTY));
        vmcs12.exit_effects = exit_effects(&vmcs12, &sets);
        vmcs02.poke(GUEST_RIP.id(), 0x1000);
        vmcs02.poke(GUEST_TR_BASE.id(), 0x2000);
        save_guest_state(&vmcs02, &mut vmcs12, &sets);
        assert_eq!(vmcs12.get(GUEST_RIP), 0x1000);
        assert!(vmcs12.stale.contains(GUEST_TR_BASE.id()));
        save_stale(&vmcs02, &mut vmcs12);
        assert_eq!(vmcs12.get(GUEST_TR_BASE), 0x2000);
        assert!(!vmcs12.dirty.contains(GUEST_TR_BASE.id()), "vmcs02 has it already");
    }

    #[test]
    fn a_value_that_the_exit_does_not_save_is_loaded_again() {
        let caps = skylake_caps();
        let (mut vmcs02, mut vmcs12, sets) =
            (FakeVmcs::new(&caps), vmcs12(), SyncSets::new(&caps.offered(&Policy::EVERYTHING), &FieldSet::EMPTY));
        vmcs12.set_synced(GUEST_EFER.id(), 0x500);
        vmcs12.set_synced(EXIT_CONTROLS.id(), ExitControls::SAVE_DEBUG_CONTROLS.bits().into());
        vmcs12.exit_effects = exit_effects(&vmcs12, &sets);
        vmcs02.poke(GUEST_EFER.id(), 0xd01);
        save_guest_state(&vmcs02, &mut vmcs12, &sets);
        assert_eq!(vmcs12.get(GUEST_EFER), 0x500);
        assert!(vmcs12.dirty.contains(GUEST_EFER.id()) && vmcs12.stale.contains(GUEST_DR7.id()));
    }

    #[test]
    fn the_timer_comes_back_where_the_exit_saves_it_and_starts_again_where_not() {
        let caps = skylake_caps();
        let sets = SyncSets::new(&caps.offered(&Policy::EVERYTHING), &FieldSet::EMPTY);
        for save in [ExitControls::SAVE_PREEMPTION_TIMER, ExitControls::empty()] {
            let (mut vmcs02, mut vmcs12) = (FakeVmcs::new(&caps), vmcs12());
            vmcs12.set_synced(PIN_CONTROLS.id(), Pin::ACTIVATE_PREEMPTION_TIMER.bits().into());
            vmcs12.set_synced(EXIT_CONTROLS.id(), save.bits().into());
            vmcs12.set_synced(PREEMPTION_TIMER_VALUE.id(), 1000);
            vmcs12.exit_effects = exit_effects(&vmcs12, &sets);
            vmcs02.poke(PREEMPTION_TIMER_VALUE.id(), 400);
            save_guest_state(&vmcs02, &mut vmcs12, &sets);
            let restarted = vmcs12.exit_effects.rewritten().contains(&PREEMPTION_TIMER_VALUE.id());
            save_stale(&vmcs02, &mut vmcs12);
            let saved = !save.is_empty();
            assert_eq!((vmcs12.get(PREEMPTION_TIMER_VALUE), restarted), (if saved { 400 } else { 1000 }, !saved));
        }
    }

    #[test]
    fn every_exit_clears_the_valid_bit_of_the_injection_and_stores_lma() {
        let caps = skylake_caps();
        let (mut vmcs02, mut vmcs12, sets) =
            (FakeVmcs::new(&caps), vmcs12(), SyncSets::new(&caps.offered(&Policy::EVERYTHING), &FieldSet::EMPTY));
        vmcs12.set_synced(ENTRY_INTERRUPTION_INFO.id(), 0x8000_0b0e);
        vmcs02.poke(ENTRY_CONTROLS.id(), EntryControls::IA32E_MODE_GUEST.bits().into());
        vmcs12.exit_effects = exit_effects(&vmcs12, &sets);
        save_guest_state(&vmcs02, &mut vmcs12, &sets);
        assert_eq!(vmcs12.get(ENTRY_INTERRUPTION_INFO), 0xb0e);
        save_stale_controls(&vmcs02, &mut vmcs12);
        assert_eq!(vmcs12.get(ENTRY_CONTROLS), EntryControls::IA32E_MODE_GUEST);
    }
}
