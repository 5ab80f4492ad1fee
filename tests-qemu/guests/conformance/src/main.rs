//! A guest hypervisor that tries VMX and prints what the processor did, one line a case:
//!
//! ```text
//!   C GROUP/CASE RESULT
//!   C-END COUNT
//! ```
//!
//! The runner boots it on the bare machine and under l1hv and compares the lines. A result therefore never depends on
//! time, and holds only addresses of the image itself, which is loaded at the same place on both. A line that begins
//! with `C-PANIC` reports that a case did what no case may do.
//!
//! ```text
//!   groups/*  the cases         vm       a nested guest, changed and run until its first exit
//!   arguments the command line and the memory map
//!   fault     attempt!          memory   tables and pages      nested_paging   EPT12 and the nested guest's page tables
//!   smp       the other processors
//! ```
//!
//! On a machine with several processors the groups that need them run, and no others unless `only=GROUP,GROUP` names
//! some. With `on=NUMBER` the groups for one processor run on that processor.

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the image consists of privileged instructions")]
#![allow(clippy::macro_metavars_in_unsafe, reason = "what attempt! takes are instructions and their operands")]

mod abort;
mod apic;
mod arguments;
mod cpu;
mod dma;
mod far;
mod fault;
mod fuzz;
mod groups;
mod memory;
mod minimal;
mod nested_paging;
mod output;
mod permissions;
mod random;
mod screen;
mod scribble;
mod sleep;
mod smp;
mod vm;

use core::arch::global_asm;
use core::panic::PanicInfo;

use linked_list_allocator::LockedHeap;
use output::{Suite, power_off, print};
use permissions::Permissions;
use smp::Processors;

global_asm!(include_str!("boot.S"), options(att_syntax));

#[unsafe(no_mangle)]
extern "C" fn conformance_main(loader_information: u32) -> ! {
    arguments::init(loader_information);
    memory::init();
    apic::init();
    for word in arguments::words() {
        match word {
            minimal::WORD => minimal::run(),
            abort::LOAD => abort::load(),
            abort::STORE => abort::store(),
            far::WORD => far::run(),
            dma::WORD => dma::run(),
            screen::WORD => screen::run(),
            sleep::WORD => sleep::run(),
            fuzz::WORD => fuzz::run(),
            scribble::WORD => scribble::run(&Processors::start()),
            _ => (),
        }
    }
    let processors = Processors::start();
    if let Some(number) = arguments::value("on=") {
        processors.begin(number as usize, run_for_one, 0);
        smp::halt()
    }
    let is_for_one = |group: &str| groups::ALL.iter().any(|(name, _)| *name == group);
    if processors.count() == 1 || arguments::names_a_group(is_for_one) {
        run_for_one(0);
    }
    run_for_several(&processors)
}

/// Runs the groups for one processor, on this processor.
fn run_for_one(_: u64) -> u64 {
    let mut suite = Suite::new(Permissions::from_arguments(arguments::command_line()));
    for (name, run) in groups::ALL {
        suite.begin(name);
        let wanted = arguments::wants(name);
        if wanted || *name == groups::WAY_IN {
            suite.print_cases(wanted);
            run(&mut suite);
        }
    }
    suite.end()
}

/// Runs the groups that need several processors. The first processor enters VMX operation here, the others do in the
/// first group.
fn run_for_several(processors: &Processors) -> ! {
    let mut suite = Suite::new(Permissions::from_arguments(arguments::command_line()));
    let _ = smp::enter_vmx(0);
    for (name, run) in groups::OF_SEVERAL_PROCESSORS {
        suite.begin(name);
        let wanted = arguments::wants(name);
        if wanted || *name == groups::WAY_IN_OF_OTHERS {
            suite.print_cases(wanted);
            run(&mut suite, processors);
        }
    }
    suite.end()
}

/// `shadow` needs a heap for functions that no group uses. An allocation would fail.
#[global_allocator]
static NO_HEAP: LockedHeap = LockedHeap::empty();

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    print(format_args!("C-PANIC processor {}: {info}", apic::id()));
    power_off()
}
