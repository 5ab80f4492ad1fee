//! Instructions that are allowed to fault, and the addresses at which the exception handler resumes.
//!
//! [`fallible!`] wraps one such instruction: it records the instruction's address and the address after it in the
//! linker section `.fixup`. The handler of #GP looks there, continues after the instruction and sets CF in the
//! interrupted RFLAGS, so the instruction itself must not change CF.

/// The text of an `asm!` template: `$instruction`, after which CF says whether it raised a general-protection
/// exception.
macro_rules! fallible {
    ($instruction:literal) => {
        concat!(
            "clc\n",
            "2: ",
            $instruction,
            "\n",
            "3:\n",
            ".pushsection .fixup, \"a\"\n",
            ".balign 8\n",
            ".quad 2b, 3b\n",
            ".popsection"
        )
    };
}
pub(crate) use fallible;

/// One entry of the section.
#[repr(C)]
struct Fixup {
    faulting_rip: u64,
    landing_rip: u64,
}

unsafe extern "C" {
    static __fixup_start: Fixup;
    static __fixup_end: Fixup;
}

/// The address at which execution continues after a fault at `rip`, if the fault is foreseen.
pub fn landing(rip: u64) -> Option<u64> {
    let start = &raw const __fixup_start;
    let bytes = (&raw const __fixup_end).addr() - start.addr();
    // SAFETY: the linker script places the section's entries, and nothing else, between the two symbols; they are
    // constant.
    let table = unsafe { core::slice::from_raw_parts(start, bytes / size_of::<Fixup>()) };
    table.iter().find(|fixup| fixup.faulting_rip == rip).map(|fixup| fixup.landing_rip)
}
