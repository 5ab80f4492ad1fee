//! The VMCS link pointer, the changes of the linked region, the addresses and the content of the bitmaps, and a shadow
//! VMCS as the current VMCS.

use shadow::controls::Secondary;
use shadow::fields::*;

use super::{
    NONE, OTHER_SHADOW, SHADOW, SHADOW_INDICATOR, Seen, VMREADS, VMWRITES, field_of, fill_shadow, linked, observe,
    observe_again, set_bit, with_current,
};
use crate::attempt;
use crate::code;
use crate::cpu::{vmclear, vmptrld, vmptrst, vmread, vmwrite, vmxoff, vmxon};
use crate::groups::flip;
use crate::memory::{DATA, MSR_BITMAPS, OTHER_VMCS, SPARE, VMCS, VMXON};
use crate::output::Suite;
use crate::vm::{Vm, load_fresh, revision};

const RIP: u64 = 0x681e;
const SHADOWING: Secondary = Secondary::VMCS_SHADOWING;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    pointers(suite);
    regions(suite);
    two_vmcss(suite);
    edits(suite);
    current(suite);
    for (name, field) in [("vmread-bitmap", VMREAD_BITMAP), ("vmwrite-bitmap", VMWRITE_BITMAP)] {
        flip(suite, name, field, 0..64, |vm| _ = vm.or(SECONDARY_CONTROLS, SHADOWING));
    }
}

/// Link pointers with the control and without: the results of VM entry, and of VMREAD after it.
fn pointers(suite: &mut Suite) {
    let shadow = SHADOW.address();
    let links = [
        ("none", u64::MAX),
        ("shadow", shadow),
        ("ordinary", OTHER_VMCS.address()),
        ("revision", SPARE.address()),
        ("current", VMCS.address()),
        ("vmxon", VMXON.address()),
        ("zero", 0),
        ("misaligned", shadow + 8),
        ("upper-half", shadow | 1 << 63),
        ("almost-none", u64::MAX - 1),
    ];
    for (name, link) in links {
        for control in ["on", "off"] {
            let mut vm = linked(code!("vmread rax, rcx", "setc dl", "setz dh"), NONE);
            load_other();
            SPARE.set(0, (revision() ^ 2) | SHADOW_INDICATOR);
            vm.registers.rcx = RIP;
            vm.set(VMCS_LINK_POINTER, link);
            if control == "off" {
                vm.clear(SECONDARY_CONTROLS, SHADOWING);
            }
            suite.case(format_args!("link-{name}-{control}"), observe(&mut vm));
        }
    }
    for bit in (0..12).chain(40..64) {
        let mut vm = linked(code!("vmread rax, rcx"), NONE);
        vm.set(VMCS_LINK_POINTER, shadow ^ 1 << bit);
        suite.case(format_args!("link-bit-{bit}"), vm.run());
    }
}

/// Makes another ordinary VMCS current.
fn load_other() {
    load_fresh(&OTHER_VMCS);
    let _ = vmptrld(VMCS.address());
}

/// Actions of the guest hypervisor on a region, between two entries of a nested guest that adds 1 to a field of the
/// region.
fn regions(suite: &mut Suite) {
    let other = OTHER_SHADOW.address();
    let steps: [(&str, fn()); 10] = [
        ("nothing", || ()),
        ("vmptrld", || with_current(&SHADOW, || ())),
        ("vmwrite", || with_current(&SHADOW, || _ = vmwrite(RIP, 0x100))),
        ("vmclear", || _ = vmclear(SHADOW.address())),
        ("vmclear-vmptrld", || {
            let _ = vmclear(SHADOW.address());
            with_current(&SHADOW, || _ = vmwrite(RIP, 0x200));
        }),
        ("vmptrld-vmclear", || {
            let _ = vmptrld(SHADOW.address());
            let _ = vmclear(SHADOW.address());
            let _ = vmptrld(VMCS.address());
        }),
        ("current-cleared", || {
            let _ = vmclear(VMCS.address());
            let _ = vmptrld(VMCS.address());
        }),
        ("vmptrld-current", || _ = vmptrld(VMCS.address())),
        ("vmptrld-fails", || _ = vmptrld(SHADOW.address() + 8)),
        ("vmxoff", || {
            let _ = vmclear(VMCS.address());
            let _ = vmclear(SHADOW.address());
            let _ = (vmxoff(), vmxon(VMXON.address()));
            let _ = vmptrld(VMCS.address());
        }),
    ];
    for (name, step) in steps {
        let mut vm = linked(code!("vmread rax, rcx", "inc rax", "vmwrite rcx, rax"), NONE);
        fill_shadow(&OTHER_SHADOW, 2);
        vm.registers.rcx = RIP;
        for round in 0..3 {
            suite.case(format_args!("region-{name}-{round}"), observe_fresh(&mut vm));
            step();
        }
        vm.set(VMCS_LINK_POINTER, other);
        suite.case(format_args!("region-{name}-other"), observe_fresh(&mut vm));
        vm.set(VMCS_LINK_POINTER, SHADOW.address());
        suite.case(format_args!("region-{name}-back"), observe_fresh(&mut vm));
        let fields = [field_of(&SHADOW, RIP), field_of(&OTHER_SHADOW, RIP)];
        suite.case(format_args!("region-{name}-fields"), format_args!("{fields:x?}"));
    }
}

/// Enters by VMLAUNCH, because a step may have cleared the VMCS.
fn observe_fresh(vm: &mut Vm) -> Seen {
    let _ = vmclear(VMCS.address());
    let _ = vmptrld(VMCS.address());
    observe_again(vm.cleared())
}

/// Two VMCSs take turns, linked to one region and to two.
fn two_vmcss(suite: &mut Suite) {
    let code = code!("vmread rax, rcx", "inc rax", "vmwrite rcx, rax");
    for (name, link) in [("one", &SHADOW), ("two", &OTHER_SHADOW)] {
        let mut vm = linked(code, NONE);
        fill_shadow(&OTHER_SHADOW, 2);
        vm.registers.rcx = RIP;
        let first = vm.run();
        suite.case(format_args!("turns-{name}-first"), format_args!("{first} {:#x}", vm.registers.rax));
        let mut other = Vm::at(&OTHER_VMCS, code);
        other.or(SECONDARY_CONTROLS, SHADOWING);
        other.set(VMREAD_BITMAP, VMREADS.address()).set(VMWRITE_BITMAP, VMWRITES.address());
        other.set(VMCS_LINK_POINTER, link.address());
        other.registers.rcx = RIP;
        for round in 0..2 {
            let _ = vmptrld(OTHER_VMCS.address());
            suite.case(format_args!("turns-{name}-{round}-other"), observe_again(&mut other));
            let _ = vmptrld(VMCS.address());
            suite.case(format_args!("turns-{name}-{round}"), observe_again(&mut vm));
        }
        let fields = [field_of(&SHADOW, RIP), field_of(&OTHER_SHADOW, RIP)];
        suite.case(format_args!("turns-{name}-fields"), format_args!("{fields:x?}"));
    }
    let _ = vmclear(OTHER_VMCS.address());
}

/// Bits of the bitmaps changed from one entry to the next, other pages as bitmaps, one page as all of them.
fn edits(suite: &mut Suite) {
    let mut vm = linked(code!("vmwrite rcx, rax", "inc rax", "vmread rdx, rcx"), NONE);
    vm.registers.rcx = RIP;
    vm.run();
    for (name, vmread_bit, vmwrite_bit) in [
        ("none", false, false),
        ("vmread", true, false),
        ("vmwrite", false, true),
        ("both", true, true),
        ("none-again", false, false),
    ] {
        set_bit(&VMREADS, RIP, vmread_bit);
        set_bit(&VMWRITES, RIP, vmwrite_bit);
        suite.case(format_args!("edit-{name}"), observe_again(&mut vm));
    }
    for (name, vmread, vmwrite) in [
        ("swapped", &VMWRITES, &VMREADS),
        ("one-page", &VMREADS, &VMREADS),
        ("msr-bitmaps", &MSR_BITMAPS, &VMWRITES),
        ("all-three", &MSR_BITMAPS, &MSR_BITMAPS),
    ] {
        vm.set(VMREAD_BITMAP, vmread.address()).set(VMWRITE_BITMAP, vmwrite.address());
        for (round, bit) in [false, true, false].into_iter().enumerate() {
            set_bit(vmread, RIP, bit);
            suite.case(format_args!("edit-{name}-{round}"), observe_again(&mut vm));
        }
    }
}

/// A shadow VMCS is current: its fields can be accessed, and VM entry fails.
fn current(suite: &mut Suite) {
    load_other();
    fill_shadow(&SHADOW, 1);
    suite.case("current-vmptrld", vmptrld(SHADOW.address()));
    suite.case("current-vmptrst", vmptrst().1 == SHADOW.address());
    suite.case("current-vmread", format_args!("{:x?}", vmread(RIP).ok()));
    suite.case("current-vmwrite", vmwrite(RIP, 5));
    suite.case("current-vmwrite-read", format_args!("{:x?}", vmread(RIP).ok()));
    suite.case("current-no-field", vmwrite(0x0900, 5));
    let _ = vmwrite(0x4400, 0);
    suite.case("current-vmlaunch", attempt!("vmlaunch"));
    suite.case("current-vmresume", attempt!("vmresume"));
    suite.case("current-vmlaunch-mov-ss", attempt!("mov ss, {ss:x}", "vmlaunch"; ss = in(reg) DATA));
    suite.case("current-error", format_args!("{:x?}", vmread(0x4400).ok()));
    suite.case("current-vmclear", vmclear(SHADOW.address()));
    suite.case("current-vmclear-leaves-none", format_args!("{:#x}", vmptrst().1));
    OTHER_SHADOW.set(0, revision() | SHADOW_INDICATOR);
    suite.case("vmxon-in-root", vmxon(OTHER_SHADOW.address()));
    let _ = vmptrld(VMCS.address());
    let _ = vmclear(VMCS.address());
    let _ = vmxoff();
    suite.case("vmxon-of-a-shadow-region", vmxon(OTHER_SHADOW.address()));
    let _ = vmxon(VMXON.address());
}
