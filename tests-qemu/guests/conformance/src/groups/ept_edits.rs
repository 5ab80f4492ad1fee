//! Edits of EPT12 and of the nested guest's page tables between two entries: with the invalidation that an edit needs,
//! or without one if it needs none (SDM 29.4.3.1 "Operations that Invalidate Cached Mappings", 29.4.3.3 "Guidelines for
//! Use of the INVVPID Instruction", 29.4.3.4 "Guidelines for Use of the INVEPT Instruction").

use core::fmt;

use shadow::caps::ept_vpid;
use shadow::controls::Secondary;
use shadow::fields::*;
use shadow::msr::IA32_VMX_EPT_VPID_CAP;

use super::ept::{ACCESSED_DIRTY, LARGE, TARGET, WithEntries, accesses, replace_bits};
use crate::code;
use crate::cpu::{invept, invvpid, rdmsr};
use crate::fault::Outcome;
use crate::memory::Page;
use crate::nested_paging::*;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    more_rights_after_a_violation(suite);
    present_without_a_violation(suite);
    moved_before_a_violation(suite);
    invept_after_edits(suite);
    invvpid_after_edits(suite);
    edits_without_vpid(suite);
    vpids_in_turn(suite);
    reset_guest();
}

const LEVELS: [(&str, &Page, usize); 3] = [("pt", &WINDOW_PT, TARGET), ("pd", &WINDOW_PD, 0), ("pdpt", &PDPT, 1)];

/// Marks each page of the window, so that a read tells which one it reached.
fn mark_pages() {
    answer_calls();
    fill_large_page();
    for page in 0..WINDOW_PAGES {
        PAGES.set(page * 512 + 1, 0x1111 * page as u64);
    }
}

/// The entries of EPT12, the value read into RCX, and the content of the first two pages that a case may write.
struct Observed<T>(T, u64);

impl<T: fmt::Display> fmt::Display for Observed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = [TARGET, TARGET + 1].map(|page| PAGES.get(page * 512 + 1) & 0xffff);
        write!(f, "{} rcx={:#x} memory={memory:x?}", self.0, self.1)
    }
}

fn step(suite: &mut Suite, vm: &mut Vm, name: impl fmt::Display) {
    let verdict = vm.rerun();
    suite.case(name, Observed(WithEntries(verdict), vm.registers.rcx));
}

/// More rights than before: after a violation they need no invalidation, whatever the access was.
fn more_rights_after_a_violation(suite: &mut Suite) {
    for (level, table, index) in LEVELS {
        for (before, after) in (0..8).flat_map(|before| (0..8).map(move |after| (before, after))) {
            // An edit to fewer rights needs INVEPT, and misconfigured entries are tried elsewhere.
            if before & !after != 0 || before == after || after & 3 == 2 {
                continue;
            }
            for (access, code) in &accesses()[..4] {
                mark_pages();
                let mut vm = Vm::new(*code);
                replace_bits(table, index, 7, before);
                let _ = invept(2, [0; 2]);
                step(suite, &mut vm, format_args!("{level}-{before:03b}-before-{after:03b}-{access}"));
                replace_bits(table, index, 7, after);
                step(suite, &mut vm, format_args!("{level}-{before:03b}-then-{after:03b}-{access}"));
            }
        }
    }
}

/// An entry that becomes present needs no invalidation, even without a violation before, next to pages that are in use.
fn present_without_a_violation(suite: &mut Suite) {
    type Step = fn();
    let edits: [(&str, Step, Step); 4] = [
        ("4k", || WINDOW_PT.set(TARGET, 0), || WINDOW_PT.set(TARGET, (PAGES.address() + 0x1000) | LEAF)),
        ("table", || WINDOW_PD.set(0, 0), || WINDOW_PD.set(0, WINDOW_PT.address() | 7)),
        ("2m", || WINDOW_PD.set(0, 0), || WINDOW_PD.set(0, LARGE_PAGE | LARGE | LEAF)),
        ("directory", || PDPT.set(1, 0), || PDPT.set(1, WINDOW_PD.address() | 7)),
    ];
    for (name, absent, present) in edits {
        for (access, code) in &accesses()[..4] {
            for dirty in [0, ACCESSED_DIRTY] {
                mark_pages();
                let mut vm = Vm::new(code!("nop"));
                vm.or(EPT_POINTER, dirty);
                absent();
                let _ = invept(2, [0; 2]);
                step(suite, &mut vm, format_args!("absent-{name}-{access}-ad-{}-before", dirty >> 6));
                present();
                vm.set_entry_point(*code);
                step(suite, &mut vm, format_args!("absent-{name}-{access}-ad-{}-present", dirty >> 6));
            }
        }
    }
}

/// A violation invalidates the cached mappings of its address: a later read uses the present EPT12, without INVEPT.
fn moved_before_a_violation(suite: &mut Suite) {
    type Build = fn(u64) -> Vm;
    let with: [(&str, Build); 2] = [("", Vm::without_vpid), ("-vpid", Vm::new)];
    for (dirty, (tag, build)) in [0, ACCESSED_DIRTY].into_iter().flat_map(|dirty| with.map(|with| (dirty, with))) {
        for (refused, code) in &accesses()[1..4] {
            mark_pages();
            let read = code!("mov rax, 0x40001008", "mov rcx, [rax]");
            let mut vm = build(read);
            vm.or(EPT_POINTER, dirty);
            replace_bits(&WINDOW_PT, TARGET, 7, 1);
            let _ = invept(2, [0; 2]);
            step(suite, &mut vm, format_args!("refused-{refused}{tag}-ad-{}-before", dirty >> 6));
            WINDOW_PT.set(TARGET, (PAGES.address() + 0x2000) | LEAF & !6);
            vm.set_entry_point(*code);
            step(suite, &mut vm, format_args!("refused-{refused}{tag}-ad-{}", dirty >> 6));
            vm.set_entry_point(read);
            step(suite, &mut vm, format_args!("refused-{refused}{tag}-ad-{}-after", dirty >> 6));
        }
    }
}

/// The edit of an entry of a table.
type Edit = fn(&Page, usize);

/// Edits that need INVEPT. The access before them fills all caches.
fn invept_after_edits(suite: &mut Suite) {
    let edits: [(&str, Edit); 8] = [
        ("unchanged", |_, _| ()),
        ("removed", |table, index| table.set(index, 0)),
        ("read-only", |table, index| replace_bits(table, index, 7, 1)),
        ("no-fetch", |table, index| replace_bits(table, index, 7, 3)),
        ("fetch-only", |table, index| replace_bits(table, index, 7, 4)),
        ("write-only", |table, index| replace_bits(table, index, 7, 2)),
        ("clean", |table, index| replace_bits(table, index, 3 << 8, 0)),
        ("moved", |_, _| WINDOW_PT.set(TARGET, (PAGES.address() + 0x2000) | LEAF)),
    ];
    type Invalidate = fn() -> Outcome;
    let ways: [(&str, Invalidate); 3] = [
        ("single", || invept(1, [eptp(), 0])),
        // INVEPT ignores the flag.
        ("single-with-flag", || invept(1, [eptp() ^ ACCESSED_DIRTY, 0])),
        ("global", || invept(2, [0; 2])),
    ];
    // On a processor without accessed and dirty flags, an EPTP that enables them is invalid: that INVEPT fails, and
    // cached mappings may stay or go.
    let has_flags = rdmsr(IA32_VMX_EPT_VPID_CAP).is_ok_and(|has| has & ept_vpid::ACCESSED_DIRTY != 0);
    let usable = ways.iter().filter(|(way, _)| has_flags || *way != "single-with-flag");
    for ((edit_name, edit), (way, invalidate)) in edits.iter().flat_map(|edit| usable.clone().map(|way| (*edit, *way)))
    {
        for (level, table, index) in LEVELS {
            for (access, code) in &accesses()[..4] {
                for (dirty, vpid) in [(0, 0), (0, 1), (ACCESSED_DIRTY, 1)] {
                    mark_pages();
                    let mut vm = if vpid == 0 { Vm::without_vpid(*code) } else { Vm::new(*code) };
                    vm.or(EPT_POINTER, dirty);
                    let _ = invept(2, [0; 2]);
                    let _ = vm.run();
                    edit(table, index);
                    let _ = invalidate();
                    let ad = dirty >> 6;
                    let name = format_args!("invept-{way}-{level}-{edit_name}-{access}-ad-{ad}-vpid-{vpid}");
                    step(suite, &mut vm, name);
                    if level == "pt" {
                        step(suite, &mut vm, format_args!("{name}-again"));
                    }
                }
            }
        }
    }
}

/// The hypervisor edits the guest's page table, and executes the four types of INVVPID; for the type that retains
/// global translations, the translation is not global.
fn invvpid_after_edits(suite: &mut Suite) {
    const OTHER: u64 = LINEAR + 0x2000;
    let edits: [(&str, u64); 4] = [
        ("unchanged", (WINDOW + 0x1000) | 7),
        ("moved", (WINDOW + 0x2000) | 7),
        ("read-only", (WINDOW + 0x1000) | 5),
        ("removed", 0),
    ];
    for kind in 0..4 {
        for (edit, entry) in edits {
            for (access, code) in linear_accesses() {
                for dirty in [0, ACCESSED_DIRTY] {
                    mark_pages();
                    let mut vm = Vm::new(code);
                    vm.set(VPID, 5).or(EPT_POINTER, dirty);
                    let _ = (invept(2, [0; 2]), invvpid(2, [0; 2]));
                    let _ = vm.run();
                    GUEST_PT.set(TARGET, entry);
                    // INVVPID for another VPID or, for the type with an address, for another address must not matter.
                    let _ = (invvpid(kind, [6, LINEAR + 0x1000]), invvpid(kind, [5, LINEAR + 0x1000]));
                    let name = format_args!("invvpid-{kind}-{edit}-{access}-ad-{}", dirty >> 6);
                    step(suite, &mut vm, name);
                    let _ = invvpid(kind, [5, OTHER]);
                    step(suite, &mut vm, format_args!("{name}-again"));
                }
            }
        }
    }
}

/// The hypervisor edits the guest's page table, and invalidates nothing: without VPID the next entry does. A nested
/// guest without EPT has no other reason for its translations to go.
fn edits_without_vpid(suite: &mut Suite) {
    const ENTRIES: usize = 3;
    let ways = [("no-ept", None), ("ad-0", Some(0)), ("ad-1", Some(ACCESSED_DIRTY))];
    for (edit, page, bits) in [("moved", 2, 7), ("read-only", 1, 5), ("removed", 0, 0)] {
        for (access, code) in linear_accesses() {
            for (way, dirty) in ways {
                mark_pages();
                let mut vm = Vm::without_vpid(code);
                let first = match dirty {
                    Some(dirty) => {
                        vm.or(EPT_POINTER, dirty);
                        WINDOW
                    }
                    None => {
                        vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
                        PAGES.address()
                    }
                };
                GUEST_PT.set(TARGET, (first + 4096) | 7);
                let _ = invept(2, [0; 2]);
                // What a host does at the first entries only is no reason for anything later.
                (0..ENTRIES).for_each(|_| _ = vm.rerun());
                GUEST_PT.set(TARGET, (first + page * 4096) | bits);
                step(suite, &mut vm, format_args!("no-vpid-{edit}-{access}-{way}"));
            }
        }
    }
}

/// Accesses to a page by way of the guest's page table.
fn linear_accesses() -> [(&'static str, u64); 4] {
    [
        ("read", code!("mov rax, 0x140001008", "mov rcx, [rax]")),
        ("write", code!("mov rax, 0x140001008", "mov [rax], eax")),
        ("fetch", code!("mov rax, 0x140001000", "jmp rax")),
        ("read-write", code!("mov rax, 0x140001008", "lock inc dword ptr [rax]")),
    ]
}

/// VPIDs from one end of their range to the other take turns; each sees an edit of its page table after INVVPID for
/// itself, and a nested guest without VPID sees it always.
fn vpids_in_turn(suite: &mut Suite) {
    const VPIDS: [u16; 6] = [1, 2, 0x8000, 0xfffd, 0xfffe, 0xffff];
    let code = code!("mov rax, 0x140001008", "mov rcx, [rax]");
    for kind in 0..4 {
        mark_pages();
        let mut vm = Vm::new(code);
        let _ = invvpid(2, [0; 2]);
        for (round, page) in [1, 2, 3, 0].into_iter().enumerate() {
            GUEST_PT.set(TARGET, (WINDOW + page * 4096) | 7);
            for vpid in VPIDS {
                vm.or(SECONDARY_CONTROLS, Secondary::ENABLE_VPID).set(VPID, vpid);
                let _ = invvpid(kind, [vpid.into(), LINEAR + 0x1000]);
                step(suite, &mut vm, format_args!("vpid-{vpid:#x}-invvpid-{kind}-round-{round}"));
            }
            vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_VPID);
            step(suite, &mut vm, format_args!("no-vpid-invvpid-{kind}-round-{round}"));
        }
    }
}
