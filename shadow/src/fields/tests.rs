use super::*;
use crate::caps::Policy;
use x86::vmx::vmcs;

#[test]
fn encodings_agree_with_the_x86_crate() {
    let pairs: &[(FieldId, u32)] = &[
        (VPID.id(), vmcs::control::VPID),
        (GUEST_INTERRUPT_STATUS.id(), vmcs::guest::INTERRUPT_STATUS),
        (HOST_TR_SELECTOR.id(), vmcs::host::TR_SELECTOR),
        (EPT_POINTER.id(), vmcs::control::EPTP_FULL),
        (TSC_MULTIPLIER.id(), vmcs::control::TSC_MULTIPLIER_FULL),
        (VMREAD_BITMAP.id(), vmcs::control::VMREAD_BITMAP_ADDR_FULL),
        (GUEST_PHYSICAL_ADDRESS.id(), vmcs::ro::GUEST_PHYSICAL_ADDR_FULL),
        (GUEST_EFER.id(), vmcs::guest::IA32_EFER_FULL),
        (GUEST_PDPTE3.id(), vmcs::guest::PDPTE3_FULL),
        (HOST_EFER.id(), vmcs::host::IA32_EFER_FULL),
        (SECONDARY_CONTROLS.id(), vmcs::control::SECONDARY_PROCBASED_EXEC_CONTROLS),
        (EXIT_CONTROLS.id(), vmcs::control::VMEXIT_CONTROLS),
        (ENTRY_CONTROLS.id(), vmcs::control::VMENTRY_CONTROLS),
        (EXIT_INSTRUCTION_INFO.id(), vmcs::ro::VMEXIT_INSTRUCTION_INFO),
        (GUEST_TR_ACCESS_RIGHTS.id(), vmcs::guest::TR_ACCESS_RIGHTS),
        (PREEMPTION_TIMER_VALUE.id(), vmcs::guest::VMX_PREEMPTION_TIMER_VALUE),
        (CR4_READ_SHADOW.id(), vmcs::control::CR4_READ_SHADOW),
        (GUEST_LINEAR_ADDRESS.id(), vmcs::ro::GUEST_LINEAR_ADDR),
        (GUEST_RIP.id(), vmcs::guest::RIP),
        (GUEST_SYSENTER_EIP.id(), vmcs::guest::IA32_SYSENTER_EIP),
        (HOST_RIP.id(), vmcs::host::RIP),
    ];
    for &(id, encoding) in pairs {
        assert_eq!(id.encoding(), Encoding(encoding), "{id:?}");
    }
}

#[test]
fn exit_information_is_the_only_area_that_is_read_only() {
    for id in FieldId::all() {
        let info = id.info();
        if info.merge == Merge::ExitInfo {
            assert_eq!(info.encoding.area(), Area::ExitInfo, "{id:?}");
        }
        let is_host_state = matches!(info.merge, Merge::HostState | Merge::Passing);
        assert_eq!(is_host_state, info.encoding.area() == Area::Host, "{id:?}");
    }
}

/// The indexes of SDM Appendix B by width and area, written down apart from the table. The 64-bit fields include those
/// of FRED, user interrupts, APIC-timer virtualization and APX, from newer editions.
#[test]
fn the_table_has_the_encodings_of_appendix_b_and_no_other() {
    use crate::index::lookup;
    use Area::{Control, ExitInfo, Guest, Host};
    use Width::{Nat, W16, W32, W64};
    let expected: &[(Width, Area, &[u16])] = &[
        (W16, Control, &[0, 1, 2, 3, 4, 5]),
        (W16, ExitInfo, &[]),
        (W16, Guest, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (W16, Host, &[0, 1, 2, 3, 4, 5, 6]),
        (W64, ExitInfo, &[0, 1, 2, 3]),
        (W32, ExitInfo, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (W32, Host, &[0]),
        (Nat, Control, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (Nat, ExitInfo, &[0, 1, 2, 3, 4, 5]),
    ];
    let ranges: &[(Width, Area, u16, &[u16])] = &[
        (W64, Control, 41, &[35, 36, 40]),
        (W64, Guest, 24, &[21, 22]),
        (W64, Host, 13, &[12]),
        (W32, Control, 18, &[]),
        (W32, Guest, 23, &[22]),
        (Nat, Guest, 22, &[]),
        (Nat, Host, 14, &[]),
    ];
    let is_defined = |encoding: Encoding| {
        let of = |width, area| (width, area) == (encoding.width(), encoding.area());
        let index = encoding.index();
        expected.iter().any(|&(width, area, indexes)| of(width, area) && indexes.contains(&index))
            || ranges
                .iter()
                .any(|&(width, area, last, holes)| of(width, area) && index <= last && !holes.contains(&index))
    };
    for raw in (0..0x8000).step_by(2).map(Encoding).filter(|encoding| encoding.reserved() == 0) {
        assert_eq!(lookup(raw).is_some(), is_defined(raw), "{raw:?}");
    }
}

#[test]
fn a_field_of_a_feature_that_is_not_offered_does_not_exist_for_the_guest_hypervisor() {
    use crate::caps::VmxCaps;
    use crate::controls::{Allowed, Tertiary};
    let everything = Allowed { must_be_1: 0, may_be_1: u32::MAX };
    let machine = VmxCaps {
        pin: everything,
        primary: everything,
        secondary: everything,
        tertiary: u64::MAX,
        exit: everything,
        secondary_exit: u64::MAX,
        entry: everything,
        vmfunc: u64::MAX,
        misc: 4 << 16,
        ..VmxCaps::default()
    };
    let absent: std::vec::Vec<_> = FieldId::all().filter(|&id| !machine.has_field(id)).collect();
    assert_eq!(absent, [SHARED_EPT_POINTER.id(), EXTENDED_INSTRUCTION_INFO.id()]);
    let offered = machine.offered(&Policy::EVERYTHING);
    for field in [GUEST_FRED_CONFIG, HOST_FRED_SSP3, GUEST_SPEC_CTRL, HLAT_POINTER, VMREAD_BITMAP, GUEST_DEADLINE] {
        assert!(!offered.has_field(field.id()), "{:?}", field.id());
    }
    assert!(offered.has_field(TERTIARY_CONTROLS.id()) && !offered.has_field(SECONDARY_EXIT_CONTROLS.id()));
    let without_tertiary = VmxCaps { tertiary: Tertiary::HIDDEN.bits(), ..machine }.offered(&Policy::EVERYTHING);
    assert!(!without_tertiary.has_field(TERTIARY_CONTROLS.id()), "nothing to activate");
}

#[test]
fn the_encoding_for_what_must_leave_the_host_state_alone_is_that_of_no_host_field() {
    for id in FieldId::all() {
        let passes = id.info().merge == Merge::Passing;
        let expected = if id.encoding().area() == Area::Host && !passes { Encoding(u32::MAX) } else { id.encoding() };
        assert_eq!(id.encoding_but_host_state(), expected, "{id:?}");
    }
    assert_eq!(HOST_RIP.id().encoding_but_host_state().reserved(), Encoding(u32::MAX).reserved());
    assert_ne!(HOST_RIP.id().encoding_but_host_state().reserved(), 0);
}
