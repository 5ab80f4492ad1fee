//! VMCS shadowing (SDM 25.10 "VMCS Types: Ordinary and Shadow", 26.1.3 and 31.3 on VMREAD and VMWRITE): a nested
//! guest's reads and writes of the shadow VMCS that its VMCS is linked to, and the cases in which it exits instead.

mod access;
mod link;
mod sweep;

use core::fmt;

use shadow::controls::Secondary;
use shadow::fields::*;

use crate::cpu::{vmclear, vmptrld, vmread, vmwrite};
use crate::memory::{Page, VMCS};
use crate::output::Suite;
use crate::vm::{Verdict, Vm, revision};

const SHADOW_INDICATOR: u64 = 1 << 31;
/// Values of bitmap words: every access exits, and no access exits.
const ALL: u64 = u64::MAX;
const NONE: u64 = 0;

static SHADOW: Page = Page::new();
static OTHER_SHADOW: Page = Page::new();
static VMREADS: Page = Page::new();
static VMWRITES: Page = Page::new();

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    access::run(suite);
    sweep::run(suite);
    link::run(suite);
}

/// Makes a region a clear shadow VMCS in which each existing field holds its own encoding and a mark.
fn fill_shadow(region: &Page, mark: u64) {
    let _ = vmclear(region.address());
    region.fill(0);
    region.set(0, revision() | SHADOW_INDICATOR);
    let _ = vmclear(region.address());
    with_current(region, || {
        for id in FieldId::all() {
            let encoding = u64::from(id.encoding().0);
            let _ = vmwrite(encoding, mark << 48 | encoding << 16 | encoding);
        }
    });
}

/// Calls `what` with another VMCS current, and then makes the former one current again.
fn with_current<T>(region: &Page, what: impl FnOnce() -> T) -> T {
    let _ = vmptrld(region.address());
    let result = what();
    let _ = vmptrld(VMCS.address());
    result
}

/// A field of a shadow VMCS, as the guest hypervisor sees it.
fn field_of(region: &Page, encoding: u64) -> u64 {
    with_current(region, || vmread(encoding).unwrap_or(ALL))
}

/// A nested guest that is linked to [`SHADOW`], with bitmaps of equal bits.
fn linked(code: u64, bits: u64) -> Vm {
    fill_shadow(&SHADOW, 1);
    let mut vm = Vm::new(code);
    VMREADS.fill(bits);
    VMWRITES.fill(bits);
    vm.or(SECONDARY_CONTROLS, Secondary::VMCS_SHADOWING);
    vm.set(VMREAD_BITMAP, VMREADS.address()).set(VMWRITE_BITMAP, VMWRITES.address());
    vm.set(VMCS_LINK_POINTER, SHADOW.address());
    vm
}

/// Changes the bit of an encoding. Encodings of more than 15 bits have none.
fn set_bit(bitmap: &Page, encoding: u64, bit: bool) {
    if encoding < 0x8000 {
        let (word, mask) = ((encoding / 64) as usize, 1 << (encoding % 64));
        let others = bitmap.get(word) & !mask;
        bitmap.set(word, others | if bit { mask } else { 0 });
    }
}

/// How an entry ended, with RAX and RDX of the nested guest: a value and flags.
struct Seen {
    verdict: Verdict,
    rax: u64,
    rdx: u64,
}

fn observe(vm: &mut Vm) -> Seen {
    let verdict = vm.run();
    Seen { verdict, rax: vm.registers.rax, rdx: vm.registers.rdx }
}

/// Enters again at the nested guest's first instruction.
fn observe_again(vm: &mut Vm) -> Seen {
    let verdict = vm.rerun();
    Seen { verdict, rax: vm.registers.rax, rdx: vm.registers.rdx }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rax={:#x} rdx={:#x}", self.verdict, self.rax, self.rdx)
    }
}
