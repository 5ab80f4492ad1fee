//! Runs l1hv and its guests on emulated machines.
//!
//! ```text
//!   provision   what the machines need: Bochs, ROMs, GRUB, Debian kernels, busybox
//!   build       l1hv and the guest-side programs, for their own targets
//!   initrd      the guest hypervisor's root file system
//!   guest, xen, debian  Linux with KVM, Xen, and a whole Debian on a disk, as guest hypervisors
//!   guests      all of them on each machine: one table
//!   machine     a boot ISO, an emulated machine, two streams of lines, an `Outcome`
//!   bench       what nesting costs, counted by the emulator, on three systems side by side
//!   demo        all of it, with progress and a table at the end
//!   conformance the same image on the bare machine and under l1hv, compared case by case
//!   fuzz        random programs of a guest hypervisor, compared in the same way
//!   coverage    which lines of l1hv have executed
//!   mutants     whether the suite notices what is left out of l1hv
//! ```
//!
//! Invariants: a machine never outlives its [`machine::Machine::run`]; every run keeps its logs; the
//! only state is below [`layout::Layout::root`], and each piece of it carries the key it was made from.

#![forbid(unsafe_code)]

pub mod bench;
pub mod build;
pub mod command;
pub mod commands;
pub mod conformance;
pub mod counters;
pub mod coverage;
pub mod debian;
pub mod demo;
pub mod fuzz;
pub mod guest;
pub mod guests;
pub mod initrd;
pub mod layout;
pub mod linux;
pub mod machine;
pub mod models;
pub mod mutants;
pub mod panics;
pub mod parallel;
pub mod profile;
pub mod progress;
pub mod protocol;
pub mod provision;
pub mod report;
pub mod side_by_side;
pub mod transcript;
pub mod xen;
