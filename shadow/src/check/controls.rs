//! Checks on VMX controls (SDM 27.2.1).

use super::{Check, Violation, require};
use crate::caps::{VmxCaps, ept_vpid};
use crate::controls::{ControlWords, Pin, Primary, Secondary, VmFunctions};
use crate::exit::InterruptionInfo;
use crate::fields::*;
use crate::hw::GuestMemory;
use crate::injection::{GuestMode, Injection, InjectionRules};
use crate::registers::CR0_PE;
use crate::vmcs12::Vmcs12;
use ept::Gpa;

/// All control checks. Failing one is VM-instruction error 7.
///
/// # Errors
///
/// The first check that fails.
pub fn controls(vmcs12: &Vmcs12, caps: &VmxCaps, memory: &impl GuestMemory) -> Check {
    controls_of_vmcs12(vmcs12, caps)?;
    let words = vmcs12.control_words();
    repeated_by_hardware(&words, vmcs12, caps, memory)
}

/// The control checks that the processor cannot make, because vmcs02 has other controls and addresses than VMCS12.
///
/// # Errors
///
/// The first check that fails.
pub fn controls_of_vmcs12(vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let words = vmcs12.control_words();
    reserved_bits(&words, caps)?;
    words.check_dependencies()?;
    execution(&words, vmcs12, caps)?;
    apic(&words, vmcs12, caps)?;
    paging(&words, vmcs12, caps)?;
    exit(vmcs12, caps)?;
    let load = msr_area(caps, vmcs12.get(ENTRY_MSR_LOAD_ADDRESS), vmcs12.get(ENTRY_MSR_LOAD_COUNT));
    require(load, "VM-entry MSR-load area")
}

/// The control checks that the processor makes on vmcs02 with VMCS12's values. The guest hypervisor gets the
/// processor's VMfailValid with error 7.
fn repeated_by_hardware(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps, memory: &impl GuestMemory) -> Check {
    require(vmcs12.get(CR3_TARGET_COUNT) <= caps.cr3_targets(), "CR3-target count")?;
    if words.secondary.contains(Secondary::USE_TSC_SCALING) {
        require(vmcs12.get(TSC_MULTIPLIER) != 0, "TSC multiplier")?;
    }
    tpr_threshold(words, vmcs12, memory)?;
    injection(words, vmcs12, caps)
}

fn reserved_bits(words: &ControlWords, caps: &VmxCaps) -> Check {
    require(caps.pin.permits(words.pin.bits()), "pin-based controls: reserved bits")?;
    require(caps.primary.permits(words.primary.bits()), "primary processor-based controls: reserved bits")?;
    let secondary_active = words.primary.contains(Primary::ACTIVATE_SECONDARY);
    require(
        !secondary_active || caps.secondary.permits(words.secondary.bits()),
        "secondary processor-based controls: reserved bits",
    )?;
    require(words.tertiary.bits() & !caps.tertiary == 0, "tertiary processor-based controls: reserved bits")?;
    require(caps.exit.permits(words.exit.bits()), "VM-exit controls: reserved bits")?;
    require(caps.entry.permits(words.entry.bits()), "VM-entry controls: reserved bits")
}

/// The checks of SDM 27.2.1.1 that are not about the virtual APIC or paging.
fn execution(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let primary = words.primary;
    if primary.contains(Primary::USE_IO_BITMAPS) {
        require(is_page(caps, vmcs12.get(IO_BITMAP_A)), "I/O bitmap A address")?;
        require(is_page(caps, vmcs12.get(IO_BITMAP_B)), "I/O bitmap B address")?;
    }
    if primary.contains(Primary::USE_MSR_BITMAPS) {
        require(is_page(caps, vmcs12.get(MSR_BITMAP)), "MSR bitmap address")?;
    }
    if words.secondary.contains(Secondary::VMCS_SHADOWING) {
        require(is_page(caps, vmcs12.get(VMREAD_BITMAP)), "VMREAD bitmap address")?;
        require(is_page(caps, vmcs12.get(VMWRITE_BITMAP)), "VMWRITE bitmap address")?;
    }
    Ok(())
}

fn tpr_threshold(words: &ControlWords, vmcs12: &Vmcs12, memory: &impl GuestMemory) -> Check {
    /// Offset of VTPR in the virtual-APIC page.
    const VTPR: u64 = 0x80;
    let ControlWords { primary, secondary, .. } = words;
    if !primary.contains(Primary::USE_TPR_SHADOW) || secondary.contains(Secondary::VIRTUAL_INTERRUPT_DELIVERY) {
        return Ok(());
    }
    let threshold = vmcs12.get(TPR_THRESHOLD);
    require(threshold >> 4 == 0, "TPR threshold: reserved bits")?;
    if secondary.contains(Secondary::VIRTUALIZE_APIC_ACCESSES) {
        return Ok(());
    }
    let vtpr = memory.read_u32(Gpa(vmcs12.get(VIRTUAL_APIC_ADDRESS) + VTPR));
    require(threshold <= vtpr >> 4 & 0xf, "TPR threshold above VTPR")
}

fn apic(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let ControlWords { primary, secondary, .. } = words;
    if primary.contains(Primary::USE_TPR_SHADOW) {
        require(is_page(caps, vmcs12.get(VIRTUAL_APIC_ADDRESS)), "virtual-APIC address")?;
    }
    if secondary.contains(Secondary::VIRTUALIZE_APIC_ACCESSES) {
        require(is_page(caps, vmcs12.get(APIC_ACCESS_ADDRESS)), "APIC-access address")?;
    }
    posted_interrupts(words, vmcs12, caps)
}

/// The processor repeats the check of the notification vector.
fn posted_interrupts(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    const DESCRIPTOR_ALIGNMENT: u64 = 64;
    if words.pin.contains(Pin::PROCESS_POSTED_INTERRUPTS) {
        let descriptor = vmcs12.get(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS);
        let aligned = descriptor.is_multiple_of(DESCRIPTOR_ALIGNMENT) && caps.is_physical(descriptor);
        require(aligned, "posted-interrupt descriptor address")?;
    }
    Ok(())
}

fn paging(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let secondary = words.secondary;
    if secondary.contains(Secondary::ENABLE_VPID) {
        require(vmcs12.get(VPID) != 0, "VPID")?;
    }
    if secondary.contains(Secondary::ENABLE_EPT) {
        require(eptp_is_valid(caps, vmcs12.get(EPT_POINTER)), "EPTP")?;
    }
    if secondary.contains(Secondary::ENABLE_PML) {
        require(is_page(caps, vmcs12.get(PML_ADDRESS)), "PML address")?;
    }
    if secondary.contains(Secondary::EPT_VIOLATION_VE) {
        require(
            is_page(caps, vmcs12.get(VIRTUALIZATION_EXCEPTION_INFO)),
            "virtualization-exception information address",
        )?;
    }
    if secondary.contains(Secondary::ENABLE_VM_FUNCTIONS) {
        vm_functions(words, vmcs12, caps)?;
    }
    Ok(())
}

fn vm_functions(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let functions = vmcs12.get(VM_FUNCTION_CONTROLS);
    require(functions.bits() & !caps.vmfunc == 0, "VM-function controls: reserved bits")?;
    if functions.contains(VmFunctions::EPTP_SWITCHING) {
        require(words.secondary.contains(Secondary::ENABLE_EPT), "EPTP switching without EPT")?;
        require(is_page(caps, vmcs12.get(EPTP_LIST_ADDRESS)), "EPTP-list address")?;
    }
    Ok(())
}

/// Whether VM entry and INVEPT accept an EPTP (SDM 25.6.11 "Extended-Page-Table Pointer").
pub fn eptp_is_valid(caps: &VmxCaps, eptp: u64) -> bool {
    const RESERVED: u64 = 0xf80;
    let memory_type = match eptp & 7 {
        0 => caps.ept_vpid & ept_vpid::UC != 0,
        6 => caps.ept_vpid & ept_vpid::WB != 0,
        _ => false,
    };
    let walk_of_4 = eptp >> 3 & 7 == 3 && caps.ept_vpid & ept_vpid::WALK_4 != 0;
    let accessed_dirty = eptp >> 6 & 1 == 0 || caps.ept_vpid & ept_vpid::ACCESSED_DIRTY != 0;
    memory_type && walk_of_4 && accessed_dirty && eptp & RESERVED == 0 && caps.is_physical(eptp)
}

/// SDM 27.2.1.2 "VM-Exit Control Fields".
fn exit(vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let store = msr_area(caps, vmcs12.get(EXIT_MSR_STORE_ADDRESS), vmcs12.get(EXIT_MSR_STORE_COUNT));
    require(store, "VM-exit MSR-store area")?;
    let load = msr_area(caps, vmcs12.get(EXIT_MSR_LOAD_ADDRESS), vmcs12.get(EXIT_MSR_LOAD_COUNT));
    require(load, "VM-exit MSR-load area")
}

/// The checks of the event to inject.
fn injection(words: &ControlWords, vmcs12: &Vmcs12, caps: &VmxCaps) -> Check {
    let real = words.secondary.contains(Secondary::UNRESTRICTED_GUEST) && vmcs12.get(GUEST_CR0) & CR0_PE == 0;
    let mode = if real { GuestMode::Real } else { GuestMode::Protected };
    let injection = Injection {
        info: InterruptionInfo(vmcs12.get(ENTRY_INTERRUPTION_INFO)),
        error_code: vmcs12.get(ENTRY_EXCEPTION_ERROR_CODE),
        instruction_length: vmcs12.get(ENTRY_INSTRUCTION_LENGTH),
    };
    InjectionRules::new(caps, mode).check(&injection).map_err(|error| Violation(error.name()))
}

fn is_page(caps: &VmxCaps, address: u64) -> bool {
    address & 0xfff == 0 && caps.is_physical(address)
}

/// Whether an MSR area is 16-byte aligned, and its last byte within the physical-address width. An area without entries
/// passes unchecked.
fn msr_area(caps: &VmxCaps, address: u64, count: u32) -> bool {
    const ENTRY_BYTES: u64 = 16;
    let last = address.checked_add(u64::from(count) * ENTRY_BYTES).map(|end| end.wrapping_sub(1));
    count == 0
        || address.is_multiple_of(ENTRY_BYTES)
            && caps.is_physical(address)
            && last.is_some_and(|last| caps.is_physical(last))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::CapabilityWord;
    use crate::caps::Policy;
    use crate::controls::Tertiary;
    use crate::controls::{EntryControls, ExitControls};
    use crate::encoding::Width;
    use crate::fake::{FakeMemory, all_offered_caps, skylake_caps};
    use crate::merge::CHECKED_CONTROLS;

    fn minimal(caps: &VmxCaps) -> Vmcs12 {
        let mut vmcs12 = Vmcs12::new(Gpa(0), caps);
        vmcs12.set(PIN_CONTROLS, Pin::allowed(caps).0);
        vmcs12.set(PRIMARY_CONTROLS, Primary::allowed(caps).0);
        vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(caps).0);
        vmcs12.set(ENTRY_CONTROLS, EntryControls::allowed(caps).0);
        vmcs12
    }

    fn verdict(change: impl FnOnce(&mut Vmcs12)) -> Result<(), Violation> {
        let (caps, memory) = (skylake_caps().offered(&Policy::EVERYTHING), FakeMemory::new(0x4000));
        let mut vmcs12 = minimal(&caps);
        change(&mut vmcs12);
        controls(&vmcs12, &caps, &memory)
    }

    #[test]
    fn virtual_interrupts_need_what_they_build_on() {
        let delivering = |pin: Pin, exit: ExitControls, descriptor| {
            verdict(|v| {
                with_secondary(v, Secondary::VIRTUAL_INTERRUPT_DELIVERY);
                with_primary(v, Primary::USE_TPR_SHADOW);
                v.set(VIRTUAL_APIC_ADDRESS, 0x1000);
                v.set(PIN_CONTROLS, v.get(PIN_CONTROLS) | pin);
                v.set(EXIT_CONTROLS, v.get(EXIT_CONTROLS) | exit);
                v.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, descriptor);
            })
        };
        let (external, posted) = (Pin::EXTERNAL_INTERRUPT_EXITING, Pin::PROCESS_POSTED_INTERRUPTS);
        assert!(delivering(Pin::empty(), ExitControls::empty(), 0).is_err());
        assert_eq!(delivering(external, ExitControls::empty(), 0), Ok(()));
        assert!(delivering(external | posted, ExitControls::empty(), 0x40).is_err());
        assert_eq!(delivering(external | posted, ExitControls::ACKNOWLEDGE_INTERRUPT, 0x40), Ok(()));
        assert!(delivering(external | posted, ExitControls::ACKNOWLEDGE_INTERRUPT, 0x20).is_err());
        assert!(verdict(|v| v.set(PIN_CONTROLS, v.get(PIN_CONTROLS) | (external | posted))).is_err());
    }

    #[test]
    fn pml_needs_ept_and_a_page() {
        let logging = |bits, address| {
            verdict(|v| {
                with_secondary(v, bits);
                v.set(EPT_POINTER, 0x1e);
                v.set(PML_ADDRESS, address);
            })
        };
        assert_eq!(logging(Secondary::ENABLE_PML | Secondary::ENABLE_EPT, 0x1000), Ok(()));
        assert_eq!(logging(Secondary::ENABLE_PML | Secondary::ENABLE_EPT, 0x1008), Err(Violation("PML address")));
        assert_eq!(logging(Secondary::ENABLE_PML, 0x1000), Err(Violation("ENABLE_PML needs ENABLE_EPT")));
    }

    fn with_primary(vmcs12: &mut Vmcs12, bits: Primary) {
        vmcs12.set(PRIMARY_CONTROLS, vmcs12.get(PRIMARY_CONTROLS) | bits);
    }

    fn with_secondary(vmcs12: &mut Vmcs12, bits: Secondary) {
        with_primary(vmcs12, Primary::ACTIVATE_SECONDARY);
        vmcs12.set(SECONDARY_CONTROLS, bits);
    }

    #[test]
    fn vm_functions_and_virtualization_exceptions_need_their_fields() {
        let switching = |bits, functions, list| {
            verdict(|v| {
                with_secondary(v, bits | Secondary::ENABLE_VM_FUNCTIONS);
                v.set(EPT_POINTER, 0x1e);
                v.set(VM_FUNCTION_CONTROLS, functions);
                v.set(EPTP_LIST_ADDRESS, list);
            })
        };
        let (none, ept) = (Secondary::empty(), Secondary::ENABLE_EPT);
        assert_eq!(switching(none, VmFunctions::from_bits_retain(0), 1), Ok(()));
        assert_eq!(
            switching(ept, VmFunctions::from_bits_retain(2), 0x1000),
            Err(Violation("VM-function controls: reserved bits"))
        );
        assert_eq!(
            switching(none, VmFunctions::from_bits_retain(1), 0x1000),
            Err(Violation("EPTP switching without EPT"))
        );
        assert_eq!(switching(ept, VmFunctions::from_bits_retain(1), 0x1008), Err(Violation("EPTP-list address")));
        assert_eq!(switching(ept, VmFunctions::from_bits_retain(1), 0x1000), Ok(()));
        let area = |address| {
            verdict(|v| {
                with_secondary(v, Secondary::EPT_VIOLATION_VE);
                v.set(VIRTUALIZATION_EXCEPTION_INFO, address);
            })
        };
        assert_eq!(area(0x1000), Ok(()));
        assert!(area(0x1008).is_err() && area(1 << 40).is_err());
    }

    #[test]
    fn the_least_valid_controls_pass() {
        assert_eq!(verdict(|_| ()), Ok(()));
    }

    #[test]
    fn reserved_bits_of_every_word_are_checked() {
        let words =
            [(PIN_CONTROLS.id(), 1), (PRIMARY_CONTROLS.id(), 1), (EXIT_CONTROLS.id(), 0), (ENTRY_CONTROLS.id(), 0)];
        for (id, bit) in words {
            assert!(verdict(|v| v.set_word(id, v.word(id) & !(1 << bit))).is_err(), "{id:?}");
        }
        assert!(verdict(|v| with_secondary(v, Secondary::ENCLS_EXITING)).is_err(), "a hidden control is reserved");
        assert!(verdict(|v| v.set(SECONDARY_CONTROLS, Secondary::all())).is_ok(), "not looked at unless activated");
    }

    #[test]
    fn bitmaps_and_areas_must_be_aligned_and_physical() {
        let io = |a, b| {
            verdict(|v| {
                with_primary(v, Primary::USE_IO_BITMAPS);
                v.set(IO_BITMAP_A, a);
                v.set(IO_BITMAP_B, b);
            })
        };
        assert_eq!(io(0x1000, 0x2000), Ok(()));
        assert_eq!(io(0x1001, 0x2000), Err(Violation("I/O bitmap A address")));
        assert_eq!(io(0x1000, 1 << 40), Err(Violation("I/O bitmap B address")));
        let area = |address, count| {
            verdict(|v| {
                v.set(ENTRY_MSR_LOAD_ADDRESS, address);
                v.set(ENTRY_MSR_LOAD_COUNT, count);
            })
        };
        assert_eq!(area(0x1010, 1), Ok(()));
        assert_eq!(area(0x1008, 0), Ok(()));
        assert!(area(0x1008, 1).is_err());
        assert_eq!(area((1 << 40) - 16, 1), Ok(()));
        assert!(area((1 << 40) - 16, 2).is_err());
        assert!(area(u64::MAX - 15, u32::MAX).is_err());
    }

    #[test]
    fn nmi_controls_depend_on_each_other() {
        assert!(verdict(|v| v.set(PIN_CONTROLS, v.get(PIN_CONTROLS) | Pin::VIRTUAL_NMIS)).is_err());
        assert!(verdict(|v| with_primary(v, Primary::NMI_WINDOW_EXITING)).is_err());
        assert_eq!(
            verdict(|v| {
                v.set(PIN_CONTROLS, v.get(PIN_CONTROLS) | (Pin::VIRTUAL_NMIS | Pin::NMI_EXITING));
                with_primary(v, Primary::NMI_WINDOW_EXITING);
            }),
            Ok(())
        );
    }

    #[test]
    fn tpr_threshold_is_held_against_vtpr() {
        let threshold = |value, secondary| {
            verdict(|v| {
                with_secondary(v, secondary);
                with_primary(v, Primary::USE_TPR_SHADOW);
                v.set(VIRTUAL_APIC_ADDRESS, 0x1000);
                v.set(TPR_THRESHOLD, value);
            })
        };
        assert_eq!(threshold(0, Secondary::empty()), Ok(()));
        assert_eq!(threshold(1, Secondary::empty()), Err(Violation("TPR threshold above VTPR")));
        assert_eq!(threshold(1, Secondary::VIRTUALIZE_APIC_ACCESSES), Ok(()));
        assert_eq!(
            threshold(0x10, Secondary::VIRTUALIZE_APIC_ACCESSES),
            Err(Violation("TPR threshold: reserved bits"))
        );
    }

    #[test]
    fn paging_controls_need_their_fields() {
        assert_eq!(verdict(|v| with_secondary(v, Secondary::ENABLE_VPID)), Err(Violation("VPID")));
        assert_eq!(verdict(|v| with_secondary(v, Secondary::ENABLE_EPT)), Err(Violation("EPTP")));
        assert!(verdict(|v| with_secondary(v, Secondary::UNRESTRICTED_GUEST)).is_err());
        let caps = skylake_caps().offered(&Policy::EVERYTHING);
        for (eptp, valid) in [
            (0x1e, true),
            (0x18, true),
            (0x5e, true),
            (0x1c, false),
            (0x26, false),
            (0x9e, false),
            (1 << 40 | 0x1e, false),
        ] {
            assert_eq!(eptp_is_valid(&caps, eptp), valid, "{eptp:#x}");
        }
    }

    #[test]
    fn injections_must_make_sense() {
        let inject = |info: u32| verdict(|v| v.set(ENTRY_INTERRUPTION_INFO, info));
        assert_eq!(inject(0x8000_0020), Ok(()));
        assert_eq!(inject(0x8000_0120), Err(Violation("interruption type")));
        assert_eq!(inject(0x8000_0203), Err(Violation("interruption vector")));
        assert_eq!(inject(0x8000_0b0e), Ok(()));
        assert_eq!(inject(0x8000_1b0e), Err(Violation("interruption information: reserved bits")));
        assert_eq!(inject(0x8000_0480), Err(Violation("VM-entry instruction length")));
        assert_eq!(inject(0x0000_7fff), Ok(()), "not valid, not looked at");
        assert_eq!(
            verdict(|v| {
                v.set(ENTRY_INTERRUPTION_INFO, 0x8000_0b0e);
                v.set(ENTRY_EXCEPTION_ERROR_CODE, 0x1_0000);
            }),
            Err(Violation("exception error code: reserved bits"))
        );
    }

    #[test]
    fn an_address_that_a_control_uses_is_a_page_and_physical_and_any_other_is_not_looked_at() {
        type Use = (Field<u64>, Primary, Secondary, &'static str);
        let none = Secondary::empty();
        let uses: [Use; 7] = [
            (IO_BITMAP_A, Primary::USE_IO_BITMAPS, none, "I/O bitmap A address"),
            (IO_BITMAP_B, Primary::USE_IO_BITMAPS, none, "I/O bitmap B address"),
            (MSR_BITMAP, Primary::USE_MSR_BITMAPS, none, "MSR bitmap address"),
            (VIRTUAL_APIC_ADDRESS, Primary::USE_TPR_SHADOW, none, "virtual-APIC address"),
            (APIC_ACCESS_ADDRESS, Primary::empty(), Secondary::VIRTUALIZE_APIC_ACCESSES, "APIC-access address"),
            (VMREAD_BITMAP, Primary::empty(), Secondary::VMCS_SHADOWING, "VMREAD bitmap address"),
            (VMWRITE_BITMAP, Primary::empty(), Secondary::VMCS_SHADOWING, "VMWRITE bitmap address"),
        ];
        for (field, primary, secondary, name) in uses {
            let with = |address| {
                verdict(|v| {
                    with_secondary(v, secondary);
                    with_primary(v, primary);
                    v.set(field, address);
                })
            };
            assert_eq!(with(0x3000), Ok(()), "{name}");
            assert_eq!(with((1 << 40) - 0x1000), Ok(()), "{name}");
            for address in [0x3008, 1 << 40] {
                assert_eq!(with(address), Err(Violation(name)), "{address:#x}");
                assert_eq!(verdict(|v| v.set(field, address)), Ok(()), "{name} unused");
            }
        }
    }

    #[test]
    fn cr3_targets_and_the_tsc_multiplier_are_in_range() {
        assert_eq!(verdict(|v| v.set(CR3_TARGET_COUNT, 4)), Ok(()));
        assert_eq!(verdict(|v| v.set(CR3_TARGET_COUNT, 5)), Err(Violation("CR3-target count")));
        let scaled = |multiplier| {
            verdict(|v| {
                with_secondary(v, Secondary::USE_TSC_SCALING);
                v.set(TSC_MULTIPLIER, multiplier);
            })
        };
        assert_eq!(scaled(0), Err(Violation("TSC multiplier")));
        assert_eq!(scaled(1), Ok(()));
    }

    #[test]
    fn the_timer_is_saved_only_where_it_runs() {
        let saving = |pin: Pin| {
            verdict(|v| {
                v.set(PIN_CONTROLS, v.get(PIN_CONTROLS) | pin);
                v.set(EXIT_CONTROLS, v.get(EXIT_CONTROLS) | ExitControls::SAVE_PREEMPTION_TIMER);
            })
        };
        assert_eq!(saving(Pin::ACTIVATE_PREEMPTION_TIMER), Ok(()));
        let rule = "SAVE_PREEMPTION_TIMER needs ACTIVATE_PREEMPTION_TIMER";
        assert_eq!(saving(Pin::empty()), Err(Violation(rule)));
    }

    /// An entry skips the checks as long as no field of `CHECKED_CONTROLS` is written.
    #[test]
    fn the_verdict_of_software_depends_on_no_field_whose_writes_it_does_not_follow() {
        let caps = all_offered_caps().offered(&Policy::EVERYTHING);
        let mut checked = 0;
        let mut try_with = |primary: Primary, secondary: Secondary, tertiary: Tertiary| {
            let mut vmcs12 = Vmcs12::new(Gpa(0), &caps);
            for id in caps.fields().and(&CHECKED_CONTROLS).iter().filter(|id| id.encoding().width() == Width::W64) {
                vmcs12.set_word(id, 0x1000);
            }
            vmcs12.set(EPT_POINTER, 0x101e);
            vmcs12.set(VPID, 1);
            vmcs12.set(VM_FUNCTION_CONTROLS, VmFunctions::empty());
            vmcs12.set(PIN_CONTROLS, Pin::allowed(&caps).0 | Pin::EXTERNAL_INTERRUPT_EXITING);
            vmcs12.set(PRIMARY_CONTROLS, Primary::allowed(&caps).0 | Primary::ACTIVATE_SECONDARY | primary);
            vmcs12.set(SECONDARY_CONTROLS, secondary);
            vmcs12.set(TERTIARY_CONTROLS, tertiary);
            vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(&caps).0 | ExitControls::ACKNOWLEDGE_INTERRUPT);
            vmcs12.set(ENTRY_CONTROLS, EntryControls::allowed(&caps).0);
            let verdict = controls_of_vmcs12(&vmcs12, &caps);
            checked += usize::from(verdict.is_ok());
            for id in caps.fields().minus(&CHECKED_CONTROLS).iter() {
                for change in [0, 1, 0x1001, 1 << 39, u64::MAX] {
                    let mut other = vmcs12.clone();
                    other.set_word(id, change & id.encoding().width().mask());
                    assert_eq!(controls_of_vmcs12(&other, &caps), verdict, "{id:?} := {change:#x}");
                }
            }
        };
        let ept = Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST;
        for primary in Primary::OFFERED.iter() {
            try_with(primary, ept, Tertiary::empty());
        }
        for secondary in Secondary::OFFERED.iter() {
            try_with(Primary::empty(), ept | secondary, Tertiary::empty());
            try_with(Primary::USE_TPR_SHADOW, ept | secondary, Tertiary::empty());
        }
        for tertiary in Tertiary::OFFERED.iter() {
            try_with(Primary::USE_TPR_SHADOW | Primary::ACTIVATE_TERTIARY, ept, tertiary);
        }
        assert!(checked > 40, "only {checked} of them pass");
    }

    #[test]
    fn a_reserved_tertiary_control_is_refused() {
        let caps = all_offered_caps().offered(&Policy::EVERYTHING);
        let verdict = |tertiary| {
            let mut vmcs12 = Vmcs12::new(Gpa(0), &caps);
            vmcs12.set(PIN_CONTROLS, Pin::allowed(&caps).0);
            vmcs12.set(PRIMARY_CONTROLS, Primary::allowed(&caps).0 | Primary::ACTIVATE_TERTIARY);
            vmcs12.set(EXIT_CONTROLS, ExitControls::allowed(&caps).0);
            vmcs12.set(ENTRY_CONTROLS, EntryControls::allowed(&caps).0);
            vmcs12.set(TERTIARY_CONTROLS, tertiary);
            controls_of_vmcs12(&vmcs12, &caps)
        };
        assert_eq!(verdict(Tertiary::empty()), Ok(()));
        for hidden in Tertiary::HIDDEN.iter() {
            assert!(verdict(hidden).is_err(), "{hidden:?}");
        }
    }
}
