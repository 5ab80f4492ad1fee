//! Programs of a hypervisor, on a model of the bare machine and on the nested logic over the same model: both must look the same to it.

mod bare;
mod processor;
mod program;
mod stacked;

use proptest::prelude::*;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use self::bare::Bare;
use self::processor::{Guest, Seen, Step};
use self::program::{Op, Program};
use self::stacked::Stacked;
use crate::controls::EntryControls;
use crate::fake::{Variant, hypervisor_registers, skylake_caps};
use crate::fields::*;

/// Whether the same was seen on both machines; if not, the first difference.
fn agree(stacked: &[Seen], bare: &[Seen]) -> Result<(), String> {
    for number in 0..stacked.len().max(bare.len()) {
        match (stacked.get(number), bare.get(number)) {
            (stacked, bare) if stacked == bare => (),
            (Some(Seen::Entered(stacked)), Some(Seen::Entered(bare)))
            | (Some(Seen::Left(stacked)), Some(Seen::Left(bare))) => {
                type Word = (FieldId, u64);
                let only = |these: &[Word], others: &[Word]| -> Vec<Word> {
                    these.iter().filter(|word| !others.contains(word)).copied().collect()
                };
                return Err(format!("registers {:x?}, bare {:x?}", only(stacked, bare), only(bare, stacked)));
            }
            (stacked, bare) => return Err(format!("{stacked:x?}, bare {bare:x?}")),
        }
    }
    Ok(())
}

/// Runs a program on both.
fn compare(Program(ops): &Program, variant: Variant) -> Result<(), TestCaseError> {
    let words = hypervisor_registers();
    let mut bare = Bare::new(&skylake_caps().offered(), words, program::memory());
    let mut stacked = Stacked::new(&words, program::memory(), variant);
    for op in program::prologue() {
        bare.execute(&op);
        stacked.execute(&op);
    }
    for (number, op) in ops.iter().enumerate() {
        let skipped = matches!(op, Op::Read(id) if bare.is_undefined(*id));
        if skipped {
            continue;
        }
        bare.seen.clear();
        stacked.seen.clear();
        bare.execute(op);
        stacked.execute(op);
        agree(&stacked.seen, &bare.seen)
            .map_err(|why| TestCaseError::fail(format!("{why} in operation {number}, {op:?}")))?;
    }
    for id in skylake_caps().offered().fields().iter() {
        if bare.is_undefined(id) {
            continue;
        }
        bare.seen.clear();
        stacked.seen.clear();
        bare.execute(&Op::Read(id));
        stacked.execute(&Op::Read(id));
        agree(&stacked.seen, &bare.seen).map_err(|why| TestCaseError::fail(format!("{why} at the end")))?;
    }
    let (stacked, bare) = (stacked.memory(), bare.memory());
    let pages = stacked.chunks(4096).zip(bare.chunks(4096)).map(|(stacked, bare)| stacked == bare);
    let different: Vec<u64> = (0..).zip(pages).filter(|(_, equal)| !equal).map(|(number, _)| number * 4096).collect();
    let memory_agrees = different.iter().all(|page| program::VMCS_REGIONS.contains(page));
    prop_assert!(memory_agrees, "memory at {:x?}", different);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn programs_see_the_bare_machine(program in program::program()) {
        compare(&program, Variant { shadowing: true, tables: 400 })?;
    }

    #[test]
    fn programs_without_vmcs_shadowing_see_the_bare_machine(program in program::program()) {
        compare(&program, Variant { shadowing: false, tables: 400 })?;
    }

    #[test]
    fn programs_see_the_bare_machine_when_tables_are_short(program in program::program()) {
        compare(&program, Variant { shadowing: true, tables: 9 })?;
    }
}

/// VM entries that fail save nothing. What vmcs02 got instead, for a register that the entry does not load, is no value of VMCS12's.
#[test]
fn a_failed_entry_leaves_a_register_that_it_would_inherit_as_the_last_exit_saved_it() {
    let set_pat = Guest { steps: vec![Step::Set(GUEST_PAT.id(), 0x0505_0505_0505_0505)], stack: None, nmi: false };
    let idle = Guest { steps: Vec::new(), stack: None, nmi: false };
    let inherits_pat = program::entry_controls(EntryControls::LOAD_EFER | EntryControls::LOAD_DEBUG_CONTROLS);
    let ops = vec![
        Op::Enter(false, set_pat),
        Op::Write(GUEST_RFLAGS.id(), 0),
        Op::Write(ENTRY_CONTROLS.id(), inherits_pat),
        Op::Enter(true, idle),
    ];
    for shadowing in [true, false] {
        compare(&Program(ops.clone()), Variant { shadowing, tables: 400 }).unwrap();
    }
}
