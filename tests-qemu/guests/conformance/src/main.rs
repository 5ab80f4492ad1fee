//! A guest hypervisor that tries VMX and prints what the processor did, one line a case:
//!
//! ```text
//!   C GROUP/CASE RESULT
//!   C-END COUNT
//! ```
//!
//! The runner boots it on the bare machine and under l1hv and compares the lines. A result therefore never depends on time, and
//! holds only addresses of the image itself, which is loaded at the same place on both. Lines that begin with `C-PANIC` say that
//! a case did what none may do.
//!
//! ```text
//!   groups/*  the cases         vm       a nested guest, changed and run until its first exit
//!   fault     attempt!          memory   tables and pages      nested_paging   EPT12 and the nested guest's page tables
//! ```

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the image consists of privileged instructions")]
#![allow(clippy::macro_metavars_in_unsafe, reason = "what attempt! takes are instructions and their operands")]

mod apic;
mod cpu;
mod fault;
mod groups;
#[path = "../../mark.rs"]
mod mark;
mod memory;
mod minimal;
mod nested_paging;
mod output;
mod permissions;
#[path = "../../port.rs"]
mod port;
mod vm;

use core::arch::global_asm;
use core::panic::PanicInfo;

use output::{Suite, power_off, print};
use permissions::Permissions;

global_asm!(include_str!("boot.S"), options(att_syntax));

#[unsafe(no_mangle)]
extern "C" fn conformance_main(info: u64) -> ! {
    memory::init();
    apic::init();
    let arguments = arguments(info);
    if arguments.split(' ').any(|word| word == minimal::WORD) {
        minimal::run();
    }
    let mut suite = Suite::new(Permissions::from_arguments(arguments));
    for (name, run) in groups::ALL {
        suite.begin(name);
        run(&mut suite);
    }
    suite.end()
}

/// The command line (Multiboot Specification 0.6.96, 3.3).
fn arguments(info: u64) -> &'static str {
    const COMMAND_LINE: u64 = 16;
    let at = |address: u64| core::ptr::with_exposed_provenance::<u8>(address as usize);
    // SAFETY: the loader's information is mapped and stays as it is; its strings end with a zero.
    let line = unsafe { core::ffi::CStr::from_ptr(at(at(info + COMMAND_LINE).cast::<u32>().read().into()).cast()) };
    line.to_str().unwrap_or("")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    print(format_args!("C-PANIC {info}"));
    power_off()
}
