//! Extended page tables: entries, walks, and the composition of one table over another.
//!
//! ```text
//!   nested guest's NestedGpa --EPT12--> guest hypervisor's Gpa --EPT01--> Hpa
//!                            \-------------- EPT02 --------------------/
//! ```
//!
//! EPT12 lies in the guest hypervisor's memory and is only read by [`walk`]; EPT01 and EPT02 lie in the host's and are written through
//! [`table::TableMemory`]. [`nested::NestedPaging`] is the cache of EPT02 roots.
//!
//! Invariants:
//! * An EPT02 entry never grants what EPT12 and EPT01 together do not: rights are intersected, pages are the smaller of both.
//! * An EPT12 entry is read once per walk; what was checked is what is used.
//! * Memory is bounded: tables come from a pool of fixed size, and running out drops cached translations, nothing else.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, Volume 3C, edition 085 (October 2024).
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod addr;
pub mod entry;
pub mod eptp;
#[cfg(test)]
mod fake;
pub mod map;
pub mod nested;
pub mod table;
pub mod violation;
pub mod walk;

pub use addr::{Gpa, Hpa, NestedGpa, PageSize};
pub use entry::{Entry, ExecuteControl, MemoryType, Rights};
pub use eptp::{Eptp, Levels};
