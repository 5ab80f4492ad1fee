//! One EPT12, one VPID12, one set of bitmaps, used by every processor at once. The first processor edits them. The
//! others may use cached translations until they invalidate them themselves (SDM 29.4.3.4 "Guidelines for Use of the
//! INVEPT Instruction").

use shadow::exit::ExitReason;
use shadow::fields::*;

use crate::code;
use crate::cpu::{invept, invvpid};
use crate::memory::{Page, Table};
use crate::nested_paging::*;
use crate::output::Suite;
use crate::random::Random;
use crate::smp::{Meeting, Processors, count, number};
use crate::vm::Vm;

/// Edits of each kind.
const ROUNDS: u64 = 1000;
const VPID12: u16 = 7;

/// Writes to the bitmap by nested guests, and entries of each processor after each: a host that watches the page for
/// writes does so again after a few.
const WRITES: u64 = 200;
const LOOKS: u64 = 12;

#[unsafe(link_section = ".shared")]
static MEETING: Meeting = Meeting::new();

/// What the processors share: CR3 and EPTP, and the page that the last edit mapped or its bit.
#[unsafe(link_section = ".shared")]
static SHARED: Table<3> = Table::new();
const CR3: usize = 0;
const EPTP: usize = 1;
const EDITED: usize = 2;

#[unsafe(link_section = ".shared")]
static BITMAP: Page = Page::new();

/// Runs all cases.
pub fn run(suite: &mut Suite, processors: &Processors) {
    let mut case = |name, work, per_processor: u64| {
        MEETING.clear();
        let _ = Vm::new(code!("nop"));
        SHARED.set(CR3, guest_cr3());
        SHARED.set(EPTP, eptp());
        for page in 0..WINDOW_PAGES {
            PAGES.set(page * 512 + 1, page as u64);
        }
        BITMAP.fill(0);
        let wrong: u64 = processors.run_on_all(work, 0).iter().sum();
        let accesses = per_processor * processors.count() as u64;
        if wrong == 0 {
            suite.case(name, format_args!("{accesses} right"));
        } else {
            suite.case(name, format_args!("wrong: {wrong} of {accesses}"));
        }
        reset_guest();
    };
    case("ept-page-moved", page_moved_in_ept, ROUNDS);
    case("guest-page-moved", page_moved_by_guest, ROUNDS);
    case("msr-bitmap", msr_bitmap, ROUNDS);
    case("msr-bitmap-written-by-nested-guest", msr_bitmap_written_by_nested_guest, WRITES * LOOKS);
}

/// Runs the rounds: the first processor edits, and all processors access before the edit is certain to be visible, and
/// after.
fn rounds(edit: impl Fn(&mut Random), mut look: impl FnMut(u64) -> u64) -> u64 {
    let mut random = Random(1);
    let mut wrong = 0;
    for round in 0..ROUNDS {
        MEETING.join();
        if number() == 0 {
            edit(&mut random);
        }
        MEETING.join();
        wrong += look(round);
    }
    wrong
}

/// A nested guest in the first processor's address spaces, which reads the first page's number. What this processor has
/// cached of them is from before that one wrote its tables anew.
fn reader() -> Vm {
    let _ = invept(2, [0; 2]);
    let mut vm = Vm::new(code!("mov rcx, [rax + 8]"));
    vm.set(GUEST_CR3, SHARED.get(CR3)).set(EPT_POINTER, SHARED.get(EPTP));
    vm.set(VPID, VPID12);
    vm
}

/// The value that the nested guest reads.
fn read(vm: &mut Vm) -> Option<u64> {
    vm.rerun().is(ExitReason::VMCALL).then_some(vm.registers.rcx)
}

/// EPT12 maps the page elsewhere. Each processor accesses the new page at the latest after its own INVEPT.
fn page_moved_in_ept(_: u64) -> u64 {
    let mut vm = reader();
    vm.registers.rax = WINDOW;
    let mut old = None;
    let edit = |random: &mut Random| {
        let page = random.below(WINDOW_PAGES as u64);
        WINDOW_PT.set(0, (PAGES.address() + page * 4096) | LEAF);
        SHARED.set(EDITED, page);
    };
    rounds(edit, |round| {
        let new = Some(SHARED.get(EDITED));
        let before = read(&mut vm);
        let is_allowed = before == new || before == old || old.is_none();
        let _ = if round % 2 == 0 { invept(1, [SHARED.get(EPTP), 0]) } else { invept(2, [0; 2]) };
        let is_right = is_allowed && read(&mut vm) == new;
        old = new;
        u64::from(!is_right)
    })
}

/// The nested guest's page table maps the page elsewhere. Each processor accesses the new page at the latest after its
/// own INVVPID, of any type.
fn page_moved_by_guest(_: u64) -> u64 {
    let mut vm = reader();
    vm.registers.rax = LINEAR;
    let mut old = None;
    let edit = |random: &mut Random| {
        const PRESENT_WRITE_USER: u64 = 7;
        let page = random.below(WINDOW_PAGES as u64);
        GUEST_PT.set(0, (WINDOW + page * 4096) | PRESENT_WRITE_USER);
        SHARED.set(EDITED, page);
    };
    rounds(edit, |round| {
        let new = Some(SHARED.get(EDITED));
        let before = read(&mut vm);
        let is_allowed = before == new || before == old || old.is_none();
        let _ = invvpid(round % 4, [VPID12.into(), LINEAR]);
        let is_right = is_allowed && read(&mut vm) == new;
        old = new;
        u64::from(!is_right)
    })
}

/// IA32_SYSENTER_CS.
const MSR: u64 = 0x174;

/// The processors' nested guests, whose memory the bitmap is, write it in turn: the next entry on every processor goes
/// by it, whatever translations of the page there are.
fn msr_bitmap_written_by_nested_guest(_: u64) -> u64 {
    let (read, write) = (code!("rdmsr"), code!("mov [rax], rcx"));
    let mut vm = Vm::new(read);
    vm.set(MSR_BITMAP, BITMAP.address());
    let mut random = Random(1);
    let mut wrong = 0;
    for round in 0..WRITES {
        let bit = random.below(2);
        MEETING.join();
        if round % count() as u64 == number() as u64 {
            vm.set_entry_point(write);
            vm.registers.rax = BITMAP.address() + MSR / 64 * 8;
            vm.registers.rcx = bit << (MSR % 64);
            wrong += u64::from(!vm.rerun().is(ExitReason::VMCALL));
        }
        MEETING.join();
        let expected = if bit == 1 { ExitReason::RDMSR } else { ExitReason::VMCALL };
        vm.set_entry_point(read);
        for _ in 0..LOOKS {
            vm.registers.rcx = MSR;
            wrong += u64::from(!vm.rerun().is(expected));
        }
    }
    wrong
}

/// An MSR's bit in the common bitmap: the next entry on every processor uses the new value.
fn msr_bitmap(_: u64) -> u64 {
    let mut vm = Vm::new(code!("rdmsr"));
    vm.set(MSR_BITMAP, BITMAP.address());
    let edit = |random: &mut Random| {
        let bit = random.below(2);
        // Its neighbours' bits change too, and must not matter.
        let noise = random.below(u64::MAX) & !(1 << (MSR % 64));
        BITMAP.set((MSR / 64) as usize, noise | bit << (MSR % 64));
        SHARED.set(EDITED, bit);
    };
    rounds(edit, |_| {
        vm.registers.rcx = MSR;
        let expected = if SHARED.get(EDITED) == 1 { ExitReason::RDMSR } else { ExitReason::VMCALL };
        u64::from(!vm.rerun().is(expected))
    })
}
