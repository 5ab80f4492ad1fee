use super::*;
use crate::caps::{CapabilityWord, Policy};
use crate::controls::*;
use crate::fake::{FakeMemory, FakeVmcs, all_offered_caps, skylake_caps};
use crate::sync::{SyncSets, save_guest_state, save_stale};
use std::vec::Vec;

pub(super) struct Nested {
    pub(super) caps: VmxCaps,
    memory: FakeMemory,
    vmcs01: FakeVmcs,
    pub(super) vmcs02: FakeVmcs,
    pub(super) vmcs12: Vmcs12,
}

impl Nested {
    /// A VMCS12 like KVM's: EPT, VPID, MSR bitmaps, EFER and debug controls loaded, EFER not saved.
    pub(super) fn like_kvm() -> Self {
        Self::with(ControlWords {
            pin: Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING,
            primary: Primary::ACTIVATE_SECONDARY | Primary::USE_MSR_BITMAPS | Primary::HLT_EXITING,
            secondary: Secondary::ENABLE_EPT | Secondary::ENABLE_VPID | Secondary::UNRESTRICTED_GUEST,
            entry: EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::LOAD_EFER | EntryControls::LOAD_PAT,
            exit: ExitControls::SAVE_DEBUG_CONTROLS | ExitControls::SAVE_PAT | ExitControls::ACKNOWLEDGE_INTERRUPT,
            ..ControlWords::default()
        })
    }

    /// A VMCS12 with these controls, and the bits that the processor requires besides.
    pub(super) fn with(words: ControlWords) -> Self {
        Self::on(skylake_caps(), words)
    }

    /// As `with`, on another processor.
    fn on(machine: VmxCaps, words: ControlWords) -> Self {
        let caps = machine.offered(&Policy::EVERYTHING);
        let mut vmcs12 = Vmcs12::new(Gpa(0x1000), &caps);
        let no_cr3_exits = (Primary::CR3_LOAD_EXITING | Primary::CR3_STORE_EXITING) - words.primary;
        vmcs12.set(PIN_CONTROLS, caps.choose(words.pin, Pin::empty()).unwrap());
        vmcs12.set(PRIMARY_CONTROLS, caps.choose(words.primary, no_cr3_exits).unwrap());
        vmcs12.set(SECONDARY_CONTROLS, caps.choose(words.secondary, Secondary::empty()).unwrap());
        vmcs12.set(TERTIARY_CONTROLS, caps.choose(words.tertiary, Tertiary::empty()).unwrap());
        vmcs12.set(EXIT_CONTROLS, caps.choose(words.exit, ExitControls::empty()).unwrap());
        vmcs12.set(ENTRY_CONTROLS, caps.choose(words.entry, EntryControls::empty()).unwrap());
        let (vmcs01, vmcs02) = (FakeVmcs::new(&machine), FakeVmcs::new(&machine));
        Self { caps, memory: FakeMemory::new(0x10000), vmcs01, vmcs02, vmcs12 }
    }

    pub(super) fn enter(&mut self) -> Vec<FieldId> {
        self.enter_with(None)
    }

    fn enter_with(&mut self, pdptes: Option<[u64; 4]>) -> Vec<FieldId> {
        self.prepare(pdptes);
        self.vmcs02.written()
    }

    /// The writes of an entry to vmcs02, in order.
    pub(super) fn journal(&mut self) -> Vec<(FieldId, u64)> {
        self.prepare(None);
        core::mem::take(&mut self.vmcs02.journal)
    }

    fn prepare(&mut self, pdptes: Option<[u64; 4]>) {
        let inherited = Inherited::read(&self.vmcs01, &self.vmcs12);
        let (caps, memory, sets) = (&self.caps, &self.memory, &SyncSets::new(&self.caps, &FieldSet::EMPTY));
        prepare(&mut self.vmcs02, &mut self.vmcs12, &Surroundings { caps, sets, memory, inherited, pdptes });
    }

    pub(super) fn exit(&mut self) {
        self.vmcs02
            .poke(ENTRY_INTERRUPTION_INFO.id(), u64::from(self.vmcs02.read(ENTRY_INTERRUPTION_INFO)) & 0x7fff_ffff);
        save_guest_state(&self.vmcs02, &mut self.vmcs12, &SyncSets::new(&self.caps, &FieldSet::EMPTY));
    }
}

#[test]
fn a_second_entry_with_nothing_changed_writes_only_what_the_exit_did_not_save() {
    let mut nested = Nested::like_kvm();
    assert!(nested.enter().len() > 80);
    nested.exit();
    assert_eq!(nested.enter(), [GUEST_EFER.id()]);
}

#[test]
fn the_short_merge_of_an_unchanged_vmcs12_does_what_the_long_one_does() {
    let mut nested = Nested::like_kvm();
    nested.enter();
    nested.exit();
    assert!(nested.vmcs12.is_unchanged());
    let mut short = nested.vmcs12.clone();
    let long = nested.enter();
    prepare_unchanged(&mut nested.vmcs02, &mut short);
    assert_eq!(nested.vmcs02.written(), long);
    assert_eq!(short.dirty, nested.vmcs12.dirty);
    short.set(GUEST_RIP, 0x1002);
    assert!(!short.is_unchanged());
}

#[test]
fn advancing_rip_costs_one_write() {
    let mut nested = Nested::like_kvm();
    nested.enter();
    nested.exit();
    nested.vmcs12.set(GUEST_RIP, 0x1002);
    let written = nested.enter();
    assert_eq!(written, [GUEST_RIP.id(), GUEST_EFER.id()]);
    assert_eq!(nested.vmcs02.read(GUEST_RIP), 0x1002);
}

#[test]
fn merged_controls_contain_what_the_host_needs_and_what_the_guest_hypervisor_asked_for() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(SECONDARY_CONTROLS, Secondary::empty());
    nested.enter();
    let secondary = nested.vmcs02.read(SECONDARY_CONTROLS);
    assert!(secondary.contains(Secondary::ENABLE_EPT | Secondary::ENABLE_VPID));
    assert!(nested.vmcs02.read(PRIMARY_CONTROLS).contains(Primary::HLT_EXITING));
    let exit = nested.vmcs02.read(EXIT_CONTROLS);
    assert!(exit.contains(ExitControls::FORCED | ExitControls::ACKNOWLEDGE_INTERRUPT));
    assert!(!exit.contains(ExitControls::SAVE_PREEMPTION_TIMER));
}

/// Without code that merges its word, a bit of the class "from guest" would not reach vmcs02.
#[test]
fn every_bit_that_is_the_guest_hypervisors_reaches_vmcs02() {
    fn check<W: ControlField + PartialEq>(nested: &Nested, from_guest: W) {
        let (merged, offered) = (nested.vmcs02.read(W::FIELD), nested.vmcs12.get(W::FIELD));
        assert!(offered.contains(from_guest) && merged.contains(from_guest), "{}: {merged:?}", W::NAME);
    }
    let machine = all_offered_caps();
    let words = ControlWords {
        pin: Pin::FROM_GUEST,
        primary: Primary::FROM_GUEST | Primary::ACTIVATE_SECONDARY,
        secondary: Secondary::FROM_GUEST,
        tertiary: Tertiary::FROM_GUEST,
        exit: ExitControls::FROM_GUEST,
        entry: EntryControls::FROM_GUEST,
    };
    let mut nested = Nested::on(machine, words);
    if words.exit.contains(ExitControls::ACTIVATE_SECONDARY) {
        nested.vmcs12.set(SECONDARY_EXIT_CONTROLS, SecondaryExitControls::FROM_GUEST);
    }
    nested.enter();
    check(&nested, words.pin);
    check(&nested, Primary::FROM_GUEST);
    check(&nested, words.secondary);
    check(&nested, words.tertiary);
    check(&nested, words.exit);
    check(&nested, words.entry);
    if !SecondaryExitControls::FROM_GUEST.is_empty() {
        check(&nested, SecondaryExitControls::FROM_GUEST);
    }
}

#[test]
fn addresses_are_translated() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(IO_BITMAP_A, 0x3000);
    nested.enter();
    assert_eq!(nested.vmcs02.read(IO_BITMAP_A), 0x3000 + FakeMemory::OFFSET);
}

#[test]
fn an_event_is_injected_once() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(ENTRY_INTERRUPTION_INFO, 0x8000_0b0e);
    nested.vmcs12.set(ENTRY_EXCEPTION_ERROR_CODE, 2);
    nested.enter();
    assert_eq!(nested.vmcs02.read(ENTRY_INTERRUPTION_INFO), 0x8000_0b0e);
    assert_eq!(nested.vmcs02.read(ENTRY_EXCEPTION_ERROR_CODE), 2);
    nested.exit();
    assert!(!nested.enter().contains(&ENTRY_INTERRUPTION_INFO.id()));
}

#[test]
fn a_register_that_vmcs12_does_not_load_is_the_guest_hypervisors() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(ENTRY_CONTROLS, EntryControls::allowed(&nested.caps).0 | EntryControls::IA32E_MODE_GUEST);
    nested.vmcs12.set(GUEST_CR0, CR0_PG);
    nested.vmcs01.poke(GUEST_EFER.id(), 0x801);
    nested.vmcs01.poke(GUEST_DR7.id(), 0x455);
    nested.enter();
    assert_eq!(nested.vmcs02.read(GUEST_EFER), 0xd01);
    assert_eq!(nested.vmcs02.read(GUEST_DR7), 0x455);
}

#[test]
fn the_preemption_timer_starts_from_vmcs12_on_every_entry_and_is_saved_by_every_exit() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(PIN_CONTROLS, nested.vmcs12.get(PIN_CONTROLS) | Pin::ACTIVATE_PREEMPTION_TIMER);
    nested.vmcs12.set(PREEMPTION_TIMER_VALUE, 1000);
    nested.enter();
    assert!(nested.vmcs02.read(EXIT_CONTROLS).contains(ExitControls::SAVE_PREEMPTION_TIMER));
    nested.vmcs02.poke(PREEMPTION_TIMER_VALUE.id(), 400);
    nested.exit();
    nested.enter();
    assert_eq!(nested.vmcs02.read(PREEMPTION_TIMER_VALUE), 1000, "VMCS12 does not save it");
}

#[test]
fn what_exits_no_longer_save_keeps_the_value_that_the_last_one_saved() {
    let mut nested = Nested::like_kvm();
    let exit_controls = nested.vmcs12.get(EXIT_CONTROLS);
    nested.vmcs12.set(PIN_CONTROLS, nested.vmcs12.get(PIN_CONTROLS) | Pin::ACTIVATE_PREEMPTION_TIMER);
    nested.vmcs12.set(EXIT_CONTROLS, exit_controls | ExitControls::SAVE_PREEMPTION_TIMER);
    nested.vmcs12.set(PREEMPTION_TIMER_VALUE, 1000);
    nested.enter();
    nested.vmcs02.poke(PREEMPTION_TIMER_VALUE.id(), 400);
    nested.exit();
    nested.vmcs12.set(EXIT_CONTROLS, exit_controls);
    nested.enter();
    assert_eq!(nested.vmcs02.read(PREEMPTION_TIMER_VALUE), 400);
    nested.vmcs02.poke(PREEMPTION_TIMER_VALUE.id(), 100);
    nested.exit();
    save_stale(&nested.vmcs02, &mut nested.vmcs12);
    assert_eq!(nested.vmcs12.get(PREEMPTION_TIMER_VALUE), 400);
}

#[test]
fn the_error_of_a_nested_hypervisors_vmread_reaches_vmcs12_under_vmcs_shadowing_only() {
    for (shadowing, expected) in [(Secondary::VMCS_SHADOWING, 12), (Secondary::empty(), 7)] {
        let mut nested = Nested::like_kvm();
        nested.vmcs12.set(SECONDARY_CONTROLS, nested.vmcs12.get(SECONDARY_CONTROLS) | shadowing);
        nested.vmcs12.set(VM_INSTRUCTION_ERROR, 7);
        nested.enter();
        nested.vmcs02.poke(VM_INSTRUCTION_ERROR.id(), 12);
        nested.exit();
        save_stale(&nested.vmcs02, &mut nested.vmcs12);
        assert_eq!(nested.vmcs12.get(VM_INSTRUCTION_ERROR), expected);
    }
}

#[test]
fn a_nested_guest_without_ept_gets_the_pdptes_from_memory() {
    let mut nested = Nested::like_kvm();
    nested.vmcs12.set(SECONDARY_CONTROLS, Secondary::empty());
    nested.enter_with(Some([1, 2, 3, 4]));
    assert_eq!(nested.vmcs02.read(GUEST_PDPTE2), 3);
}

#[test]
fn stale_state_written_by_the_guest_hypervisor_reaches_vmcs02() {
    let mut nested = Nested::like_kvm();
    nested.enter();
    nested.vmcs02.poke(GUEST_ES_BASE.id(), 0x7000);
    nested.exit();
    nested.vmcs12.set(GUEST_ES_BASE, 0);
    assert!(nested.enter().contains(&GUEST_ES_BASE.id()));
    save_stale(&nested.vmcs02, &mut nested.vmcs12);
    assert_eq!(nested.vmcs12.get(GUEST_ES_BASE), 0);
}

/// A control that vmcs02 copies uses fields of vmcs02, which something has to write. For a field of the class `HostOnly`
/// that is code of its own; this list names the fields that have it.
#[test]
fn a_field_that_a_copied_control_uses_is_merged_or_has_code_that_writes_it() {
    const HAVE_CODE: [FieldId; 4] =
        [MSR_BITMAP.id(), VM_FUNCTION_CONTROLS.id(), VMREAD_BITMAP.id(), VMWRITE_BITMAP.id()];
    let is_copied = |control: &Control| match *control {
        Control::Pin(bits) => bits.intersects(Pin::FROM_GUEST),
        Control::Primary(bits) => bits.intersects(Primary::FROM_GUEST),
        Control::Secondary(bits) => bits.intersects(Secondary::FROM_GUEST),
        Control::Tertiary(bits) => bits.intersects(Tertiary::FROM_GUEST),
        Control::Exit(bits) => bits.intersects(ExitControls::FROM_GUEST),
        Control::SecondaryExit(bits) => bits.intersects(SecondaryExitControls::FROM_GUEST),
        Control::Entry(bits) => bits.intersects(EntryControls::FROM_GUEST),
        Control::VmFunction(bits) => bits.intersects(VmFunctions::FROM_GUEST),
    };
    let fields = FieldId::all().filter(|id| id.info().merge == Merge::HostOnly).filter(|id| match id.info().exists {
        Exists::With(controls) => controls.iter().any(is_copied),
        _ => false,
    });
    assert_eq!(fields.collect::<Vec<_>>(), HAVE_CODE);
}
