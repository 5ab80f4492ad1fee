//! VM entry's checks of the guest-state area (SDM 27.3.1): exit reason 33 with a qualification, or the exit of a guest
//! that executes CPUID.

use shadow::Field;
use shadow::controls::{EntryControls, Secondary};
use shadow::fields::*;
use shadow::registers::{CR0_PE, CR0_PG, CR4_PAE, RFLAGS_VM};

use super::{Change, as_it_is, enter, flip, values};
use crate::code;
use crate::memory::{CODE_32, OTHER_VMCS, SPARE, VMCS, VMXON};
use crate::nested_paging;
use crate::output::Suite;
use crate::vm::{Vm, revision};

const CANONICAL: [u64; 7] =
    [0, 0x7fff_ffff_ffff, 1 << 47, 0x1_0000_0000_0000, 0xffff_7fff_ffff_ffff, 0xffff_8000_0000_0000, 1 << 63];

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    control_registers(suite);
    msrs(suite);
    let modes: [(&str, Change); 4] =
        [("", as_it_is), ("protected-", protected), ("virtual-8086-", virtual_8086), ("restricted-", restricted)];
    for (mode, prepare) in modes {
        segments(suite, mode, prepare);
    }
    tables(suite);
    rip_and_flags(suite);
    non_register(suite);
    link_pointer(suite);
    pdptes(suite);
}

/// 32-bit protected mode without paging.
pub fn protected(vm: &mut Vm) {
    const CODE_32_RIGHTS: u32 = 0xc09b;
    vm.clear(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
    vm.set(GUEST_EFER, 0).clear(GUEST_CR0, CR0_PG);
    vm.set(GUEST_CS_SELECTOR, CODE_32).set(GUEST_CS_ACCESS_RIGHTS, CODE_32_RIGHTS);
}

/// Virtual-8086 mode. The code is beyond the mode's addresses, so that the result is #GP or an entry failure.
fn virtual_8086(vm: &mut Vm) {
    const RIGHTS: u32 = 0xf3;
    protected(vm);
    vm.or(GUEST_RFLAGS, RFLAGS_VM);
    for (selector, base, limit, rights) in SEGMENTS.into_iter().take(6).map(|segment| segment.fields) {
        vm.set(selector, 0x1000).set(base, 0x1_0000).set(limit, 0xffff).set(rights, RIGHTS);
    }
}

/// Not an unrestricted guest.
fn restricted(vm: &mut Vm) {
    vm.clear(SECONDARY_CONTROLS, Secondary::UNRESTRICTED_GUEST);
}

fn control_registers(suite: &mut Suite) {
    flip(suite, "cr0", GUEST_CR0, 0..64, as_it_is);
    flip(suite, "restricted-cr0", GUEST_CR0, 0..64, restricted);
    flip(suite, "protected-cr0", GUEST_CR0, 0..64, protected);
    flip(suite, "cr4", GUEST_CR4, 0..64, as_it_is);
    flip(suite, "protected-cr4", GUEST_CR4, 0..64, protected);
    flip(suite, "cr3", GUEST_CR3, [0, 3, 4, 11].into_iter().chain(40..64), as_it_is);
    values(suite, "cr0-pg-without-pe", GUEST_CR0, [0x8001_0032], protected);
    let debug = |vm: &mut Vm| _ = vm.or(ENTRY_CONTROLS, EntryControls::LOAD_DEBUG_CONTROLS);
    let no_debug = |vm: &mut Vm| _ = vm.clear(ENTRY_CONTROLS, EntryControls::LOAD_DEBUG_CONTROLS);
    flip(suite, "dr7", GUEST_DR7, 0..64, debug);
    flip(suite, "unused-dr7", GUEST_DR7, 0..64, no_debug);
    flip(suite, "debugctl", GUEST_DEBUGCTL, 0..64, debug);
    flip(suite, "unused-debugctl", GUEST_DEBUGCTL, 0..64, no_debug);
}

fn msrs(suite: &mut Suite) {
    values(suite, "sysenter-esp", GUEST_SYSENTER_ESP, CANONICAL, as_it_is);
    values(suite, "sysenter-eip", GUEST_SYSENTER_EIP, CANONICAL, as_it_is);
    let no_pat = |vm: &mut Vm| _ = vm.clear(ENTRY_CONTROLS, EntryControls::LOAD_PAT);
    for byte in 0..8 {
        let values_of_byte = (0..9).chain([0xff]).map(|value: u64| value << (8 * byte));
        values(suite, format_args!("pat-byte-{byte}"), GUEST_PAT, values_of_byte, as_it_is);
    }
    values(suite, "unused-pat", GUEST_PAT, [2, u64::MAX], no_pat);
    let no_efer = |vm: &mut Vm| _ = vm.clear(ENTRY_CONTROLS, EntryControls::LOAD_EFER);
    flip(suite, "efer", GUEST_EFER, 0..64, as_it_is);
    flip(suite, "unused-efer", GUEST_EFER, 0..64, no_efer);
    let long_mode_without_paging = |vm: &mut Vm| {
        vm.clear(ENTRY_CONTROLS, EntryControls::LOAD_EFER).clear(GUEST_CR0, CR0_PG);
    };
    flip(suite, "long-mode-without-paging", GUEST_CR0, [0, 31], long_mode_without_paging);
    flip(suite, "protected-efer", GUEST_EFER, 0..64, protected);
}

type SegmentFields = (Field<u16>, Field<u64>, Field<u32>, Field<u32>);

#[derive(Clone, Copy)]
struct Segment {
    name: &'static str,
    fields: SegmentFields,
}

const fn segment(name: &'static str, fields: SegmentFields) -> Segment {
    Segment { name, fields }
}

const SEGMENTS: [Segment; 8] = [
    segment("cs", (GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS)),
    segment("ss", (GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS)),
    segment("ds", (GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS)),
    segment("es", (GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS)),
    segment("fs", (GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS)),
    segment("gs", (GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS)),
    segment("ldtr", (GUEST_LDTR_SELECTOR, GUEST_LDTR_BASE, GUEST_LDTR_LIMIT, GUEST_LDTR_ACCESS_RIGHTS)),
    segment("tr", (GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS)),
];

fn segments(suite: &mut Suite, mode: &str, prepare: fn(&mut Vm)) {
    const TYPE_MASK: u32 = 0xf;
    for Segment { name, fields: (selector, base, limit, rights) } in SEGMENTS {
        flip(suite, format_args!("{mode}{name}-selector"), selector, [0, 1, 2, 15], prepare);
        flip(suite, format_args!("{mode}{name}-rights"), rights, 0..32, prepare);
        values(suite, format_args!("{mode}{name}-base"), base, CANONICAL.into_iter().chain([1 << 32, 0x10]), prepare);
        values(suite, format_args!("{mode}{name}-limit"), limit, [0, 0x66, 0x67, 0xffff, 0xf_ffff, 0x10_0000], prepare);
        for kind in 0..16 {
            let verdict = enter(code!("cpuid"), |vm| {
                prepare(vm);
                let old = vm.get(rights);
                vm.set(rights, old & !TYPE_MASK | kind);
            });
            suite.case(format_args!("{mode}{name}-type-{kind}"), verdict);
        }
    }
    // LDTR in use.
    let with_ldtr = |vm: &mut Vm| {
        prepare(vm);
        vm.set(GUEST_LDTR_ACCESS_RIGHTS, 0x82).set(GUEST_LDTR_SELECTOR, 0x40).set(GUEST_LDTR_LIMIT, 0xff);
    };
    flip(suite, format_args!("{mode}used-ldtr-selector"), GUEST_LDTR_SELECTOR, [0, 2], with_ldtr);
    flip(suite, format_args!("{mode}used-ldtr-rights"), GUEST_LDTR_ACCESS_RIGHTS, 0..32, with_ldtr);
    values(suite, format_args!("{mode}used-ldtr-base"), GUEST_LDTR_BASE, CANONICAL, with_ldtr);
    privilege(suite, mode, prepare);
}

/// DPL and RPL of CS and SS in all combinations, with all code types.
fn privilege(suite: &mut Suite, mode: &str, prepare: fn(&mut Vm)) {
    for code_kind in [0x9, 0xb, 0xd, 0xf] {
        for code_dpl in [0, 3] {
            for stack_dpl in [0, 3] {
                for stack_rpl in [0, 3] {
                    let verdict = enter(code!("cpuid"), |vm| {
                        prepare(vm);
                        let (code, stack) = (vm.get(GUEST_CS_ACCESS_RIGHTS), vm.get(GUEST_SS_ACCESS_RIGHTS));
                        vm.set(GUEST_CS_ACCESS_RIGHTS, code & !0x6f | code_kind | code_dpl << 5);
                        vm.set(GUEST_SS_ACCESS_RIGHTS, stack & !0x60 | stack_dpl << 5);
                        vm.set(GUEST_SS_SELECTOR, 0x30 | stack_rpl);
                    });
                    let name = format_args!("{mode}privilege-{code_kind:x}-{code_dpl}-{stack_dpl}-{stack_rpl}");
                    suite.case(name, verdict);
                }
            }
        }
    }
}

fn tables(suite: &mut Suite) {
    for (name, base, limit) in
        [("gdtr", GUEST_GDTR_BASE, GUEST_GDTR_LIMIT), ("idtr", GUEST_IDTR_BASE, GUEST_IDTR_LIMIT)]
    {
        values(suite, format_args!("{name}-base"), base, CANONICAL, as_it_is);
        flip(suite, format_args!("{name}-limit"), limit, 0..32, as_it_is);
    }
}

fn rip_and_flags(suite: &mut Suite) {
    values(suite, "rip", GUEST_RIP, [1 << 47, 1 << 48, 1 << 63, 0x7fff_ffff_ffff], as_it_is);
    values(suite, "protected-rip", GUEST_RIP, [1 << 32, 1 << 63], protected);
    flip(suite, "rflags", GUEST_RFLAGS, 0..64, as_it_is);
    flip(suite, "protected-rflags", GUEST_RFLAGS, 0..64, protected);
    let injecting = |vm: &mut Vm| _ = vm.set(ENTRY_INTERRUPTION_INFO, 0x8000_0020);
    flip(suite, "interrupt-rflags", GUEST_RFLAGS, [1, 9], injecting);
    let unpaged = |vm: &mut Vm| {
        protected(vm);
        vm.clear(GUEST_CR0, CR0_PE);
    };
    flip(suite, "real-rflags", GUEST_RFLAGS, 0..22, unpaged);
}

/// Activity state, interruptibility, pending debug exceptions (SDM 27.3.1.5).
fn non_register(suite: &mut Suite) {
    // Not 3: nothing ends wait-for-SIPI on a machine with one processor.
    values(suite, "activity", GUEST_ACTIVITY_STATE, [0, 1, 2, 4, 5, 0x8000_0000], as_it_is);
    flip(suite, "interruptibility", GUEST_INTERRUPTIBILITY, 0..32, as_it_is);
    let interrupts_on = |vm: &mut Vm| _ = vm.or(GUEST_RFLAGS, 1 << 9);
    values(suite, "if-interruptibility", GUEST_INTERRUPTIBILITY, 0..16, interrupts_on);
    for (kind, info) in
        [("interrupt", 0x8000_0020), ("nmi", 0x8000_0202), ("exception", 0x8000_0306), ("mtf", 0x8000_0700)]
    {
        let injecting = |vm: &mut Vm| {
            interrupts_on(vm);
            vm.set(ENTRY_INTERRUPTION_INFO, info);
        };
        values(suite, format_args!("{kind}-interruptibility"), GUEST_INTERRUPTIBILITY, 0..16, injecting);
        values(suite, format_args!("{kind}-activity"), GUEST_ACTIVITY_STATE, 0..3, injecting);
    }
    let hlt = |vm: &mut Vm| _ = vm.set(GUEST_ACTIVITY_STATE, 1).or(GUEST_RFLAGS, 1 << 9);
    values(suite, "hlt-interruptibility", GUEST_INTERRUPTIBILITY, 0..4, hlt);
    let hlt_user = |vm: &mut Vm| {
        vm.set(GUEST_ACTIVITY_STATE, 1).set(GUEST_SS_SELECTOR, 0x33).set(GUEST_CS_SELECTOR, 0x3b);
        vm.or(GUEST_SS_ACCESS_RIGHTS, 3 << 5).or(GUEST_CS_ACCESS_RIGHTS, 3 << 5);
    };
    values(suite, "hlt-at-cpl-3", GUEST_ACTIVITY_STATE, [0, 1], hlt_user);
    flip(suite, "pending-debug", GUEST_PENDING_DEBUG, 0..64, as_it_is);
    for blocking in 0..3_u32 {
        for (name, flags, debugctl) in [("", 0, 0), ("tf-", 1 << 8, 0), ("tf-btf-", 1 << 8, 2)] {
            let prepare = |vm: &mut Vm| {
                vm.set(GUEST_INTERRUPTIBILITY, blocking).or(GUEST_RFLAGS, flags | 1 << 9);
                vm.set(GUEST_DEBUGCTL, debugctl).or(ENTRY_CONTROLS, EntryControls::LOAD_DEBUG_CONTROLS);
            };
            let name = format_args!("{name}blocking-{blocking}-pending-debug");
            values(suite, name, GUEST_PENDING_DEBUG, [0, 1, 0x1000, 0x4000, 0x5000], prepare);
        }
    }
}

fn link_pointer(suite: &mut Suite) {
    OTHER_VMCS.set(0, revision());
    SPARE.set(0, 0);
    for (name, pointer) in [
        ("other", OTHER_VMCS.address()),
        ("current", VMCS.address()),
        ("vmxon", VMXON.address()),
        ("misaligned", OTHER_VMCS.address() + 8),
        ("no-vmcs", SPARE.address()),
        ("too-wide", OTHER_VMCS.address() | 1 << 45),
        ("ones-but-one", u64::MAX - 1),
    ] {
        let verdict = enter(code!("cpuid"), |vm| _ = vm.set(VMCS_LINK_POINTER, pointer));
        suite.case(format_args!("link-pointer-{name}"), verdict);
    }
}

/// PAE paging: the PDPTEs of the VMCS with EPT, of memory without (SDM 27.3.1.6).
fn pdptes(suite: &mut Suite) {
    let pae = |vm: &mut Vm| {
        protected(vm);
        vm.or(GUEST_CR0, CR0_PG).or(GUEST_CR4, CR4_PAE);
        // The page directories of the 64-bit tables serve PAE paging as well.
        vm.set(GUEST_PDPTE0, nested_paging::first_page_directory() | 1);
    };
    for (number, field) in [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3].into_iter().enumerate() {
        let present = |vm: &mut Vm| {
            pae(vm);
            vm.or(field, 1);
        };
        flip(suite, format_args!("pdpte-{number}"), field, (0..12).chain(40..64), present);
        let absent = |vm: &mut Vm| {
            pae(vm);
            vm.clear(field, 1);
        };
        flip(suite, format_args!("absent-pdpte-{number}"), field, (1..12).chain(40..64), absent);
    }
    for bit in (0..12).chain(40..64) {
        let verdict = enter(code!("cpuid"), |vm| {
            pae(vm);
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
            SPARE.set(0, nested_paging::first_page_directory() | 1);
            SPARE.set(3, 1 ^ 1 << bit);
            vm.set(GUEST_CR3, SPARE.address());
        });
        suite.case(format_args!("memory-pdpte-bit-{bit}"), verdict);
    }
    // If other guest state is wrong too, the processor reports that first.
    for (name, field, bit) in [("rflags", GUEST_RFLAGS, 1), ("dr7", GUEST_DR7, 63), ("rip", GUEST_RIP, 32)] {
        let verdict = enter(code!("cpuid"), |vm| {
            pae(vm);
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
            SPARE.set(0, 2 | 1);
            vm.set(GUEST_CR3, SPARE.address());
            let value = vm.get(field) ^ 1 << bit;
            vm.set(field, value);
        });
        suite.case(format_args!("memory-pdpte-and-{name}"), verdict);
    }
}
