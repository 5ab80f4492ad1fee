//! Everything that needs x86-64 instructions, and nearly all unsafe code of the host.
#![allow(unsafe_code, reason = "privileged instructions, descriptor tables and raw physical memory")]

pub mod apic;
pub mod cpu;
pub mod enter;
pub mod fixup;
pub mod gdt;
pub mod host_state;
pub mod idt;
pub mod mmio;
pub mod msr;
pub mod on_behalf;
pub mod phys;
pub mod port;
pub mod relocate;
pub mod roll_call;
pub mod screen;
pub mod takeover;
pub mod timer;
pub mod trampoline;
pub mod vmx;
