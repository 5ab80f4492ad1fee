//! The registry of cases.

mod caps;
mod entry_controls;
mod entry_events;
mod entry_guest;
mod entry_host;
mod ept;
mod events;
mod exits;
mod fields;
mod insn;
mod operands;
mod outside;

use crate::output::Suite;

/// A group of cases and its name.
pub type Group = (&'static str, fn(&mut Suite));

/// All groups, in the order in which they run: the first ones before VMXON, which ends [`outside`].
pub const ALL: &[Group] = &[
    ("caps", caps::run),
    ("outside", outside::run),
    ("fields", fields::run),
    ("insn", insn::run),
    ("operands", operands::run),
    ("entry-controls", entry_controls::run),
    ("entry-host", entry_host::run),
    ("entry-guest", entry_guest::run),
    ("entry-events", entry_events::run),
    ("exits", exits::run),
    ("events", events::run),
    ("ept", ept::run),
];

/// Code for the nested guest: its address. It ends with VMCALL, an exit whatever the controls say.
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
