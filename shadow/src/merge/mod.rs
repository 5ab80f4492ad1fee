//! The merge of VMCS12 into vmcs02. The SDM has no such step; KVM calls it `prepare_vmcs02`.
//!
//! [`prepare`] writes the fields in `vmcs12.dirty`, which changed since the last entry, and the few that every entry
//! needs.

mod msr_areas;

pub use msr_areas::{AreaError, MSR_AREA_ROOM, MsrEntry, copy_in, is_loadable, poison, store};

use crate::caps::VmxCaps;
use crate::controls::{EntryControls, ExitControls, Pin, Primary, Secondary, SecondaryExitControls, Tertiary};
use crate::fields::*;
use crate::hw::{GuestMemory, VmcsAccess};
use crate::index::{FieldSet, with_merge};
use crate::passing;
use crate::registers::{CR0_PG, EFER_LMA, EFER_LME};
use crate::sync::{SyncSets, exit_effects, save_stale_except, save_stale_field};
use crate::vmcs12::Vmcs12;
use ept::Gpa;

/// Fields on which those checks of VMX controls depend that only software can make. The last verdict holds until one of
/// these fields is written.
pub const CHECKED_CONTROLS: FieldSet =
    with_merge(Merge::HostOnly).or(&with_merge(Merge::Translated)).or(&CONTROL_WORDS);

/// The same for the checks of host state, which also depend on the VM-exit and VM-entry controls. It is a set of its
/// own, because a guest hypervisor writes a host FS or GS base whenever it switches between its processes.
pub const CHECKED_HOST_STATE: FieldSet = with_merge(Merge::HostState)
    .or(&with_merge(Merge::Passing))
    .or(&FieldSet::of(&[EXIT_CONTROLS.id(), ENTRY_CONTROLS.id()]));

/// Fields that may be live: vmcs02 has VMCS12's value, and at VM entry the processor refuses a wrong value with the
/// same failure that VMCS12 would have caused.
pub const SHADOWABLE: FieldSet = SHADOWABLE_WORDS.or(&with_merge(Merge::ExitInfo));

/// Puts the fields of a VMCS12 that just became current into vmcs02, where the guest hypervisor accesses them from now
/// on.
pub fn make_live(vmcs02: &mut impl VmcsAccess, vmcs12: &mut Vmcs12, live: &FieldSet) {
    for id in live.iter() {
        vmcs02.write_raw(id, vmcs12.word(id));
    }
    vmcs12.set_live(*live);
}

/// Fields that vmcs02 takes over word by word.
const WORDS: FieldSet = SHADOWABLE_WORDS.or(&with_merge(Merge::Passing));
const SHADOWABLE_WORDS: FieldSet = with_merge(Merge::Copy).or(&with_merge(Merge::Guest));
const ADDRESSES: FieldSet = with_merge(Merge::Translated);
/// Fields that decide the values of vmcs02's control words.
const CONTROL_WORDS: FieldSet = with_merge(Merge::ControlWord);
/// The fields that [`loaded_registers`] handles.
const LOADED: FieldSet = FieldSet::of(&[GUEST_DEBUGCTL.id(), GUEST_DR7.id(), GUEST_PAT.id(), GUEST_EFER.id()]);
const PDPTES: FieldSet = FieldSet::of(&[GUEST_PDPTE0.id(), GUEST_PDPTE1.id(), GUEST_PDPTE2.id(), GUEST_PDPTE3.id()]);
const TIMER: FieldSet = FieldSet::of(&[PREEMPTION_TIMER_VALUE.id()]);

/// Code here handles every field, except fields of the three classes that need none: vmcs02 has the host's value, the
/// processor writes the field, or vmcs01 gets it.
const _: () = {
    let merged = WORDS.or(&ADDRESSES).or(&CONTROL_WORDS).or(&LOADED).or(&PDPTES).or(&TIMER);
    let others = with_merge(Merge::HostOnly).or(&with_merge(Merge::ExitInfo)).or(&with_merge(Merge::HostState));
    assert!(FieldSet::ALL.minus(&merged.or(&others)).is_empty());
    assert!(merged.and(&others).is_empty());
    assert!(with_merge(Merge::Loaded).minus(&LOADED).is_empty() && LOADED.minus(&with_merge(Merge::Loaded)).is_empty());
    assert!(with_merge(Merge::Pdpte).minus(&PDPTES).is_empty() && with_merge(Merge::Timer).minus(&TIMER).is_empty());
};

/// Registers that a nested guest inherits from its hypervisor, because VMCS12 does not load them. Read from vmcs01, and
/// only those that are needed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inherited {
    debug: Option<(u64, u64)>,
    pat: Option<u64>,
    efer: Option<u64>,
}

impl Inherited {
    /// Whether there is nothing to inherit.
    pub const fn is_empty(&self) -> bool {
        self.debug.is_none() && self.pat.is_none() && self.efer.is_none()
    }

    /// Reads the registers that VMCS12 does not load. vmcs01 must be current.
    #[inline]
    pub fn read(vmcs01: &impl VmcsAccess, vmcs12: &Vmcs12) -> Self {
        let entry = vmcs12.get(ENTRY_CONTROLS);
        let unless = |control: EntryControls, read: &dyn Fn() -> u64| (!entry.contains(control)).then(read);
        Self {
            debug: (!entry.contains(EntryControls::LOAD_DEBUG_CONTROLS))
                .then(|| (vmcs01.read(GUEST_DEBUGCTL), vmcs01.read(GUEST_DR7))),
            pat: unless(EntryControls::LOAD_PAT, &|| vmcs01.read(GUEST_PAT)),
            efer: unless(EntryControls::LOAD_EFER, &|| vmcs01.read(GUEST_EFER)),
        }
    }
}

/// What the merge needs besides VMCS12.
#[derive(Debug)]
pub struct Surroundings<'a, Memory> {
    /// The processor's capabilities.
    pub caps: &'a VmxCaps,
    /// The field sets of the synchronisation.
    pub sets: &'a SyncSets,
    /// The guest hypervisor's memory.
    pub memory: &'a Memory,
    /// The guest hypervisor's registers, as far as VMCS12 does not load them.
    pub inherited: Inherited,
    /// The PDPTEs loaded from memory for a PAE guest without EPT12.
    pub pdptes: Option<[u64; 4]>,
}

/// Makes vmcs02 ready to run what VMCS12 describes. All checks have passed; nothing here can fail.
#[inline]
pub fn prepare(
    vmcs02: &mut impl VmcsAccess,
    vmcs12: &mut Vmcs12,
    Surroundings { caps, sets, memory, inherited, pdptes }: &Surroundings<'_, impl GuestMemory>,
) {
    let dirty = core::mem::take(&mut vmcs12.dirty);
    for id in dirty.and(&WORDS).iter() {
        vmcs02.write_raw(id, vmcs12.word(id));
    }
    for id in dirty.and(&ADDRESSES).iter() {
        vmcs02.write_raw(id, memory.translate(Gpa(vmcs12.word(id))).0);
    }
    if dirty.intersects(&CONTROL_WORDS) {
        control_words(vmcs02, vmcs12, caps);
        let effects = exit_effects(vmcs12, sets);
        // Fields that exits stop marking stale under the new controls must be read back now: no later exit would do it.
        save_stale_except(vmcs02, vmcs12, effects.stale());
        vmcs12.exit_effects = effects;
    }
    loaded_registers(vmcs02, vmcs12, &dirty, inherited);
    page_directory_pointers(vmcs02, vmcs12, &dirty, *pdptes);
    restart_timer(vmcs02, vmcs12);
}

/// The merge of a VMCS12 that is unchanged and whose nested guest inherits no register.
#[inline]
pub fn prepare_unchanged(vmcs02: &mut impl VmcsAccess, vmcs12: &mut Vmcs12) {
    vmcs12.dirty = FieldSet::EMPTY;
    rewrite(vmcs02, vmcs12);
}

/// Writes again the fields that vmcs02 loses while a nested guest runs and that VMCS12 keeps.
#[inline]
pub fn rewrite(vmcs02: &mut impl VmcsAccess, vmcs12: &Vmcs12) {
    for &id in vmcs12.exit_effects.rewritten() {
        vmcs02.write_raw(id, vmcs12.word(id));
    }
}

/// Gives vmcs02 VMCS12's timer value again after the processor has counted it down. If VMCS12 saves the timer, the
/// field is stale and keeps the count.
fn restart_timer(vmcs02: &mut impl VmcsAccess, vmcs12: &Vmcs12) {
    let active = vmcs12.get(PIN_CONTROLS).contains(Pin::ACTIVATE_PREEMPTION_TIMER);
    if active && !vmcs12.stale.contains(PREEMPTION_TIMER_VALUE.id()) {
        vmcs02.write(PREEMPTION_TIMER_VALUE, vmcs12.get(PREEMPTION_TIMER_VALUE));
    }
}

fn control_words(vmcs02: &mut impl VmcsAccess, vmcs12: &Vmcs12, caps: &VmxCaps) {
    let words = vmcs12.control_words();
    control_word(vmcs02, words.pin, Pin::empty());
    control_word(vmcs02, words.primary, Primary::empty());
    // A VMCS12 that has passed its checks has all bits at 1 that the processor requires, except in a word that it does
    // not activate.
    control_word(vmcs02, words.secondary, Secondary::from_bits_retain(caps.secondary.must_be_1));
    let has_timer = words.pin.contains(Pin::ACTIVATE_PREEMPTION_TIMER);
    let save_timer = if has_timer { ExitControls::SAVE_PREEMPTION_TIMER } else { ExitControls::empty() };
    control_word(vmcs02, words.exit, save_timer);
    control_word(vmcs02, words.entry, passing::entry_controls(vmcs12));
    if words.primary.contains(Primary::ACTIVATE_TERTIARY) {
        control_word(vmcs02, words.tertiary, Tertiary::empty());
    }
    if words.exit.contains(ExitControls::ACTIVATE_SECONDARY) {
        control_word(vmcs02, vmcs12.get(SECONDARY_EXIT_CONTROLS), SecondaryExitControls::empty());
    }
}

/// Writes VMCS12's bits, each as its class says; `computed` are further bits that vmcs02 needs.
fn control_word<W: ControlField>(vmcs02: &mut impl VmcsAccess, word: W, computed: W) {
    const { assert!(CONTROL_WORDS.contains(W::FIELD.id()), "the merge does not look at changes of this word") };
    vmcs02.write(W::FIELD, word.difference(W::COMPUTED).union(W::FORCED).union(computed));
}

/// Registers that vmcs02 always loads: with VMCS12's values if VMCS12 loads them, else with the guest hypervisor's.
fn loaded_registers(vmcs02: &mut impl VmcsAccess, vmcs12: &mut Vmcs12, dirty: &FieldSet, inherited: &Inherited) {
    let controls_changed = dirty.contains(ENTRY_CONTROLS.id());
    // A stale field needs nothing: vmcs02 has its newest value.
    let stale = vmcs12.stale;
    let changed = |field: Field<u64>| (controls_changed || dirty.contains(field.id())) && !stale.contains(field.id());
    match inherited.debug {
        None => {
            for field in [GUEST_DEBUGCTL, GUEST_DR7] {
                if changed(field) {
                    vmcs02.write(field, vmcs12.get(field));
                }
            }
        }
        Some((debugctl, dr7)) => {
            save_displaced(vmcs02, vmcs12, GUEST_DEBUGCTL);
            save_displaced(vmcs02, vmcs12, GUEST_DR7);
            vmcs02.write(GUEST_DEBUGCTL, debugctl);
            vmcs02.write(GUEST_DR7, dr7);
        }
    }
    match inherited.pat {
        None if changed(GUEST_PAT) => vmcs02.write(GUEST_PAT, vmcs12.get(GUEST_PAT)),
        None => (),
        Some(pat) => {
            save_displaced(vmcs02, vmcs12, GUEST_PAT);
            vmcs02.write(GUEST_PAT, pat);
        }
    }
    match inherited.efer {
        None if changed(GUEST_EFER) => vmcs02.write(GUEST_EFER, vmcs12.get(GUEST_EFER)),
        None => (),
        Some(efer) => {
            save_displaced(vmcs02, vmcs12, GUEST_EFER);
            vmcs02.write(GUEST_EFER, efer_in_mode(efer, vmcs02.read(GUEST_CR0), vmcs12));
        }
    }
}

/// Brings VMCS12's value of a register up to date before vmcs02 gets an inherited one, if only vmcs02 has the newest
/// value: an entry that fails saves nothing.
fn save_displaced(vmcs02: &impl VmcsAccess, vmcs12: &mut Vmcs12, field: Field<u64>) {
    if vmcs12.stale.contains(field.id()) {
        save_stale_field(vmcs02, vmcs12, field.id());
    }
}

/// EFER after a VM entry that does not load it (SDM 27.3.2.1): LMA follows "IA-32e mode guest", LME too if paging is
/// on.
fn efer_in_mode(efer: u64, cr0: u64, vmcs12: &Vmcs12) -> u64 {
    let ia32e = vmcs12.get(ENTRY_CONTROLS).contains(EntryControls::IA32E_MODE_GUEST);
    let affected = if cr0 & CR0_PG != 0 { EFER_LMA | EFER_LME } else { EFER_LMA };
    if ia32e { efer | affected } else { efer & !affected }
}

fn page_directory_pointers(vmcs02: &mut impl VmcsAccess, vmcs12: &Vmcs12, dirty: &FieldSet, loaded: Option<[u64; 4]>) {
    if let Some(loaded) = loaded {
        for (field, entry) in GUEST_PDPTES.into_iter().zip(loaded) {
            vmcs02.write(field, entry);
        }
    } else if vmcs12.has_secondary(Secondary::ENABLE_EPT) {
        for field in GUEST_PDPTES {
            let changed = dirty.contains(field.id()) || dirty.intersects(&CONTROL_WORDS);
            if changed && !vmcs12.stale.contains(field.id()) {
                vmcs02.write(field, vmcs12.get(field));
            }
        }
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
