//! The writes of the merge for the VMCS12s of two guest hypervisors, entry after entry, compared with the journals
//! below. `UPDATE_EXPECT=1 cargo test -p shadow golden` writes new journals.

use super::tests::Nested;
use super::*;
use crate::controls::ControlWords;
use crate::encoding::Area;
use expect_test::{Expect, expect};
use proptest::prelude::*;
use std::fmt::Write;
use std::string::String;
use std::vec::Vec;

/// A VMCS12 like Xen's for a guest with hardware-assisted paging: I/O bitmaps, TPR shadow, EFER and PAT both loaded and
/// saved.
fn like_xen() -> Nested {
    let mut nested = Nested::with(ControlWords {
        pin: Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING | Pin::VIRTUAL_NMIS,
        primary: Primary::ACTIVATE_SECONDARY
            | Primary::USE_TSC_OFFSETTING
            | Primary::USE_TPR_SHADOW
            | Primary::USE_IO_BITMAPS
            | Primary::USE_MSR_BITMAPS
            | Primary::HLT_EXITING
            | Primary::MWAIT_EXITING
            | Primary::MONITOR_EXITING,
        secondary: Secondary::ENABLE_EPT
            | Secondary::ENABLE_VPID
            | Secondary::UNRESTRICTED_GUEST
            | Secondary::WBINVD_EXITING
            | Secondary::PAUSE_LOOP_EXITING,
        exit: ExitControls::HOST_ADDRESS_SPACE_SIZE
            | ExitControls::ACKNOWLEDGE_INTERRUPT
            | ExitControls::SAVE_PAT
            | ExitControls::LOAD_PAT
            | ExitControls::SAVE_EFER
            | ExitControls::LOAD_EFER,
        entry: EntryControls::LOAD_PAT | EntryControls::LOAD_EFER,
        ..ControlWords::default()
    });
    nested.vmcs12.set(IO_BITMAP_A, 0x2000);
    nested.vmcs12.set(IO_BITMAP_B, 0x3000);
    nested.vmcs12.set(VIRTUAL_APIC_ADDRESS, 0x4000);
    nested
}

/// Changes a field to another value that fits it.
fn change(nested: &mut Nested, id: FieldId) {
    nested.vmcs12.set_word(id, nested.vmcs12.word(id) ^ 0x1000);
}

/// Journals of entries: of the first, the writes of other values than 0; of an unchanged one; and one entry after a
/// write to each field, if the entry does more or less than write the field itself.
fn journals(new: impl Fn() -> Nested) -> String {
    let mut text = String::new();
    let mut nested = new();
    let first = nested.journal();
    writeln!(text, "first: {} writes", first.len()).unwrap();
    for (id, value) in first.iter().filter(|(_, value)| *value != 0) {
        writeln!(text, "  {id:?} = {value:#x}").unwrap();
    }
    nested.exit();
    let unchanged = nested.enter();
    writeln!(text, "unchanged: {unchanged:?}").unwrap();
    let mut unwritten = Vec::new();
    for id in nested.caps.fields().iter().filter(|id| id.encoding().area() != Area::ExitInfo) {
        let mut nested = new();
        nested.enter();
        nested.exit();
        change(&mut nested, id);
        let mut written = nested.enter();
        written.retain(|written| !unchanged.contains(written));
        if written.is_empty() && !unchanged.contains(&id) {
            unwritten.push(id);
        } else if written != [id] && !unchanged.contains(&id) {
            writeln!(text, "{id:?} changed: {written:?}").unwrap();
        }
    }
    writeln!(text, "changed, and nothing written: {unwritten:?}").unwrap();
    text
}

fn check(new: impl Fn() -> Nested, expected: &Expect) {
    expected.assert_eq(&journals(new));
}

#[test]
fn golden_journal_of_a_vmcs12_like_kvms() {
    check(
        Nested::like_kvm,
        &expect![[r#"
            first: 95 writes
              IO_BITMAP_A = 0x1000000000
              IO_BITMAP_B = 0x1000000000
              VIRTUAL_APIC_ADDRESS = 0x1000000000
              APIC_ACCESS_ADDRESS = 0x1000000000
              POSTED_INTERRUPT_DESCRIPTOR_ADDRESS = 0x1000000000
              PIN_CONTROLS = 0x1f
              PRIMARY_CONTROLS = 0x940061f2
              SECONDARY_CONTROLS = 0xa2
              EXIT_CONTROLS = 0x3fefff
              ENTRY_CONTROLS = 0xd1ff
            unchanged: [GUEST_EFER]
            PIN_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            PRIMARY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            EXIT_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            ENTRY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            SECONDARY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            changed, and nothing written: [VPID, HOST_ES_SELECTOR, HOST_CS_SELECTOR, HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR, HOST_TR_SELECTOR, MSR_BITMAP, EXIT_MSR_STORE_ADDRESS, EXIT_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_ADDRESS, EXECUTIVE_VMCS_POINTER, PML_ADDRESS, VM_FUNCTION_CONTROLS, EPT_POINTER, EPTP_LIST_ADDRESS, VMREAD_BITMAP, VMWRITE_BITMAP, VIRTUALIZATION_EXCEPTION_INFO, VMCS_LINK_POINTER, HOST_PAT, HOST_EFER, EXIT_MSR_STORE_COUNT, EXIT_MSR_LOAD_COUNT, ENTRY_MSR_LOAD_COUNT, GUEST_SMBASE, PREEMPTION_TIMER_VALUE, HOST_SYSENTER_CS, HOST_CR0, HOST_CR3, HOST_CR4, HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_SYSENTER_ESP, HOST_SYSENTER_EIP, HOST_RSP, HOST_RIP]
        "#]],
    );
}

#[test]
fn golden_journal_of_a_vmcs12_like_xens() {
    check(
        like_xen,
        &expect![[r#"
            first: 95 writes
              IO_BITMAP_A = 0x1000002000
              IO_BITMAP_B = 0x1000003000
              VIRTUAL_APIC_ADDRESS = 0x1000004000
              APIC_ACCESS_ADDRESS = 0x1000000000
              POSTED_INTERRUPT_DESCRIPTOR_ADDRESS = 0x1000000000
              PIN_CONTROLS = 0x3f
              PRIMARY_CONTROLS = 0xb62065fa
              SECONDARY_CONTROLS = 0x4e2
              EXIT_CONTROLS = 0x3fefff
              ENTRY_CONTROLS = 0xd1ff
            unchanged: []
            PIN_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            PRIMARY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            EXIT_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            ENTRY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            SECONDARY_CONTROLS changed: [PIN_CONTROLS, PRIMARY_CONTROLS, SECONDARY_CONTROLS, EXIT_CONTROLS, ENTRY_CONTROLS]
            changed, and nothing written: [VPID, HOST_ES_SELECTOR, HOST_CS_SELECTOR, HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR, HOST_TR_SELECTOR, MSR_BITMAP, EXIT_MSR_STORE_ADDRESS, EXIT_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_ADDRESS, EXECUTIVE_VMCS_POINTER, PML_ADDRESS, VM_FUNCTION_CONTROLS, EPT_POINTER, EPTP_LIST_ADDRESS, VMREAD_BITMAP, VMWRITE_BITMAP, VIRTUALIZATION_EXCEPTION_INFO, VMCS_LINK_POINTER, HOST_PAT, HOST_EFER, EXIT_MSR_STORE_COUNT, EXIT_MSR_LOAD_COUNT, ENTRY_MSR_LOAD_COUNT, GUEST_SMBASE, PREEMPTION_TIMER_VALUE, HOST_SYSENTER_CS, HOST_CR0, HOST_CR3, HOST_CR4, HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE, HOST_GDTR_BASE, HOST_IDTR_BASE, HOST_SYSENTER_ESP, HOST_SYSENTER_EIP, HOST_RSP, HOST_RIP]
        "#]],
    );
}

proptest! {
    #[test]
    fn merged_controls_have_what_the_host_needs_and_nothing_hidden(
        pin: u32, primary: u32, secondary: u32, exit: u32, entry: u32
    ) {
        let mut nested = Nested::like_kvm();
        let allowed = |word: u32, allowed: crate::controls::Allowed| word & allowed.may_be_1 | allowed.must_be_1;
        let caps = nested.caps.clone();
        nested.vmcs12.set(PIN_CONTROLS, Pin::from_bits_retain(allowed(pin, caps.pin)));
        nested.vmcs12.set(PRIMARY_CONTROLS, Primary::from_bits_retain(allowed(primary, caps.primary)));
        nested.vmcs12.set(SECONDARY_CONTROLS, Secondary::from_bits_retain(allowed(secondary, caps.secondary)));
        nested.vmcs12.set(EXIT_CONTROLS, ExitControls::from_bits_retain(allowed(exit, caps.exit)));
        nested.vmcs12.set(ENTRY_CONTROLS, EntryControls::from_bits_retain(allowed(entry, caps.entry)));
        nested.enter();
        macro_rules! check_word {
            ($word:ident, $field:ident, $active:expr) => {
                let merged = nested.vmcs02.read($field);
                let wanted = if $active { nested.vmcs12.get($field) } else { $word::empty() };
                prop_assert!(merged.contains($word::FORCED), "{merged:?}");
                prop_assert!(!merged.intersects($word::HIDDEN), "{merged:?}");
                prop_assert_eq!(merged & $word::FROM_GUEST, wanted & $word::FROM_GUEST);
            };
        }
        check_word!(Pin, PIN_CONTROLS, true);
        check_word!(Primary, PRIMARY_CONTROLS, true);
        check_word!(Secondary, SECONDARY_CONTROLS, primary & Primary::ACTIVATE_SECONDARY.bits() != 0);
        check_word!(ExitControls, EXIT_CONTROLS, true);
        check_word!(EntryControls, ENTRY_CONTROLS, true);
    }

    #[test]
    fn a_second_entry_writes_only_what_the_exit_did_not_save_whatever_was_written_before(
        rows in proptest::collection::vec(0..FIELD_COUNT, 0..20)
    ) {
        let mut nested = like_xen();
        let reloaded = { nested.enter(); nested.exit(); nested.enter() };
        for row in rows {
            let id = FieldId::all().nth(row).unwrap();
            // After a change of a control word, other fields are reloaded.
            if nested.caps.has_field(id) && !CONTROL_WORDS.contains(id) {
                change(&mut nested, id);
            }
        }
        nested.enter();
        nested.exit();
        let written: Vec<FieldId> = nested.enter();
        prop_assert_eq!(written, reloaded);
    }
}
