//! The decisions between power-on and the guest's first instruction that need no access to the machine.
//!
//! ```text
//!   entry (assembly) -> multiboot -> cmdline, memory_map -> acpi -> iommu -> layout -> guest -> LoadPlan, GuestEntry
//! ```
//!
//! Everything but `entry` is pure: it reads copies, and returns plans that the `l1hv` binary carries out.
//!
//! Invariants:
//! * No input from the loader, the firmware or an image panics; each error is one line that says what is wrong and what
//!   to do.
//! * A [`guest::LoadPlan`] writes only to usable memory, never to the host's region, and never over its own sources.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, edition 085 (October 2024).
#![no_std]
#![warn(clippy::missing_errors_doc, clippy::missing_panics_doc)]
#![cfg_attr(test, allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of length one"))]

#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod bios;
pub mod cmdline;
pub mod efi;
#[cfg(target_os = "none")]
pub mod entry;
pub mod guest;
pub mod iommu;
pub mod layout;
pub mod machine;
pub mod memory_map;
pub mod multiboot;
pub mod phys;
pub mod tsc;

/// The reasons for which errors of this crate stop the machine.
pub use protocol::stop;

#[cfg(test)]
mod tests {
    use std::format;

    use super::stop::{LINE_PREFIX, StopKind};

    #[test]
    fn the_assembly_says_a_stop_in_the_words_of_the_protocol() {
        let line = format!("{LINE_PREFIX}{}: ", StopKind::NoLongMode.name());
        assert!(include_str!("entry/start.S").contains(&line));
    }
}
