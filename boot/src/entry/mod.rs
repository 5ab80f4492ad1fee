//! From the boot loader's 32-bit protected mode to long mode: assembly only.
//!
//! `_start` checks for 64-bit mode, builds early page tables and calls `extern "C" fn l1hv_main(magic: u32, info: u32) -> !`,
//! which the binary defines. The early address space:
//!
//! ```text
//!   0 ..                        4 GiB   identity, only until the jump to l1hv_main
//!   0xFFFF_8000_0000_0000 + physical    the direct map, low 4 GiB
//!   0xFFFF_FFFF_8000_0000 + physical    the image (linked there, loaded at 1 MiB), low 1 GiB
//! ```

#![allow(unsafe_code, reason = "the first instructions are assembly")]

use core::arch::global_asm;

use crate::stop::StopKind;

global_asm!(
    include_str!("start.S"),
    no_long_mode_status = const StopKind::NoLongMode.status(),
    options(att_syntax)
);
