//! Every encoding that has a bit in the bitmaps, accessed by the nested guest in one loop.

use core::fmt;

use shadow::encoding::Encoding;
use shadow::fields::*;

use super::{ALL, NONE, SHADOW, linked, observe, observe_again, with_current};
use crate::code;
use crate::cpu::vmread;
use crate::memory::Table;
use crate::output::Suite;

const ENCODINGS: u64 = 0x8000;
/// Encodings that name no field, in one case.
const BLOCK: u64 = 0x400;

/// By encoding: 0 success, 1 VMfailInvalid, 2 VMfailValid; and the value that VMREAD returned.
static OUTCOMES: Table<{ ENCODINGS as usize / 8 }> = Table::new();
static VALUES: Table<{ ENCODINGS as usize }> = Table::new();

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    reads(suite);
    writes(suite);
    exits(suite);
}

/// Executes an instruction for ECX from 0 to EDX. Stores the outcome in the table at RDI, and RAX in the table at RSI.
macro_rules! sweep {
    ($($instruction:literal),+) => {
        code!(
            "xor ecx, ecx",
            "2:",
            $($instruction,)+
            "setc bl",
            "setz bh",
            "add bh, bh",
            "or bl, bh",
            "mov [rdi + rcx], bl",
            "mov [rsi + rcx * 8], rax",
            "inc ecx",
            "cmp ecx, edx",
            "jb 2b"
        )
    };
}

fn sweep(suite: &mut Suite, name: &str, code: u64) {
    OUTCOMES.fill(ALL);
    let mut vm = linked(code, NONE);
    vm.registers.rdi = OUTCOMES.address();
    vm.registers.rsi = VALUES.address();
    vm.registers.rdx = ENCODINGS;
    let seen = observe(&mut vm);
    suite.case(format_args!("{name}-all"), &seen.verdict);
}

fn outcome(encoding: u64) -> u64 {
    OUTCOMES.get((encoding / 8) as usize) >> (encoding % 8 * 8) & 0xff
}

/// Prints a case for each encoding of a field, and one for each block of other encodings.
fn report(suite: &mut Suite, name: &str, value: impl Fn(u64) -> u64) {
    let is_field = |encoding: u64| shadow::index::lookup(Encoding(encoding as u32)).is_some();
    for encoding in (0..ENCODINGS).filter(|&encoding| is_field(encoding)) {
        let result = format_args!("{} {:#x}", outcome(encoding), value(encoding));
        suite.case(format_args!("{name}-{encoding:#06x}"), result);
    }
    for block in (0..ENCODINGS).step_by(BLOCK as usize) {
        let mut counts = [0; 4];
        for encoding in (block..block + BLOCK).filter(|&encoding| !is_field(encoding)) {
            counts[outcome(encoding).min(3) as usize] += 1;
        }
        suite.case(format_args!("{name}-others-{block:#06x}"), Counts(counts));
    }
}

/// The numbers of encodings that succeeded, failed in either way, or were not reached.
struct Counts([u32; 4]);

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

fn reads(suite: &mut Suite) {
    sweep(suite, "read", sweep!("xor eax, eax", "vmread rax, rcx"));
    report(suite, "read", |encoding| VALUES.get(encoding as usize));
}

fn writes(suite: &mut Suite) {
    sweep(suite, "write", sweep!("movabs rax, 0x8877665544332211", "xor rax, rcx", "vmwrite rcx, rax"));
    // The upper half of a field was written after the whole.
    with_current(&SHADOW, || report(suite, "written", |encoding| vmread(encoding).unwrap_or(ALL)));
}

/// With every bit set every access exits, fields or not.
fn exits(suite: &mut Suite) {
    for (name, code) in [("vmread", code!("vmread rax, rcx")), ("vmwrite", code!("vmwrite rcx, rax"))] {
        let mut vm = linked(code, ALL);
        for encoding in FieldId::all().map(|id| u64::from(id.encoding().0)).chain([0x0900, 0x7ffe, 0x7fff]) {
            vm.registers.rcx = encoding;
            suite.case(format_args!("exit-{name}-{encoding:#06x}"), observe_again(&mut vm));
        }
    }
}
