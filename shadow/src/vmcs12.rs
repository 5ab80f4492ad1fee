//! VMCS12: the VMCS that the guest hypervisor built, cached in the host's memory while it is current.
//!
//! In the guest hypervisor's memory a VMCS region holds, from its first byte: revision identifier, VMX-abort indicator,
//! launch state, and, from byte 16, one 64-bit word per row of the field table. Code outside this crate must not depend
//! on this layout (SDM 25.2: "the format is implementation-specific").

use crate::caps::VmxCaps;
use crate::controls::{ControlWords, Primary, Secondary, Tertiary};
use crate::fields::*;
use crate::hw::GuestMemory;
use crate::index::FieldSet;
use arrayvec::ArrayVec;
use ept::Gpa;

const ABORT_OFFSET: u64 = 4;
const LAUNCH_STATE_OFFSET: u64 = 8;
const FIELDS_OFFSET: u64 = 16;
const _: () = assert!(FIELDS_OFFSET as usize + 8 * FIELD_COUNT <= 4096, "a VMCS region is a page");

/// SDM 25.1 "Overview": the launch state of a VMCS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum LaunchState {
    /// VMLAUNCH is possible.
    Clear = 0,
    /// VMRESUME is possible.
    Launched = 1,
}

/// SDM 25.10 "VMCS Types: Ordinary and Shadow".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmcsKind {
    /// VM entry uses it.
    Ordinary,
    /// Another VMCS can be linked to it.
    Shadow,
}

impl VmcsKind {
    /// The kind that the first word of a region says: bit 31 is the shadow-VMCS indicator.
    pub const fn of(revision: u32) -> Self {
        if revision & SHADOW_INDICATOR != 0 { Self::Shadow } else { Self::Ordinary }
    }
}

/// The shadow-VMCS indicator in the first word of a VMCS region (SDM 25.2 "Format of the VMCS Region").
pub const SHADOW_INDICATOR: u32 = 1 << 31;

/// The effects of every exit on the bookkeeping of a VMCS12, as long as its controls stay the same.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ExitEffects {
    /// Fields that are stale afterwards.
    pub(crate) stale: FieldSet,
    /// Fields that are not saved: the next entry loads VMCS12's values again, over those that the nested guest left.
    pub(crate) reloaded: FieldSet,
    /// Fields that an entry must write even if VMCS12 is unchanged, as a list, which is faster to walk than a set.
    pub(crate) rewritten: ArrayVec<FieldId, 5>,
}

impl ExitEffects {
    /// Fields that are stale afterwards.
    #[inline]
    pub const fn stale(&self) -> &FieldSet {
        &self.stale
    }

    /// Fields that the exit does not save.
    #[inline]
    pub const fn reloaded(&self) -> &FieldSet {
        &self.reloaded
    }

    /// Fields that an entry must write even if VMCS12 is unchanged.
    #[inline]
    pub fn rewritten(&self) -> &[FieldId] {
        &self.rewritten
    }
}

/// The current VMCS12.
#[derive(Clone, Debug)]
pub struct Vmcs12 {
    /// Values by [`FieldId`]: as many as a [`FieldId`] has values, so that no access needs a bounds check.
    words: [u64; 256],
    /// The current-VMCS pointer.
    pub pointer: Gpa,
    /// Its launch state.
    pub launch_state: LaunchState,
    /// Whether it is a shadow VMCS.
    pub kind: VmcsKind,
    /// Fields that were written since vmcs02 last got them.
    pub(crate) dirty: FieldSet,
    /// Fields for which vmcs02 has a newer value than `words`. Never shares a member with `dirty`.
    pub(crate) stale: FieldSet,
    /// Fields that the guest hypervisor accesses in vmcs02 itself, by VMCS shadowing. Always stale.
    pub(crate) live: FieldSet,
    /// The effects of an exit of the nested guest on the sets above.
    pub(crate) exit_effects: ExitEffects,
    /// The effects of the last exit are not applied yet. Code that reads the sets or stale words calls [`Self::settle`]
    /// first.
    pub(crate) exit_is_unsettled: bool,
}

impl Vmcs12 {
    /// Reads a VMCS region. The guest hypervisor may have written any content, so words are cut to their fields'
    /// widths.
    pub fn load(memory: &impl GuestMemory, pointer: Gpa, caps: &VmxCaps) -> Self {
        let launched = memory.read_u32(pointer + LAUNCH_STATE_OFFSET) == LaunchState::Launched as u32;
        let mut vmcs12 = Self::new(pointer, caps);
        vmcs12.launch_state = if launched { LaunchState::Launched } else { LaunchState::Clear };
        let mut bytes = [0; 8 * FIELD_COUNT];
        memory.read(pointer + FIELDS_OFFSET, &mut bytes);
        let (chunks, _) = bytes.as_chunks::<8>();
        for ((word, chunk), info) in vmcs12.words.iter_mut().zip(chunks).zip(&FIELDS) {
            *word = u64::from_le_bytes(*chunk) & info.encoding.width().mask();
        }
        vmcs12
    }

    /// A VMCS whose fields are all 0.
    pub fn new(pointer: Gpa, caps: &VmxCaps) -> Self {
        Self {
            words: [0; 256],
            pointer,
            launch_state: LaunchState::Clear,
            kind: VmcsKind::Ordinary,
            dirty: caps.fields(),
            stale: FieldSet::EMPTY,
            live: FieldSet::EMPTY,
            exit_effects: ExitEffects::default(),
            exit_is_unsettled: false,
        }
    }

    /// Writes the region back. Stale fields must have been synchronised just before.
    pub fn store(&self, memory: &impl GuestMemory) {
        debug_assert!(self.stale == self.live && !self.exit_is_unsettled);
        memory.write_u32(self.pointer + LAUNCH_STATE_OFFSET, self.launch_state as u32);
        let mut bytes = [0; 8 * FIELD_COUNT];
        let (chunks, _) = bytes.as_chunks_mut::<8>();
        for (chunk, word) in chunks.iter_mut().zip(self.words) {
            *chunk = word.to_le_bytes();
        }
        memory.write(self.pointer + FIELDS_OFFSET, &bytes);
    }

    /// A field's value.
    #[inline(always)]
    pub fn get<T: FieldValue>(&self, field: Field<T>) -> T {
        T::from_word(self.word(field.id()))
    }

    /// Sets a field; vmcs02 gets it at the next entry if it differs.
    #[inline]
    pub fn set<T: FieldValue>(&mut self, field: Field<T>, value: T) {
        self.set_word(field.id(), value.into_word());
    }

    /// A field's value as a word.
    #[inline(always)]
    pub fn word(&self, id: FieldId) -> u64 {
        self.words[id.row()]
    }

    /// Sets a field from a word that fits its width.
    #[inline]
    pub fn set_word(&mut self, id: FieldId, word: u64) {
        let slot = &mut self.words[id.row()];
        if *slot != word || self.stale.contains(id) {
            *slot = word;
            self.stale.remove(id);
            self.dirty.insert(id);
        }
    }

    /// The secondary controls that are in effect: none if they are not activated.
    #[inline]
    pub fn secondary(&self) -> Secondary {
        let activated = self.get(PRIMARY_CONTROLS).contains(Primary::ACTIVATE_SECONDARY);
        if activated { self.get(SECONDARY_CONTROLS) } else { Secondary::empty() }
    }

    /// Whether all these secondary controls are in effect.
    #[inline]
    pub fn has_secondary(&self, controls: Secondary) -> bool {
        self.secondary().contains(controls)
    }

    /// The control words, with those that are not activated at 0.
    pub fn control_words(&self) -> ControlWords {
        let primary = self.get(PRIMARY_CONTROLS);
        let has_tertiary = primary.contains(Primary::ACTIVATE_TERTIARY);
        ControlWords {
            pin: self.get(PIN_CONTROLS),
            primary,
            secondary: self.secondary(),
            tertiary: if has_tertiary { self.get(TERTIARY_CONTROLS) } else { Tertiary::empty() },
            exit: self.get(EXIT_CONTROLS),
            entry: self.get(ENTRY_CONTROLS),
        }
    }

    /// Notes that from now on vmcs02 alone holds the fields of `live`, which have been copied to it.
    pub(crate) fn set_live(&mut self, live: FieldSet) {
        self.live = live;
        self.dirty = self.dirty.minus(&live);
        self.stale = self.stale.or(&live);
    }

    /// Applies the effects of the last exit, if that is still to be done. To be called before the sets or stale words
    /// are read.
    #[inline]
    pub fn settle(&mut self) {
        if self.exit_is_unsettled {
            self.exit_is_unsettled = false;
            self.stale = *self.exit_effects.stale();
            self.dirty = self.dirty.or(self.exit_effects.reloaded());
        }
    }

    /// Whether nothing was written since the last exit: then only the fields that exits do not save are dirty.
    #[inline]
    pub fn is_unchanged(&self) -> bool {
        self.dirty == *self.exit_effects.reloaded()
    }

    /// Stores the value that vmcs02 already holds. Leaves the dirty and stale sets alone: the caller keeps them right.
    #[inline]
    pub(crate) fn set_synced(&mut self, id: FieldId, word: u64) {
        self.words[id.row()] = word;
    }
}

/// Clears a VMCS region that is not current (SDM 31.3 "VMCLEAR").
pub fn clear_region(memory: &impl GuestMemory, pointer: Gpa) {
    memory.write_u32(pointer + LAUNCH_STATE_OFFSET, LaunchState::Clear as u32);
}

/// The first word of a VMCS region: revision identifier in bits 30:0, shadow-VMCS indicator in bit 31.
pub fn region_revision(memory: &impl GuestMemory, pointer: Gpa) -> u32 {
    memory.read_u32(pointer)
}

/// Writes the VMX-abort indicator (SDM 28.7 "VMX Aborts").
pub fn write_abort_indicator(memory: &impl GuestMemory, pointer: Gpa, reason: u32) {
    memory.write_u32(pointer + ABORT_OFFSET, reason);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::Policy;
    use crate::fake::{FakeMemory, skylake_caps};

    const REGION: Gpa = Gpa(0x5000);

    #[test]
    fn a_region_comes_back_as_it_was_stored() {
        let (memory, caps) = (FakeMemory::new(0x10000), skylake_caps().offered(&Policy::EVERYTHING));
        let mut vmcs12 = Vmcs12::new(REGION, &caps);
        vmcs12.set(GUEST_RIP, 0xffff_ffff_8100_0000);
        vmcs12.set(GUEST_CS_SELECTOR, 0x10);
        vmcs12.launch_state = LaunchState::Launched;
        vmcs12.store(&memory);
        let loaded = Vmcs12::load(&memory, REGION, &caps);
        assert_eq!(loaded.get(GUEST_RIP), 0xffff_ffff_8100_0000);
        assert_eq!(loaded.get(GUEST_CS_SELECTOR), 0x10);
        assert_eq!(loaded.launch_state, LaunchState::Launched);
        assert_eq!(loaded.dirty, caps.fields(), "vmcs02 holds nothing of it yet");
    }

    #[test]
    fn a_hostile_region_yields_values_that_fit_their_fields() {
        let (memory, caps) = (FakeMemory::new(0x10000), skylake_caps().offered(&Policy::EVERYTHING));
        memory.write(REGION, &[0xff; 4096]);
        let loaded = Vmcs12::load(&memory, REGION, &caps);
        for id in FieldId::all() {
            assert_eq!(loaded.word(id) & !id.encoding().width().mask(), 0, "{id:?}");
        }
        assert_eq!(loaded.launch_state, LaunchState::Clear, "an unknown launch state is not launched");
    }

    #[test]
    fn writing_the_value_a_field_has_does_not_make_it_dirty() {
        let mut vmcs12 = Vmcs12::new(REGION, &skylake_caps().offered(&Policy::EVERYTHING));
        vmcs12.dirty = FieldSet::EMPTY;
        vmcs12.set(GUEST_RSP, 0);
        assert!(vmcs12.dirty.is_empty());
        vmcs12.set(GUEST_RSP, 8);
        assert!(vmcs12.dirty.contains(GUEST_RSP.id()));
    }

    #[test]
    fn writing_a_stale_field_always_makes_it_dirty() {
        let mut vmcs12 = Vmcs12::new(REGION, &skylake_caps().offered(&Policy::EVERYTHING));
        vmcs12.dirty = FieldSet::EMPTY;
        vmcs12.stale.insert(GUEST_ES_BASE.id());
        vmcs12.set(GUEST_ES_BASE, 0);
        assert!(vmcs12.dirty.contains(GUEST_ES_BASE.id()) && vmcs12.stale.is_empty());
    }
}
