//! VM entry's checks of the control fields (SDM 27.2.1): VM-instruction error 7, or the exit of a guest that executes
//! CPUID.

use shadow::Field;
use shadow::controls::{ExitControls, Pin, Primary, Secondary};
use shadow::fields::*;

use super::{as_it_is, enter, flip, values};
use crate::code;
use crate::memory::VIRTUAL_APIC;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    suite.case("base", enter(code!("cpuid"), as_it_is));
    words(suite);
    nmis(suite);
    tpr(suite);
    addresses(suite);
    paging(suite);
    msr_areas(suite);
    values(suite, "cr3-target-count", CR3_TARGET_COUNT, [0, 1, 3, 4, 5, 256, 0xffff_ffff], as_it_is);
    timer(suite);
}

fn words(suite: &mut Suite) {
    word(suite, "pin", PIN_CONTROLS);
    word(suite, "primary", PRIMARY_CONTROLS);
    word(suite, "secondary", SECONDARY_CONTROLS);
    word(suite, "exit", EXIT_CONTROLS);
    word(suite, "entry", ENTRY_CONTROLS);
    // Bits of the secondary controls have no meaning while they are not activated.
    flip(suite, "inactive-secondary", SECONDARY_CONTROLS, 0..32, |vm| {
        vm.clear(PRIMARY_CONTROLS, Primary::ACTIVATE_SECONDARY);
    });
    flip(suite, "no-ept-secondary", SECONDARY_CONTROLS, 0..32, without_ept);
}

fn word<T: FieldValue>(suite: &mut Suite, name: &str, word: Field<T>) {
    flip(suite, name, word, 0..32, as_it_is);
    values(suite, name, word, [0, 0xffff_ffff], as_it_is);
}

fn without_ept(vm: &mut Vm) {
    vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
}

fn nmis(suite: &mut Suite) {
    for exiting in [false, true] {
        for virtual_nmis in [false, true] {
            for window in [false, true] {
                let verdict = enter(code!("cpuid"), |vm| {
                    for (wanted, bit) in [(exiting, Pin::NMI_EXITING), (virtual_nmis, Pin::VIRTUAL_NMIS)] {
                        if wanted {
                            vm.or(PIN_CONTROLS, bit);
                        } else {
                            vm.clear(PIN_CONTROLS, bit);
                        }
                    }
                    if window {
                        vm.or(PRIMARY_CONTROLS, Primary::NMI_WINDOW_EXITING);
                    }
                });
                suite.case(format_args!("nmi-exiting-{exiting}-virtual-{virtual_nmis}-window-{window}"), verdict);
            }
        }
    }
}

/// The checks of the TPR threshold: its reserved bits, and its comparison with VTPR.
fn tpr(suite: &mut Suite) {
    for secondary in [Secondary::empty(), Secondary::VIRTUALIZE_APIC_ACCESSES] {
        for vtpr in [0_u8, 0x10, 0x1f, 0x80, 0xff] {
            for threshold in [0, 1, 2, 8, 15, 16, 31, 0x8000_0000] {
                let verdict = enter(code!("cpuid"), |vm| {
                    vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
                    vm.or(SECONDARY_CONTROLS, secondary);
                    vm.set(TPR_THRESHOLD, threshold);
                    VIRTUAL_APIC.set_byte(0x80, vtpr);
                });
                let accesses = u32::from(!secondary.is_empty());
                suite.case(format_args!("tpr-accesses-{accesses}-vtpr-{vtpr:#x}-threshold-{threshold:#x}"), verdict);
            }
        }
    }
}

/// Alignment and width of every address, with the control that uses it.
fn addresses(suite: &mut Suite) {
    let bits = || (0..13).chain(40..64);
    let io = |vm: &mut Vm| _ = vm.or(PRIMARY_CONTROLS, Primary::USE_IO_BITMAPS);
    let tpr = |vm: &mut Vm| _ = vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
    let apic = |vm: &mut Vm| _ = vm.or(SECONDARY_CONTROLS, Secondary::VIRTUALIZE_APIC_ACCESSES);
    flip(suite, "io-bitmap-a", IO_BITMAP_A, (0..12).chain(40..64), io);
    flip(suite, "io-bitmap-b", IO_BITMAP_B, (0..12).chain(40..64), io);
    flip(suite, "msr-bitmap", MSR_BITMAP, (0..12).chain(40..64), as_it_is);
    flip(suite, "virtual-apic", VIRTUAL_APIC_ADDRESS, (0..12).chain(40..64), tpr);
    flip(suite, "apic-access", APIC_ACCESS_ADDRESS, bits(), apic);
    flip(suite, "unused-io-bitmap", IO_BITMAP_A, bits(), as_it_is);
    flip(suite, "unused-virtual-apic", VIRTUAL_APIC_ADDRESS, bits(), as_it_is);
    flip(suite, "unused-apic-access", APIC_ACCESS_ADDRESS, bits(), as_it_is);
    flip(suite, "unused-msr-bitmap", MSR_BITMAP, bits(), |vm| {
        vm.clear(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS);
    });
}

fn paging(suite: &mut Suite) {
    flip(suite, "eptp", EPT_POINTER, (0..12).chain(40..64), as_it_is);
    flip(suite, "unused-eptp", EPT_POINTER, (0..12).chain(40..64), without_ept);
    let no_vpid = |vm: &mut Vm| _ = vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VPID);
    values(suite, "vpid", VPID, [0, 1, 2, 0x8000, 0xffff], as_it_is);
    values(suite, "unused-vpid", VPID, [0, 1], no_vpid);
}

fn msr_areas(suite: &mut Suite) {
    let areas = [
        ("exit-store", EXIT_MSR_STORE_ADDRESS, EXIT_MSR_STORE_COUNT),
        ("exit-load", EXIT_MSR_LOAD_ADDRESS, EXIT_MSR_LOAD_COUNT),
        ("entry-load", ENTRY_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_COUNT),
    ];
    const END: u64 = 1 << 40;
    for (name, address, count) in areas {
        for (entries, value) in [
            (0, 8),
            (0, u64::MAX),
            (1, 1),
            (1, 8),
            (1, END),
            (1, END - 8),
            (2, END - 16),
            (257, END - 4096),
            (1, 1 << 63),
            (2, u64::MAX - 15),
            (u32::MAX, END - 16),
        ] {
            // Areas that pass the checks would be loaded.
            let verdict = enter(code!("cpuid"), |vm| _ = vm.set(address, value).set(count, entries));
            suite.case(format_args!("{name}-{value:#x}-count-{entries}"), verdict);
        }
    }
}

fn timer(suite: &mut Suite) {
    let save = ExitControls::SAVE_PREEMPTION_TIMER;
    for active in [false, true] {
        let verdict = enter(code!("cpuid"), |vm| {
            vm.or(EXIT_CONTROLS, save);
            if !active {
                vm.clear(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER);
            }
        });
        suite.case(format_args!("save-timer-active-{active}"), verdict);
    }
}
