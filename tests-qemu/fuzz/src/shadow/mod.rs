//! Targets of `shadow`: what a guest hypervisor writes, and what a processor reports.

mod capabilities;
mod exits;
mod injection;
mod laws;
mod linear;
mod machine;
mod msrs;
mod nested;
mod permissions;

pub use capabilities::{capabilities, cpuid};
pub use exits::exits;
pub use injection::injection;
pub use linear::linear;
pub use msrs::msrs;
pub use nested::{vmcs_region, vmcs12};
pub use permissions::permissions;
