//! Event injection: its checks (SDM 27.2.1.3) and its delivery (27.6) to the nested guest's handlers, where vector N is
//! at `nested_handlers() + 8 * N`.

use core::fmt;

use shadow::fields::*;

use super::entry_guest::protected;
use super::{Change, as_it_is, enter, flip};
use crate::code;
use crate::output::Suite;
use crate::vm::{Verdict, Vm};

const VALID: u32 = 1 << 31;
const WITH_ERROR_CODE: u32 = 1 << 11;
const KINDS: [&str; 8] =
    ["interrupt", "reserved", "nmi", "exception", "software-interrupt", "privileged", "software-exception", "other"];

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    let modes: [(&str, Change); 2] = [("", as_it_is), ("protected-", protected)];
    for (mode, prepare) in modes {
        for (kind, name) in (0..).zip(KINDS) {
            for error in [0, WITH_ERROR_CODE] {
                for vector in (0..34).chain([128, 255]) {
                    let info = VALID | kind << 8 | error | vector;
                    let verdict = inject(prepare, info, |_| ());
                    let error = error >> 11;
                    suite.case(format_args!("{mode}{name}-{vector}-error-{error}"), Delivered(verdict));
                }
            }
        }
    }
    lengths(suite);
    let exception = |vm: &mut Vm| _ = vm.set(ENTRY_INTERRUPTION_INFO, VALID | WITH_ERROR_CODE | 3 << 8 | 14);
    flip(suite, "reserved-info", ENTRY_INTERRUPTION_INFO, 12..31, exception);
    flip(suite, "error-code", ENTRY_EXCEPTION_ERROR_CODE, 0..32, exception);
    flip(suite, "not-valid", ENTRY_INTERRUPTION_INFO, 0..31, as_it_is);
}

fn inject(prepare: fn(&mut Vm), info: u32, change: impl FnOnce(&mut Vm)) -> Verdict {
    enter(code!("cpuid"), |vm| {
        prepare(vm);
        // Interrupts need RFLAGS.IF.
        vm.or(GUEST_RFLAGS, 1 << 9).set(ENTRY_INTERRUPTION_INFO, info);
        vm.set(ENTRY_EXCEPTION_ERROR_CODE, 0x2a).set(ENTRY_INSTRUCTION_LENGTH, 2);
        change(vm);
    })
}

/// VM-entry instruction length: 1 to 15, and 0 where `IA32_VMX_MISC[30]` allows.
fn lengths(suite: &mut Suite) {
    for (kind, vector) in [(4, 0x80), (5, 1), (6, 3), (3, 6)] {
        for length in (0..18).chain([0x8000_0000]) {
            let verdict =
                inject(as_it_is, VALID | kind << 8 | vector, |vm| _ = vm.set(ENTRY_INSTRUCTION_LENGTH, length));
            suite.case(format_args!("{}-length-{length:#x}", KINDS[kind as usize]), Delivered(verdict));
        }
    }
}

/// A verdict with the pushed RIP to return to, which is above an error code if there is one.
pub struct Delivered(pub Verdict);

impl fmt::Display for Delivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let Verdict::Exited(exit) = &self.0 else { return Ok(()) };
        let words = exit.pushed();
        for word in &words[..exit.pushed_words()] {
            write!(f, " {word:#x}")?;
        }
        Ok(())
    }
}
