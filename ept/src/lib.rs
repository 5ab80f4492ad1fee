//! Extended page tables: entries, walks, and the composition of one table over another.
//!
//! ```text
//!   nested guest's NestedGpa --EPT12--> guest hypervisor's Gpa --EPT01--> Hpa
//!                            \-------------- EPT02 --------------------/
//! ```
//!
//! EPT12 lies in the guest hypervisor's memory and is only read by [`walk`]; EPT01 and EPT02 lie in the host's and are
//! written through [`table::TableMemory`]. [`nested::NestedPaging`] is the cache of EPT02 roots.
//!
//! # Invariants
//!
//! * An EPT02 entry grants no access that EPT12 or EPT01 refuses: rights are intersected, and the page has the smaller
//!   of both sizes.
//! * An EPT12 entry is read once per walk: the checked value is the one that is used.
//! * Memory is bounded: tables come from a pool of fixed size, and when they run out, only cached translations are
//!   dropped. [`nested::NestedPaging`] takes [`HEAP_BYTES`](nested::NestedPaging::HEAP_BYTES) of the heap when it is
//!   made, and no more later.
//! * A table that a processor may have in its paging-structure caches is given back only together with a
//!   [`Dropped`](nested::Dropped) that says so.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, Volume 3C, edition 085
//! (October 2024).
//!
//! # Example
//!
//! A guest hypervisor runs a nested guest with an EPT of its own. The host composes it with EPT01, page by page, as the
//! nested guest accesses pages.
//!
//! ```
//! use ept::fake::{FakeGuest, FakeTables};
//! use ept::map::{lookup, map_range};
//! use ept::nested::{Context, Dropped, Extent, Fill, NestedPaging};
//! use ept::table::TableMemory;
//! use ept::violation::EptViolation;
//! use ept::walk::Ept12;
//! use ept::{Caching, Entry, Eptp01, Eptp12, ExecuteControl, Features, Levels, MemoryType, PageSize, Rights};
//! use ept::{Gpa, Hpa, NestedGpa};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! const WRITE_BACK: Caching = Caching::new(MemoryType::WRITE_BACK);
//!
//! // EPT01: the guest hypervisor's first GiB lies at 4 GiB.
//! let mut tables = FakeTables::new(16);
//! let ept01 = Eptp01::new(tables.allocate().ok_or("no table")?, Levels::Four);
//! map_range(&mut tables, ept01, Gpa(0)..Gpa(1 << 30), PageSize::Size2M, |address, size| {
//!     Entry::leaf(Hpa(address.0 + (4 << 30)), size, Rights::ALL, WRITE_BACK)
//! })?;
//!
//! // EPT12, in the guest hypervisor's memory: the nested guest's first 2 MiB are the guest hypervisor's second 2 MiB.
//! let mut guest = FakeGuest::default();
//! guest.set(Gpa(0x1000), 0, Entry::table(Gpa(0x2000)));
//! guest.set(Gpa(0x2000), 0, Entry::table(Gpa(0x3000)));
//! guest.set(Gpa(0x3000), 0, Entry::leaf(Gpa(2 << 20), PageSize::Size2M, Rights::ALL, WRITE_BACK));
//! let ept12 = Ept12 { eptp: Eptp12::new(Gpa(0x1000), Levels::Four), execute: ExecuteControl::UNIFORM };
//!
//! // The nested guest is about to run, on an EPT02 that is still empty.
//! let features =
//!     Features { physical_bits: 40, execute_only: true, page_2m: true, page_1g: true, advanced_violation: false };
//! let mut nested = NestedPaging::new(features);
//! let (eptp02, dropped) = nested.activate(&mut tables, ept12)?;
//! assert_eq!(dropped, Dropped::Nothing);
//!
//! // The nested guest reads an address: an EPT violation, which the host repairs.
//! let address = NestedGpa(0x1234);
//! let read = EptViolation::READ | EptViolation::LINEAR_ADDRESS_IS_VALID | EptViolation::IS_TRANSLATION;
//! let mut context = Context { tables: &mut tables, guest: &mut guest, ept01 };
//! let (fill, _) = nested.fill(&mut context, ept12, address, read, Extent::Page)?;
//! assert_eq!(fill, Fill::Mapped);
//! let mapping = lookup(&tables, eptp02, address).ok_or("not mapped")?;
//! assert_eq!((mapping.leaf.address(), mapping.size), (Hpa((4 << 30) + (2 << 20)), PageSize::Size2M));
//!
//! // The guest hypervisor unmaps the page and executes INVEPT. The processor's cached translations must go too.
//! guest.set(Gpa(0x3000), 0, Entry::NOT_PRESENT);
//! assert_eq!(nested.invalidate(&mut tables, ept12.eptp), Dropped::One(eptp02));
//! assert_eq!(lookup(&tables, eptp02, address), None);
//!
//! // From now on the guest hypervisor gets the violation.
//! let mut context = Context { tables: &mut tables, guest: &mut guest, ept01 };
//! let (fill, _) = nested.fill(&mut context, ept12, address, read, Extent::Page)?;
//! assert_eq!(fill, Fill::Violation { qualification: read, suppresses_ve: false });
//! # Ok(())
//! # }
//! ```
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::missing_errors_doc, clippy::missing_panics_doc)]

#[cfg(any(test, feature = "fake"))]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod addr;
pub mod entry;
pub mod eptp;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod map;
pub mod nested;
pub mod table;
pub mod violation;
pub mod walk;

pub use addr::{Address, Gpa, Hpa, NestedGpa, PageSize};
pub use entry::{Caching, Entry, ExecuteControl, Features, MemoryType, Rights};
pub use eptp::{Eptp, Eptp01, Eptp02, Eptp12, Levels};
