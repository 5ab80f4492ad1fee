//! l1hv: a thin bare-metal hypervisor with complete nested VMX.
//!
//! ```text
//!   boot loader -> boot::entry -> l1hv_main -> boot_flow -> startup -> run (the loop) <-> exit, nested
//!   the other processors -> boot::entry (trampoline) -> startup::arrive -> run
//! ```
//!
//! Invariants:
//! * Unsafe code is under [`arch`], in the allocators of [`mem`], and in one function of [`setup`].
//! * Interrupts are off whenever the host runs.
//! * Every failure ends in [`stop`]: one line, then a status that the runner sees.
//!
//! SDM references are to the Intel 64 and IA-32 Architectures Software Developer's Manual, edition 085 (October 2024).
#![no_std]
#![no_main]

mod arch;
mod bios;
mod boot_flow;
mod ept01;
mod exit;
mod host;
mod hw;
mod iommu;
mod log;
mod mem;
mod panic;
mod processor;
mod run;
mod setup;
mod shadow_fields;
mod sleep;
mod startup;
mod stats;
mod stop;
mod tables;
mod vmcs_setup;

/// The boot code calls this in long mode with the loader's values of EAX and EBX.
#[allow(unsafe_code, reason = "the assembly names it")]
// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
extern "C" fn l1hv_main(magic: u32, info: u32) -> ! {
    boot_flow::run(magic, info)
}
