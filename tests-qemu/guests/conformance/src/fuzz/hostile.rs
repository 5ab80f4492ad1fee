//! Hostile programs: with `fuzz hostile` nothing is compared, and a program may do what the SDM leaves undefined. One
//! processor scribbles on the VMCS regions, bitmaps, tables and areas of the others, whose programs name the host's
//! memory wherever they can. The host survives, and its memory is unchanged.
//!
//! ```text
//!   processor 0                              others
//!   begin a batch  ───────────────────────>  programs, each its share
//!   scribble until all have finished         restore their own host state before each entry
//!   print a line; now and then ask l1hv for its statistics, with a checksum
//! ```

use core::ops::Range;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use shadow::fields::*;

use super::program::{Program, Step};
use super::{Fuzzer, Job};
use crate::apic::{self, Message};
use crate::cpu::request_host_statistics;
use crate::memory::*;
use crate::nested_paging::{self, WINDOW_PD, WINDOW_PT};
use crate::output::{power_off, print};
use crate::random::Random;
use crate::smp::{MAX, Processors, count, local, number};

/// Lines from one request for statistics to the next.
const LINES: u64 = 8;

/// Of the batch under way: its first program, how many programs, and the batch's number. The others wait for the number
/// in a loop, as their programs may keep their APICs from waking them.
#[unsafe(link_section = ".shared")]
static BATCH: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// Processors that have finished their share, a bit each.
#[unsafe(link_section = ".shared")]
static FINISHED: AtomicU64 = AtomicU64::new(0);

/// Runs the programs of a job.
pub fn run(job: &Job) -> ! {
    let processors = Processors::start();
    let mut random = Random(job.seed);
    let mut own = (processors.count() == 1).then(|| Fuzzer::new(job, true));
    request_host_statistics();
    let mut next = job.first;
    processors.others().for_each(|number| processors.begin(number, take_part, job.seed));
    for line in 1.. {
        let programs = job.batch.min(job.first + job.count - next);
        if let Some(fuzzer) = &mut own {
            (next..next + programs).for_each(|program| fuzzer.run(program, u64::MAX));
        } else {
            BATCH[0].store(next, Relaxed);
            BATCH[1].store(programs, Relaxed);
            FINISHED.store(0, Relaxed);
            BATCH[2].store(line, Release);
            scribble_until_all_have_finished(&processors, &mut random);
        }
        next += programs;
        print(format_args!("F {} - failed= exits=", next - 1));
        if line % LINES == 0 || next == job.first + job.count {
            request_host_statistics();
        }
        if next == job.first + job.count {
            break;
        }
    }
    print(format_args!("F-END"));
    power_off()
}

/// Work: this processor's share of each batch, until the machine ends.
fn take_part(seed: u64) -> u64 {
    let mut fuzzer = Fuzzer::new(&Job { seed, ..Job::default() }, true);
    for batch in 1.. {
        while BATCH[2].load(Acquire) < batch {
            core::hint::spin_loop();
        }
        let (first, programs) = (BATCH[0].load(Relaxed), BATCH[1].load(Relaxed));
        let share = first + number() as u64 - 1..first + programs;
        share.step_by(count() - 1).for_each(|program| fuzzer.run(program, u64::MAX));
        FINISHED.fetch_or(1 << number(), Release);
    }
    0
}

/// A nested guest whose controls were scribbled away may halt or loop for ever. INIT gets its hypervisor out of it. A
/// processor that INIT does not reach is lost to its own program, and the machine ends.
fn scribble_until_all_have_finished(processors: &Processors, random: &mut Random) {
    const PATIENCE: u64 = 10_000;
    const ATTEMPTS: usize = 20;
    let all = processors.others().fold(0, |all, number| all | 1 << number);
    for _ in 0..ATTEMPTS {
        for _ in 0..PATIENCE {
            if FINISHED.load(Acquire) == all {
                return;
            }
            scribble(random);
        }
        let finished = FINISHED.load(Acquire);
        for number in processors.others().filter(|number| finished >> number & 1 == 0) {
            apic::send(number, Message::Init);
        }
    }
    // The host answers, whatever its guests do.
    request_host_statistics();
    print(format_args!("F-LOST {:#x}", all & !FINISHED.load(Acquire)));
    power_off()
}

/// Writes a word to a structure of another processor: mostly one that is in use.
fn scribble(random: &mut Random) {
    let pages: [&Page; 10] = [
        &VMCS,
        &OTHER_VMCS,
        &VMXON,
        &MSR_BITMAPS,
        &VIRTUAL_APIC,
        &POSTED,
        &MODIFICATION_LOG,
        &SPARE,
        &WINDOW_PT,
        &WINDOW_PD,
    ];
    let victim = 1 + random.below(count() as u64 - 1) as usize;
    assert!(victim < MAX, "no such processor");
    let word = random.below(512) >> random.below(9);
    let value = match random.below(4) {
        0 => random.next(),
        1 => host_page(random),
        2 => host_page(random) | 7,
        _ => 1 << random.below(64),
    };
    local::write_to(victim, random.pick(&pages), word as usize, value);
    for _ in 0..random.below(300) {
        core::hint::spin_loop();
    }
}

/// A page of the host.
fn host_page(random: &mut Random) -> u64 {
    let Range { start, end } = crate::arguments::reserved_memory().unwrap_or(0..4096);
    start + random.below((end - start) / 4096) * 4096
}

/// Fields that hold addresses.
const ADDRESSES: [Field<u64>; 21] = [
    IO_BITMAP_A,
    IO_BITMAP_B,
    MSR_BITMAP,
    EXIT_MSR_STORE_ADDRESS,
    ENTRY_MSR_LOAD_ADDRESS,
    EXECUTIVE_VMCS_POINTER,
    PML_ADDRESS,
    VIRTUAL_APIC_ADDRESS,
    APIC_ACCESS_ADDRESS,
    POSTED_INTERRUPT_DESCRIPTOR_ADDRESS,
    EPT_POINTER,
    EPTP_LIST_ADDRESS,
    VMREAD_BITMAP,
    VMWRITE_BITMAP,
    VIRTUALIZATION_EXCEPTION_INFO,
    VMCS_LINK_POINTER,
    GUEST_CR3,
    GUEST_PDPTE0,
    GUEST_PDPTE3,
    GUEST_RSP,
    GUEST_GDTR_BASE,
];

/// Adds a step that names the host's memory.
pub fn aim_at_the_host(random: &mut Random, program: &mut Program) {
    let page = host_page(random);
    let step = match random.below(8) {
        0 => Step::Ept(random.below(nested_paging::WINDOW_PAGES as u64) as usize, page ^ random.below(0x1000)),
        1 => Step::GuestTable(random.below(nested_paging::WINDOW_PAGES as u64) as usize, page ^ random.below(0x1000)),
        2 => Step::AtAddress(random.below(3) as u8, page | random.pick(&[0, 0, 1, 1 << 47])),
        _ => {
            let low = random.pick(&[0, 0, 0x1e, 0x5e, 1, 7, 0x40]);
            Step::Write(random.pick(&ADDRESSES).id(), page | low)
        }
    };
    program.push(step);
}
