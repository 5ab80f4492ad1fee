//! Fuzz targets of the libraries: functions of bytes that panic if a law is broken.
//!
//! ```text
//!   bytes --Input--> a valid structure, with edits --> the code under test --> laws, models
//! ```
//!
//! `cargo test` runs each on a fixed sequence of inputs (`tests/targets.rs`). cargo-fuzz runs each for as long as one
//! wants, guided by the coverage: `libfuzzer` beside this crate has a binary for each. It is a workspace of its own, so
//! that nothing else depends on libFuzzer.
//!
//! Most targets begin with a valid structure and edit it as the input says. So the empty input is valid, and nearly
//! every input passes the first checks.

pub mod boot;
pub mod ept;
mod input;
pub mod shadow;

pub use input::Input;

use std::fmt::Display;

/// A function of bytes. It panics if a law is broken.
pub type Target = fn(&[u8]);

/// Every target, by its name in cargo-fuzz.
pub const TARGETS: [(&str, Target); 16] = [
    ("boot_acpi", boot::acpi),
    ("boot_command_line", boot::command_line),
    ("boot_guest_image", boot::guest_image),
    ("boot_memory_map", boot::memory_map),
    ("boot_multiboot", boot::multiboot),
    ("ept_paging", ept::paging),
    ("ept_walk", ept::walk),
    ("shadow_capabilities", shadow::capabilities),
    ("shadow_cpuid", shadow::cpuid),
    ("shadow_exits", shadow::exits),
    ("shadow_injection", shadow::injection),
    ("shadow_linear", shadow::linear),
    ("shadow_msrs", shadow::msrs),
    ("shadow_permissions", shadow::permissions),
    ("shadow_vmcs_region", shadow::vmcs_region),
    ("shadow_vmcs12", shadow::vmcs12),
];

/// The law of error messages: each is one line.
fn is_one_line(error: impl Display) {
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
}
