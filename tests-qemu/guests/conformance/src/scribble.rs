//! With the argument `scribble`, one processor writes at random into the VMCS regions of others while they build, enter
//! and clear their VMCSs. The SDM gives such software no guarantees (SDM 25.11.4 "Software Access to Related
//! Structures", 25.1 "Overview"), so this is not a case of the suite. It shows that a host survives.

use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{AcqRel, Acquire};

use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::code;
use crate::memory::Page;
use crate::output::{power_off, print};
use crate::random::Random;
use crate::smp::{MAX, Processors, count, enter_vmx, number};
use crate::vm::Vm;

/// The argument.
pub const WORD: &str = "scribble";

/// VMCSs that each processor builds.
const ROUNDS: u64 = 500;

#[unsafe(link_section = ".shared")]
static REGIONS: [Page; MAX] = [const { Page::new() }; MAX];
/// Processors that have built all their VMCSs.
#[unsafe(link_section = ".shared")]
static DONE: AtomicUsize = AtomicUsize::new(0);

/// Runs this on all processors; the last one scribbles.
pub fn run(processors: &Processors) -> ! {
    let _ = enter_vmx(0);
    for number in processors.others() {
        let _ = processors.run_on(number, enter_vmx, 0);
    }
    let ran = processors.run_on_all(take_part, 0);
    let users = &ran[..processors.count() - 1];
    let all_ran = users.iter().all(|&entered| entered > 0);
    print(format_args!("{WORD}: {ROUNDS} VMCSs on each of {} processors, each has entered: {all_ran}", users.len()));
    power_off()
}

/// Builds and enters. Returns how often the nested guest ran to its end.
fn take_part(_: u64) -> u64 {
    let users = count() - 1;
    if number() == users {
        let mut random = Random(1);
        while DONE.load(Acquire) < users {
            let region = &REGIONS[random.below(users as u64) as usize];
            // Mostly a word that every VMCS has in use; the first two are architectural.
            region.set((random.below(512) >> random.below(9)) as usize, random.below(u64::MAX));
            for _ in 0..random.below(400) {
                core::hint::spin_loop();
            }
        }
        return 0;
    }
    let entered = (0..ROUNDS).filter(|_| build_and_enter(&REGIONS[number()])).count();
    DONE.fetch_add(1, AcqRel);
    entered as u64
}

/// Builds and enters one VMCS. Whatever VMPTRLD has found in the region, an exit returns to this host, because its host
/// state is written again.
fn build_and_enter(region: &Page) -> bool {
    let mut vm = Vm::at(region, code!("nop"));
    vm.set(EXIT_MSR_STORE_COUNT, 0).set(EXIT_MSR_LOAD_COUNT, 0).set(ENTRY_MSR_LOAD_COUNT, 0);
    vm.set(HOST_FS_BASE, 0).set(HOST_GS_BASE, 0).set(HOST_FS_SELECTOR, 0).set(HOST_GS_SELECTOR, 0);
    vm.set(HOST_SYSENTER_ESP, 0).set(HOST_SYSENTER_EIP, 0).set(HOST_SYSENTER_CS, 0);
    let verdict = vm.run();
    let _ = vm.run();
    verdict.is(ExitReason::VMCALL)
}
