//! What vmcs02 and VMCS12 hold after a merge and after an exit, field by field, by the merge classes of the table of
//! fields.

use ept::Gpa;
use shadow::caps::CapabilityWord;
use shadow::check;
use shadow::controls::{BitMerge, EntryControls, ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;
use shadow::hw::{GuestMemory, VmcsAccess};
use shadow::registers::{CR0_PG, EFER_LMA, EFER_LME};
use shadow::{FieldSet, Vmcs12, passing};

use super::machine::{Processor, Ram, Vmcs};

/// What an entry starts from.
pub struct Entry<'a> {
    /// vmcs01.
    pub vmcs01: &'a Vmcs,
    /// VMCS12 as the guest hypervisor reads it.
    pub vmcs12: &'a Vmcs12,
    /// The PDPTEs of a nested guest without EPT12.
    pub pdptes: Option<[u64; 4]>,
    /// Memory.
    pub memory: &'a Ram,
}

/// Whether the fields of a class are the host's in vmcs02, or the processor's.
const fn is_hosts(merge: Merge) -> bool {
    matches!(merge, Merge::HostOnly | Merge::HostState | Merge::ExitInfo)
}

/// After the merge.
pub fn check_merged(vmcs02: &Vmcs, entry: &Entry<'_>, processor: &Processor, live: &FieldSet) {
    for id in vmcs02.written.iter() {
        assert!(!is_hosts(id.info().merge), "the merge writes {id:?}");
    }
    for id in processor.offered_fields.iter() {
        if let Some(expected) = expected(entry, id) {
            assert_eq!(vmcs02.read_raw(id), expected, "{id:?}, live: {}", live.contains(id));
        }
    }
    let words = entry.vmcs12.control_words();
    check_word(vmcs02, words.pin, processor);
    check_word(vmcs02, words.primary, processor);
    check_word(vmcs02, words.secondary, processor);
    check_word(vmcs02, words.exit, processor);
    check_word(vmcs02, words.entry, processor);
    if words.primary.contains(Primary::ACTIVATE_TERTIARY) {
        check_word(vmcs02, words.tertiary, processor);
    }
    if words.exit.contains(ExitControls::ACTIVATE_SECONDARY) {
        let word = entry.vmcs12.get(SECONDARY_EXIT_CONTROLS);
        check_word(vmcs02, word, processor);
    }
    assert!(vmcs02.read(ENTRY_CONTROLS).contains(words.entry.intersection(passing::ENTRY)));
    let saves_timer = vmcs02.read(EXIT_CONTROLS).contains(ExitControls::SAVE_PREEMPTION_TIMER);
    assert_eq!(saves_timer, words.pin.contains(Pin::ACTIVATE_PREEMPTION_TIMER));
    assert!(!vmcs02.read(SECONDARY_CONTROLS).intersects(Secondary::ENABLE_PML | Secondary::EPT_VIOLATION_VE));
    check_as_processor(vmcs02, processor);
}

/// The value of a field of vmcs02; `None` if it does not matter, or if [`check_word`] looks at it.
fn expected(entry: &Entry<'_>, id: FieldId) -> Option<u64> {
    let Entry { vmcs01, vmcs12, pdptes, memory } = entry;
    let word = vmcs12.word(id);
    match id.info().merge {
        Merge::Copy | Merge::Guest | Merge::Passing => Some(word),
        Merge::Translated => Some(memory.translate(Gpa(word)).0),
        Merge::Loaded => Some(loaded(vmcs01, vmcs12, id)),
        Merge::Pdpte => {
            let number = GUEST_PDPTES.iter().position(|field| field.id() == id)?;
            let of_vmcs12 = vmcs12.has_secondary(Secondary::ENABLE_EPT).then_some(word);
            pdptes.map(|pdptes| pdptes[number]).or(of_vmcs12)
        }
        Merge::Timer => vmcs12.get(PIN_CONTROLS).contains(Pin::ACTIVATE_PREEMPTION_TIMER).then_some(word),
        Merge::ControlWord | Merge::HostOnly | Merge::HostState | Merge::ExitInfo => None,
    }
}

/// A register that vmcs02 always loads (SDM 27.3.2.1 "Loading Guest Control Registers, Debug Registers, and MSRs").
fn loaded(vmcs01: &Vmcs, vmcs12: &Vmcs12, id: FieldId) -> u64 {
    let entry = vmcs12.get(ENTRY_CONTROLS);
    let control = if id == GUEST_PAT.id() {
        EntryControls::LOAD_PAT
    } else if id == GUEST_EFER.id() {
        EntryControls::LOAD_EFER
    } else {
        EntryControls::LOAD_DEBUG_CONTROLS
    };
    let inherited = vmcs01.read_raw(id);
    if entry.contains(control) {
        vmcs12.word(id)
    } else if id != GUEST_EFER.id() {
        inherited
    } else {
        let has_paging = vmcs12.get(GUEST_CR0) & CR0_PG != 0;
        let mode = if has_paging { EFER_LMA | EFER_LME } else { EFER_LMA };
        if entry.contains(EntryControls::IA32E_MODE_GUEST) { inherited | mode } else { inherited & !mode }
    }
}

/// The bits of a control word that have a class.
fn bits_of_class<W: ControlField>(class: BitMerge) -> u64 {
    W::BITS.iter().filter(|bit| bit.merge == class).map(|bit| 1 << bit.position).sum()
}

/// A control word of vmcs02: the guest hypervisor decides its own bits and no others, and the processor allows the
/// word.
fn check_word<W: ControlField + CapabilityWord>(vmcs02: &Vmcs, word: W, processor: &Processor) {
    let (merged, wanted) = (vmcs02.read_raw(W::FIELD.id()), word.into_word());
    let (must_be_1, may_be_1) = W::allowed(&processor.caps);
    let (must_be_1, may_be_1) = (must_be_1.into_word(), may_be_1.into_word());
    let from_guest = bits_of_class::<W>(BitMerge::FromGuest);
    assert!((merged ^ wanted) & from_guest == 0, "{}: {merged:#x} of {wanted:#x}", W::NAME);
    let forced = W::FORCED.into_word();
    assert!(merged & forced == forced, "{}: {merged:#x} lacks {forced:#x}", W::NAME);
    let others = from_guest | forced | W::COMPUTED.into_word() | must_be_1;
    assert!(merged & !others == 0, "{}: {merged:#x} has bits that are not offered", W::NAME);
    assert!(merged & must_be_1 == must_be_1 && merged & !may_be_1 == 0, "{}: {merged:#x} is not allowed", W::NAME);
}

/// The processor finds no fault with vmcs02's controls that the guest hypervisor would get to know of.
fn check_as_processor(vmcs02: &Vmcs, processor: &Processor) {
    let mut seen = Vmcs12::new(Gpa(0), &processor.caps);
    for id in processor.fields.iter() {
        seen.set_word(id, vmcs02.read_raw(id));
    }
    assert_eq!(check::controls_of_vmcs12(&seen, &processor.caps), Ok(()), "the processor refuses vmcs02");
}

/// VMCS12 after an exit, as the guest hypervisor reads it: what the SDM lets an exit save, and nothing else (SDM 28.2
/// "Recording VM-Exit Information and Updating VM-Entry Control Fields", 28.3 "Saving Guest State").
pub fn expected_after_exit(vmcs12: &Vmcs12, vmcs02: &Vmcs, processor: &Processor, id: FieldId) -> u64 {
    let (old, new) = (vmcs12.word(id), vmcs02.read_raw(id));
    let exit = vmcs12.get(EXIT_CONTROLS);
    let saved_with = |control: ExitControls| if exit.contains(control) { new } else { old };
    match id.info().merge {
        Merge::Guest | Merge::ExitInfo => new,
        Merge::Loaded if id == GUEST_PAT.id() => saved_with(ExitControls::SAVE_PAT),
        Merge::Loaded if id == GUEST_EFER.id() => saved_with(ExitControls::SAVE_EFER),
        Merge::Loaded => saved_with(ExitControls::SAVE_DEBUG_CONTROLS),
        Merge::Pdpte if vmcs12.has_secondary(Secondary::ENABLE_EPT) => new,
        Merge::Timer if vmcs12.get(PIN_CONTROLS).contains(Pin::ACTIVATE_PREEMPTION_TIMER) => {
            saved_with(ExitControls::SAVE_PREEMPTION_TIMER)
        }
        Merge::ControlWord if id == ENTRY_CONTROLS.id() && processor.offered.stores_lma() => {
            let stored = u64::from(EntryControls::IA32E_MODE_GUEST.bits());
            old & !stored | new & stored
        }
        Merge::Copy if id == ENTRY_INTERRUPTION_INFO.id() => old & 0x7fff_ffff,
        Merge::HostOnly if id == VM_INSTRUCTION_ERROR.id() && vmcs12.has_secondary(Secondary::VMCS_SHADOWING) => new,
        _ => old,
    }
}
