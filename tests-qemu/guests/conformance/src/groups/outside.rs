//! Instructions outside VMX operation, and the entry to VMX operation (SDM 24.6 to 24.8, VMXON in 31.3).

use shadow::registers::{CR0_TS, CR4_VMXE};

use guest_abi::port::{inb, outb};

use crate::attempt;
use crate::cpu::*;
use crate::fault::Outcome;
use crate::memory::*;
use crate::output::Suite;
use crate::vm::{CR4_LASS_BIT, prepare_host, revision};

/// Ends in VMX operation.
pub fn run(suite: &mut Suite) {
    without_vmxe(suite);
    let set = set_cr4(cr4() | CR4_VMXE);
    suite.case("set-vmxe", set);
    suite.case("vmxe-reads-back", cr4() & CR4_VMXE != 0);
    suite.case("clear-vmxe", set_cr4(cr4() & !CR4_VMXE));
    suite.case("vmxe-is-clear", cr4() & CR4_VMXE != 0);
    prepare_host();
    before_vmxon(suite);
    vmxon_operands(suite);
    VMXON.set(0, revision());
    suite.case("vmxon", vmxon(VMXON.address()));
    inside(suite);
    suite.case("vmxoff", vmxoff());
    suite.case("vmxoff-twice", vmxoff());
    cr0_around_vmxon(suite);
    prepare_host();
    cet_and_wp(suite);
    prepare_host();
    suite.case("clear-vmxe-after-vmxoff", set_cr4(cr4() & !CR4_VMXE));
    prepare_host();
    suite.case("vmxon-again", vmxon(VMXON.address()));
}

/// VMXON and VMXOFF change which values CR0 may take (SDM 24.8), but not its value.
fn cr0_around_vmxon(suite: &mut Suite) {
    const NE: u64 = 1 << 5;
    const PG: u64 = 1 << 31;
    let mut step = |name: &str, outcome: Outcome| suite.case(name, format_args!("{outcome} {:#x}", cr0()));
    step("cr0-ne-after-vmxoff", set_cr0(cr0() & !NE));
    step("cr0-pg-after-vmxoff", set_cr0(cr0() & !PG));
    step("vmxon-with-cr0-ne-clear", vmxon(VMXON.address()));
    step("cr0-ts-with-ne-clear", set_cr0(cr0() | CR0_TS));
    step("cr0-ne-again", set_cr0(cr0() | NE));
    step("vmxon-with-cr0-ne-set", vmxon(VMXON.address()));
    step("cr0-ne-in-operation", set_cr0(cr0() & !NE));
    step("cr0-pg-in-operation", set_cr0(cr0() & !PG));
    step("cr0-ts-in-operation", set_cr0(cr0() & !CR0_TS));
    step("vmxoff-with-cr0-ne-set", vmxoff());
    step("cr0-ne-after-second-vmxoff", set_cr0(cr0() & !NE));
    step("cr0-ne-restored", set_cr0(cr0() | NE));
}

/// CR4.CET and CR0.WP in writes that exit to a host with VMX.
fn cet_and_wp(suite: &mut Suite) {
    const NE: u64 = 1 << 5;
    const WP: u64 = 1 << 16;
    const CET: u64 = 1 << 23;
    let mut step = |name: &str, outcome: Outcome| suite.case(name, format_args!("{outcome} {:#x} {:#x}", cr0(), cr4()));
    step("wp-clear", set_cr0(cr0() & !WP));
    step("cet-without-wp", set_cr4(cr4() | CET));
    step("cet-and-vmxe-without-wp", set_cr4((cr4() | CET) ^ CR4_VMXE));
    step("wp-set", set_cr0(cr0() | WP));
    step("cet-and-vmxe-with-wp", set_cr4((cr4() | CET) ^ CR4_VMXE));
    step("wp-clear-with-cet", set_cr0(cr0() & !WP));
    step("wp-and-ne-clear-with-cet", set_cr0(cr0() & !WP & !NE));
    step("ne-clear-with-cet", set_cr0(cr0() & !NE));
    step("cet-and-vmxe-again", set_cr4((cr4() & !CET) ^ CR4_VMXE));
}

fn without_vmxe(suite: &mut Suite) {
    suite.case("no-vmxe-vmxon", vmxon(VMXON.address()));
    suite.case("no-vmxe-vmxoff", vmxoff());
    suite.case("no-vmxe-vmclear", vmclear(VMCS.address()));
    suite.case("no-vmxe-vmcall", attempt!("vmcall"));
    suite.case("no-vmxe-vmread", vmread(0).err().unwrap_or(Outcome::Success));
}

fn before_vmxon(suite: &mut Suite) {
    suite.case("no-vmxon-vmcall", attempt!("vmcall"));
    suite.case("no-vmxon-vmclear", vmclear(VMCS.address()));
    suite.case("no-vmxon-vmlaunch", attempt!("vmlaunch"));
    suite.case("no-vmxon-vmresume", attempt!("vmresume"));
    suite.case("no-vmxon-vmptrld", vmptrld(VMCS.address()));
    suite.case("no-vmxon-vmptrst", vmptrst().0);
    suite.case("no-vmxon-vmread", vmread(0).err().unwrap_or(Outcome::Success));
    suite.case("no-vmxon-vmwrite", vmwrite(0, 0));
    suite.case("no-vmxon-vmxoff", vmxoff());
    suite.case("no-vmxon-invept", invept(2, [0; 2]));
    suite.case("no-vmxon-invvpid", invvpid(2, [0; 2]));
    suite.case("no-vmxon-vmfunc", attempt!("vmfunc"; in("eax") 0, in("ecx") 0));
    suite.case("no-vmxon-getsec", attempt!(".byte 0x0f, 0x37"; in("eax") 0));
    suite.case("no-vmxon-vmxon-operand-not-present", vmxon_at(WINDOW + 0x1000));
}

/// VMXON with its operand at a linear address.
fn vmxon_at(operand: u64) -> Outcome {
    attempt!("vmxon [{operand}]"; operand = in(reg) operand)
}

fn vmxon_operands(suite: &mut Suite) {
    let region = VMXON.address();
    VMXON.set(0, revision());
    suite.case("vmxon-misaligned", vmxon(region + 8));
    for bit in [12, 31, 32, 39, 40, 45, 51, 52, 63] {
        if bit >= 40 {
            suite.case(format_args!("vmxon-address-bit-{bit}"), vmxon(region | 1 << bit));
        }
    }
    VMXON.set(0, revision() ^ 1);
    suite.case("vmxon-wrong-revision", vmxon(region));
    VMXON.set(0, revision() | 1 << 31);
    suite.case("vmxon-shadow-revision", vmxon(region));
    VMXON.set(0, revision());
    for (name, cr0_bit) in [("ne", 1 << 5), ("pg", 1 << 31)] {
        let outcome = set_cr0(cr0() & !cr0_bit);
        suite.case(format_args!("cr0-without-{name}"), outcome);
        if outcome == Outcome::Success {
            suite.case(format_args!("vmxon-without-cr0-{name}"), vmxon(region));
            let _ = vmxoff();
        }
        prepare_host();
    }
    suite.case("vmxon-operand-read-only", {
        OPERANDS.set(0, region + 8);
        vmxon_at(WINDOW + 0x2000)
    });
    suite.case("vmxon-operand-non-canonical", vmxon_at(1 << 62));
}

/// VMX operation blocks A20M (SDM 24.8): what two words hold whose addresses differ in bit 20, while that bit is to be
/// masked.
fn address_bit_20() -> &'static str {
    const SYSTEM_CONTROL: u16 = 0x92;
    const A20: u8 = 2;
    const PLACE: u64 = 144 << 20;
    let control = inb(SYSTEM_CONTROL);
    outb(SYSTEM_CONTROL, control & !A20);
    poke(PLACE, 1);
    poke(PLACE + (1 << 20), 2);
    let seen = peek(PLACE);
    outb(SYSTEM_CONTROL, control);
    if seen == 1 { "two words" } else { "one word" }
}

fn inside(suite: &mut Suite) {
    suite.case("vmxon-twice", vmxon(VMXON.address()));
    suite.case("vmxon-twice-operand-not-present", vmxon_at(WINDOW + 0x1000));
    suite.case("vmxon-twice-misaligned", vmxon(VMXON.address() + 8));
    suite.case("no-current-vmptrst", format_args!("{:#x}", vmptrst().1));
    suite.case("no-current-vmread", vmread(0x681e).err().unwrap_or(Outcome::Success));
    suite.case("no-current-vmread-unsupported", vmread(0x7000).err().unwrap_or(Outcome::Success));
    suite.case("no-current-vmwrite", vmwrite(0x681e, 0));
    suite.case("no-current-vmlaunch", attempt!("vmlaunch"));
    suite.case("no-current-vmresume", attempt!("vmresume"));
    suite.case("no-current-vmcall", attempt!("vmcall"));
    for bit in 0..64 {
        let value = cr0() ^ 1 << bit;
        // Without paging the image cannot continue.
        if bit == 31 || bit == 0 {
            suite.case(format_args!("cr0-bit-{bit}"), set_cr0(value));
            continue;
        }
        let outcome = set_cr0(value);
        let read = cr0();
        let _ = set_cr0(value ^ 1 << bit);
        suite.case(format_args!("cr0-bit-{bit}"), format_args!("{outcome} {read:#x}"));
    }
    for bit in (0..64).filter(|&bit| bit != CR4_LASS_BIT) {
        let old = cr4();
        // Clearing PAE in 64-bit mode and setting LA57 fault; SMEP and SMAP suit the tables.
        let outcome = set_cr4(old ^ 1 << bit);
        let read = cr4();
        let _ = set_cr4(old);
        suite.case(format_args!("cr4-bit-{bit}"), format_args!("{outcome} {read:#x}"));
    }
    suite.case("a20-masked", address_bit_20());
    let outcome = attempt!("clts", "test rsp, rsp");
    suite.case("clts", format_args!("{outcome} {:#x}", cr0()));
    let outcome = attempt!("lmsw {value:x}", "test rsp, rsp"; value = in(reg) (cr0() | CR0_TS) & 0xffff);
    suite.case("lmsw-ts", format_args!("{outcome} {:#x}", cr0()));
    let outcome = attempt!("lmsw {value:x}", "test rsp, rsp"; value = in(reg) 0_u64);
    suite.case("lmsw-zero", format_args!("{outcome} {:#x}", cr0()));
    let smsw: u64;
    let outcome = attempt!("smsw {value}", "test rsp, rsp"; value = out(reg) smsw);
    suite.case("smsw", format_args!("{outcome} {smsw:#x}"));
    prepare_host();
}
