//! The VMX instructions' error paths (SDM chapter 31 "VMX Instruction Reference").

use crate::attempt;
use crate::code;
use crate::cpu::*;
use crate::fault::Outcome;
use crate::memory::*;
use crate::nested_paging;
use crate::output::Suite;
use crate::vm::{Vm, load_fresh, revision};

/// Runs all cases. Ends without a current VMCS.
pub fn run(suite: &mut Suite) {
    regions(suite);
    current(suite);
    launch_states(suite);
    invept_types(suite);
    invvpid_types(suite);
    // VMCALL with a current VMCS is not tried: Bochs ends there ("not implemented").
    suite.case("vmfunc", attempt!("vmfunc"; in("eax") 0, in("ecx") 0));
    suite.case("vmfunc-1", attempt!("vmfunc"; in("eax") 1, in("ecx") 0));
    suite.case("getsec", attempt!(".byte 0x0f, 0x37"; in("eax") 0));
    error_number(suite);
}

/// Addresses that VMCLEAR and VMPTRLD reject.
fn regions(suite: &mut Suite) {
    type Instruction = fn(u64) -> Outcome;
    let instructions: [(&str, Instruction); 2] = [("vmclear", vmclear), ("vmptrld", vmptrld)];
    for (name, execute) in instructions {
        load_fresh(&VMCS);
        OTHER_VMCS.fill(0);
        OTHER_VMCS.set(0, revision());
        let region = OTHER_VMCS.address();
        for offset in [1, 2, 8, 0x800] {
            suite.case(format_args!("{name}-misaligned-{offset:#x}"), execute(region + offset));
        }
        for bit in 32..64 {
            // An address below the physical-address width may hold anything.
            if bit >= 40 {
                suite.case(format_args!("{name}-address-bit-{bit}"), execute(region | 1 << bit));
            }
        }
        suite.case(format_args!("{name}-vmxon-pointer"), execute(VMXON.address()));
        suite.case(format_args!("{name}-all-ones"), execute(u64::MAX));
        for bit in 0..32 {
            OTHER_VMCS.set(0, revision() ^ 1 << bit);
            suite.case(format_args!("{name}-revision-bit-{bit}"), execute(region));
            let _ = vmclear(region);
        }
        OTHER_VMCS.set(0, revision());
    }
}

/// Which VMCS is current, and which values a VMCS keeps.
fn current(suite: &mut Suite) {
    const GUEST_RIP: u64 = 0x681e;
    load_fresh(&OTHER_VMCS);
    load_fresh(&VMCS);
    suite.case("vmptrst-current", vmptrst().1 == VMCS.address());
    let _ = vmwrite(GUEST_RIP, 1);
    let _ = vmptrld(OTHER_VMCS.address());
    suite.case("vmptrst-other", vmptrst().1 == OTHER_VMCS.address());
    suite.case("fields-are-apart", format_args!("{:?}", vmread(GUEST_RIP).ok()));
    let _ = vmptrld(VMCS.address());
    suite.case("fields-are-kept", format_args!("{:?}", vmread(GUEST_RIP).ok()));
    suite.case("vmptrld-current", vmptrld(VMCS.address()));
    suite.case("fields-are-kept-by-vmptrld-of-current", format_args!("{:?}", vmread(GUEST_RIP).ok()));
    suite.case("vmclear-other", vmclear(OTHER_VMCS.address()));
    suite.case("vmclear-other-leaves-current", vmptrst().1 == VMCS.address());
    suite.case("vmclear-current", vmclear(VMCS.address()));
    suite.case("vmclear-current-leaves-none", format_args!("{:#x}", vmptrst().1));
    suite.case("vmread-after-vmclear", vmread(GUEST_RIP).err().unwrap_or(Outcome::Success));
    suite.case("vmptrld-after-vmclear", vmptrld(VMCS.address()));
    suite.case("fields-are-kept-by-vmclear", format_args!("{:?}", vmread(GUEST_RIP).ok()));
    suite.case("vmclear-misaligned-leaves-current", {
        let _ = vmclear(VMCS.address() + 8);
        vmptrst().1 == VMCS.address()
    });
    suite.case("vmxoff-and-on", {
        let _ = vmxoff();
        vmxon(VMXON.address())
    });
    suite.case("vmxon-leaves-no-current", format_args!("{:#x}", vmptrst().1));
}

fn launch_states(suite: &mut Suite) {
    let code = code!("cpuid");
    let mut vm = Vm::new(code);
    suite.case("vmresume-clear", attempt!("vmresume"));
    suite.case("vmlaunch-clear", vm.run());
    suite.case("vmlaunch-launched", attempt!("vmlaunch"));
    suite.case("vmresume-launched", vm.run());
    let _ = vmptrld(VMCS.address());
    suite.case("vmlaunch-launched-after-vmptrld", attempt!("vmlaunch"));
    load_fresh(&OTHER_VMCS);
    let _ = vmptrld(VMCS.address());
    suite.case("vmlaunch-launched-after-another", attempt!("vmlaunch"));
    suite.case("vmclear-launched", vmclear(VMCS.address()));
    let _ = vmptrld(VMCS.address());
    suite.case("vmresume-cleared", attempt!("vmresume"));
    // A launch that fails leaves the VMCS clear.
    let mut vm = Vm::new(code);
    vm.set(shadow::fields::HOST_CR3, u64::MAX);
    suite.case("vmlaunch-bad-host", vm.run());
    suite.case("vmresume-after-failed-launch", attempt!("vmresume"));
    vm.set(shadow::fields::HOST_CR3, host_cr3()).set(shadow::fields::GUEST_RFLAGS, 0);
    suite.case("vmlaunch-bad-guest", vm.run());
    suite.case("vmresume-after-failed-guest-state", attempt!("vmresume"));
    mov_ss(suite, code);
}

fn mov_ss(suite: &mut Suite, code: u64) {
    let _ = Vm::new(code);
    suite.case("vmlaunch-mov-ss", attempt!("mov ss, {data:x}", "vmlaunch"; data = in(reg) DATA));
    suite.case("vmresume-mov-ss", attempt!("mov ss, {data:x}", "vmresume"; data = in(reg) DATA));
    suite.case("vmread-mov-ss", attempt!("mov ss, {data:x}", "vmread rax, {field}"; data = in(reg) DATA, field = in(reg) 0x681e_u64, out("rax") _));
    let _ = vmclear(VMCS.address());
    suite.case("vmlaunch-mov-ss-no-current", attempt!("mov ss, {data:x}", "vmlaunch"; data = in(reg) DATA));
    let mut vm = Vm::new(code);
    vm.set(shadow::fields::HOST_CR3, u64::MAX);
    suite.case("vmlaunch-mov-ss-bad-host", attempt!("mov ss, {data:x}", "vmlaunch"; data = in(reg) DATA));
}

fn invept_types(suite: &mut Suite) {
    load_fresh(&VMCS);
    let eptp = nested_paging::eptp();
    let types = [0, 1, 2, 3, 4, 0xff, 1 << 16 | 1, 1 << 32 | 1, 1 << 63 | 2, u64::MAX];
    for kind in types {
        suite.case(format_args!("invept-{kind:#x}"), invept(kind, [eptp, 0]));
    }
    for kind in [1, 2] {
        suite.case(format_args!("invept-{kind}-second-quadword"), invept(kind, [eptp, 1]));
        suite.case(format_args!("invept-{kind}-zero-eptp"), invept(kind, [0, 0]));
        for bit in (0..12).chain(40..64) {
            suite.case(format_args!("invept-{kind}-eptp-bit-{bit}"), invept(kind, [eptp ^ 1 << bit, 0]));
        }
    }
}

fn invvpid_types(suite: &mut Suite) {
    load_fresh(&VMCS);
    for kind in [0, 1, 2, 3, 4, 5, 0xff, 1 << 16, 1 << 32, 1 << 32 | 1, 1 << 63 | 2, u64::MAX] {
        suite.case(format_args!("invvpid-{kind:#x}"), invvpid(kind, [1, 0]));
    }
    for kind in 0..4 {
        suite.case(format_args!("invvpid-{kind}-vpid-0"), invvpid(kind, [0, 0]));
        suite.case(format_args!("invvpid-{kind}-vpid-ffff"), invvpid(kind, [0xffff, 0]));
        for bit in 16..64 {
            suite.case(format_args!("invvpid-{kind}-reserved-bit-{bit}"), invvpid(kind, [1 | 1 << bit, 0]));
        }
        for address in [1 << 46, 1 << 47, (1_u64 << 47).wrapping_neg(), 1 << 63] {
            suite.case(format_args!("invvpid-{kind}-address-{address:#x}"), invvpid(kind, [1, address]));
        }
    }
}

/// The VM-instruction error field: written by a failure, kept by everything else.
fn error_number(suite: &mut Suite) {
    const ERROR: u64 = 0x4400;
    load_fresh(&VMCS);
    suite.case("error-at-first", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmwrite(0x7000, 0);
    suite.case("error-after-failure", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmwrite(0x681e, 0);
    suite.case("error-after-success", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmptrld(1);
    suite.case("error-after-vmptrld", format_args!("{:?}", vmread(ERROR).ok()));
    load_fresh(&OTHER_VMCS);
    suite.case("error-of-another", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmclear(OTHER_VMCS.address());
    let _ = vmptrld(VMCS.address());
    suite.case("error-comes-back", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmwrite(ERROR, 0x1234);
    suite.case("error-written", format_args!("{:?}", vmread(ERROR).ok()));
    let _ = vmclear(VMCS.address());
}
