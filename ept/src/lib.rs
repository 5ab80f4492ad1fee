//! Extended page tables: entries, walks, and the composition of one table over another.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, Volume 3C, edition 085 (October 2024).
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;

pub use addr::{Gpa, Hpa, NestedGpa, PageSize};
