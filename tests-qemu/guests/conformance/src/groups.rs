//! The registry of cases.

mod apic_accesses;
mod caps;
mod emulated;
mod entry_controls;
mod entry_events;
mod entry_guest;
mod entry_host;
mod ept;
mod ept_edits;
mod ept_features;
mod ept_random;
mod events;
mod exhaustion;
mod exits;
mod fields;
mod five_levels;
mod insn;
mod isolation;
mod memory_load;
mod operands;
mod outside;
mod page_log;
mod paging_modes;
mod passing;
mod protection_keys;
mod smp_init;
mod smp_interrupts;
mod smp_migration;
mod smp_races;
mod smp_start;
mod smp_time;
mod stale_translations;
mod stepping;
mod task_switches;
mod virtual_apic;
mod vmcs_shadowing;

use core::fmt;

use shadow::Field;
use shadow::fields::FieldValue;

use crate::output::Suite;
use crate::smp::Processors;
use crate::vm::{Verdict, Vm};

/// A group of cases and its name.
pub type Group = (&'static str, fn(&mut Suite));

/// The group that executes VMXON, which the groups after it need.
pub const WAY_IN: &str = "outside";

/// All groups, in the order in which they run: the first ones before VMXON, which ends [`WAY_IN`].
pub const ALL: &[Group] = &[
    ("caps", caps::run),
    ("task-switches", task_switches::run),
    ("task-switches-16", task_switches::run_16),
    (WAY_IN, outside::run),
    ("fields", fields::run),
    ("insn", insn::run),
    ("operands", operands::run),
    ("protection-keys", protection_keys::run),
    ("stepping", stepping::run),
    ("entry-controls", entry_controls::run),
    ("entry-host", entry_host::run),
    ("entry-guest", entry_guest::run),
    ("entry-events", entry_events::run),
    ("exits", exits::run),
    ("events", events::run),
    ("emulated", emulated::run),
    ("ept", ept::run),
    ("apic-accesses", apic_accesses::run),
    ("virtual-apic", virtual_apic::run),
    ("page-log", page_log::run),
    ("paging-modes", paging_modes::run),
    ("passing-registers", passing::run),
    ("five-levels", five_levels::run),
    ("ept-edits", ept_edits::run),
    ("ept-random", ept_random::run),
    ("ept-features", ept_features::run),
    ("isolation", isolation::run),
    ("exhaustion", exhaustion::run),
    ("memory-load", memory_load::run),
    ("stale-translations", stale_translations::run),
    ("vmcs-shadowing", vmcs_shadowing::run),
];

/// A group that needs several processors.
pub type GroupOfSeveral = (&'static str, fn(&mut Suite, &Processors));

/// The group after which every processor is in VMX operation.
pub const WAY_IN_OF_OTHERS: &str = "smp-start";

/// The groups for machines with several processors. Each group but the first finds the processors in VMX operation and
/// idle, and leaves them so.
pub const OF_SEVERAL_PROCESSORS: &[GroupOfSeveral] = &[
    (WAY_IN_OF_OTHERS, smp_start::run),
    ("smp-interrupts", smp_interrupts::run),
    ("smp-migration", smp_migration::run),
    ("smp-init", smp_init::run),
    ("smp-races", smp_races::run),
    ("smp-time", smp_time::run),
    ("smp-x2apic", smp_interrupts::run_in_x2apic_mode),
    ("smp-posted", smp_interrupts::run_posted),
    ("smp-posted-x2apic", smp_interrupts::run_posted_in_x2apic_mode),
];

/// Code for the nested guest; evaluates to its address. The code ends with VMCALL, which always exits.
#[macro_export]
macro_rules! code {
    ($($line:literal),* $(,)?) => {{
        #[unsafe(naked)]
        extern "C" fn code() {
            core::arch::naked_asm!($($line,)* "vmcall", "hlt")
        }
        code as *const () as u64
    }};
}

/// Code for a nested guest in a mode without 64-bit code, with 32-bit operands and addresses. The code ends with
/// VMCALL.
#[macro_export]
macro_rules! code_32 {
    ($($line:literal),* $(,)?) => {{
        #[unsafe(naked)]
        extern "C" fn code() {
            core::arch::naked_asm!(".code32", $($line,)* "vmcall", "hlt", ".code64")
        }
        code as *const () as u64
    }};
}

/// A case's change of the VMCS that is entered.
type Change = fn(&mut Vm);

/// Enters a nested guest at `code` after `change`. Returns how the entry ends.
fn enter(code: u64, change: impl FnOnce(&mut Vm)) -> Verdict {
    let mut vm = Vm::new(code);
    change(&mut vm);
    vm.run()
}

/// One case for each bit of a field, flipped after `prepare` has changed the VMCS.
fn flip<T: FieldValue>(
    suite: &mut Suite,
    name: impl fmt::Display,
    field: Field<T>,
    bits: impl IntoIterator<Item = u32>,
    prepare: impl Fn(&mut Vm),
) {
    for bit in bits {
        let verdict = enter(code!("cpuid"), |vm| {
            prepare(vm);
            let value = vm.get(field).into_word() ^ 1 << bit;
            vm.set(field, T::from_word(value));
        });
        suite.case(format_args!("{name}-bit-{bit}"), verdict);
    }
}

/// One case for each value of a field, after `prepare` has changed the VMCS.
fn values<T: FieldValue>(
    suite: &mut Suite,
    name: impl fmt::Display,
    field: Field<T>,
    values: impl IntoIterator<Item = u64>,
    prepare: impl Fn(&mut Vm),
) {
    for value in values {
        let verdict = enter(code!("cpuid"), |vm| {
            prepare(vm);
            vm.set(field, T::from_word(value));
        });
        suite.case(format_args!("{name}-{value:#x}"), verdict);
    }
}

/// No change.
fn as_it_is(_: &mut Vm) {}
