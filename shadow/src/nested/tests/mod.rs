//! Programs of a hypervisor, on a model of the bare machine and on the nested logic over the same model: the hypervisor
//! must see no difference.

mod bare;
pub mod host_made;
mod processor;
mod program;
mod stacked;

use crate::caps::Policy;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use self::bare::Bare;
use self::processor::{Guest, Seen, Step};
use self::program::{Op, Program};
use self::stacked::Stacked;
use crate::controls::{EntryControls, Pin};
use crate::event::NMI_INTERRUPTION;
use crate::fake::{Variant, hypervisor_registers, skylake_caps};
use crate::fields::*;
use crate::mitigations::Mitigations;

/// Everything that a processor can need.
const MITIGATIONS: Mitigations = Mitigations { branch_barrier: true, cache_flush: true };

/// Checks that the hypervisor saw the same on both machines; the error is the first difference.
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

/// Runs a program on both machines.
fn compare(Program(ops): &Program, variant: Variant) -> Result<(), TestCaseError> {
    let words = hypervisor_registers();
    let mut bare = Bare::new(&skylake_caps().offered(&Policy::EVERYTHING), words, program::memory());
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
    for id in skylake_caps().offered(&Policy::EVERYTHING).fields().iter() {
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

/// The same 1,000 programs in each run, so that a new failure comes from the change at hand. `PROPTEST_CASES` and
/// `PROPTEST_RNG_SEED` explore others.
fn config() -> ProptestConfig {
    let default = ProptestConfig::default();
    let is_set = |variable| std::env::var_os(variable).is_some();
    ProptestConfig {
        cases: if is_set("PROPTEST_CASES") { default.cases } else { 1000 },
        rng_seed: if is_set("PROPTEST_RNG_SEED") { default.rng_seed } else { RngSeed::Fixed(1) },
        ..default
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn programs_see_the_bare_machine(program in program::program()) {
        compare(&program, Variant::default())?;
    }

    #[test]
    fn programs_without_vmcs_shadowing_see_the_bare_machine(program in program::program()) {
        compare(&program, Variant { shadowing: false, ..Variant::default() })?;
    }

    #[test]
    fn programs_see_the_bare_machine_when_tables_are_short(program in program::program()) {
        compare(&program, Variant { tables: 9, mitigations: MITIGATIONS, ..Variant::default() })?;
    }
}

/// VM entries that fail save nothing. For a register that the entry does not load, vmcs02 holds an inherited value,
/// which must not reach VMCS12.
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
        compare(&Program(ops.clone()), Variant { shadowing, ..Variant::default() }).unwrap();
    }
}

/// An NMI that is being handled blocks the next one, also if NMIs exit: the guest hypervisor gets the second one later.
#[test]
fn an_nmi_that_arrives_with_an_injected_one_waits_until_that_is_handled() {
    let pin = skylake_caps().pin.must_be_1 | Pin::NMI_EXITING.bits();
    let unblock = Step::Set(GUEST_INTERRUPTIBILITY.id(), 0);
    let move_on = Step::Set(GUEST_RIP.id(), 0x20_0000);
    let guest = Guest { steps: vec![move_on.clone(), unblock, move_on], stack: None, nmi: true };
    let ops = vec![
        Op::Write(PIN_CONTROLS.id(), pin.into()),
        Op::Write(ENTRY_INTERRUPTION_INFO.id(), NMI_INTERRUPTION.0.into()),
        Op::Enter(false, guest),
        Op::Read(EXIT_REASON.id()),
    ];
    compare(&Program(ops), Variant::default()).unwrap();
}
