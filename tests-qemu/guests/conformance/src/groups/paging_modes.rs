//! The nested guest's own paging over EPT12: every mode, with every combination of EPT rights for each page that a
//! translation uses (SDM 29.3.3.2 "EPT Violations", 29.3.5 "Accessed and Dirty Flags for EPT").
//!
//! ```text
//!   page of the window   1 what the guest accesses   5 its page table   6 its page directory   7 its PDPT
//! ```

use core::fmt;

use shadow::controls::{EntryControls, Secondary};
use shadow::fields::*;
use shadow::registers::{CR0_PE, CR0_PG, CR4_PAE, CR4_PSE};

use super::entry_guest::protected;
use crate::cpu::invept;
use crate::memory::{LONG_MSR_AREA, OPERANDS, SPARE};
use crate::nested_paging::{self, PAGES, PML4, WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::Vm;
use crate::{code, code_32};

const ACCESSED_DIRTY: u64 = 1 << 6;
const TARGET: usize = 1;
const TABLE: usize = 5;
const DIRECTORY: usize = 6;
const POINTERS: usize = 7;
/// Where legacy modes map the window with small pages, and 2 or 4 MiB further with a large one.
const LINEAR_32: u64 = 3 << 30;
const PRESENT_WRITE_USER: u64 = 7;
const LARGE: u64 = 1 << 7;

/// A paging mode, and the guest's address of [`TARGET`].
struct Mode {
    name: &'static str,
    linear: u64,
    /// Pages of the window that a translation uses.
    uses: &'static [(&'static str, usize)],
    prepare: fn(&mut Vm, flags: u64),
}

const SMALL: &[(&str, usize)] = &[("page", TARGET), ("pt", TABLE), ("pd", DIRECTORY)];
const BIG: &[(&str, usize)] = &[("page", TARGET), ("pd", DIRECTORY)];
const UNPAGED: &[(&str, usize)] = &[("page", TARGET)];
const FOUR: &[(&str, usize)] = &[("page", TARGET), ("pt", TABLE), ("pd", DIRECTORY), ("pdpt", POINTERS)];
const FOUR_2M: &[(&str, usize)] = &[("page", TARGET), ("pd", DIRECTORY), ("pdpt", POINTERS)];
const FOUR_1G: &[(&str, usize)] = &[("page", TARGET), ("pdpt", POINTERS)];

const MODES: [Mode; 9] = [
    Mode { name: "real", linear: WINDOW, uses: UNPAGED, prepare: |vm, _| real(vm) },
    Mode { name: "unpaged", linear: WINDOW, uses: UNPAGED, prepare: |vm, _| protected(vm) },
    Mode { name: "32-bit", linear: LINEAR_32, uses: SMALL, prepare: paging_32 },
    Mode { name: "32-bit-4m", linear: LINEAR_32 + (4 << 20), uses: BIG, prepare: paging_32 },
    Mode { name: "pae", linear: LINEAR_32, uses: SMALL, prepare: paging_pae },
    Mode { name: "pae-2m", linear: LINEAR_32 + (2 << 20), uses: BIG, prepare: paging_pae },
    Mode { name: "4-level", linear: 0, uses: FOUR, prepare: paging_4_level },
    Mode { name: "4-level-2m", linear: 2 << 20, uses: FOUR_2M, prepare: paging_4_level },
    Mode { name: "4-level-1g", linear: 1 << 30, uses: FOUR_1G, prepare: paging_4_level },
];

/// The base of the addresses that the window's 4-level tables map: the second entry of the PML4 table.
const LINEAR_64: u64 = 1 << 39;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    for mode in &MODES {
        for &(used, page) in mode.uses {
            permissions(suite, mode, used, page);
        }
    }
    pdpte_loads(suite);
    nested_paging::reset_guest();
}

/// Ways to access the address in RAX, in code for legacy modes and for 64-bit mode.
fn accesses(mode: &Mode) -> [(&'static str, u64); 4] {
    if mode.name.starts_with("4-level") {
        return [
            ("read", code!("mov cl, [rax]")),
            ("write", code!("mov [rax + 8], cl")),
            ("fetch", code!("jmp rax")),
            ("read-write", code!("lock inc dword ptr [rax + 8]")),
        ];
    }
    [
        ("read", code_32!("mov cl, [eax]")),
        ("write", code_32!("mov [eax + 8], cl")),
        ("fetch", code_32!("jmp eax")),
        ("read-write", code_32!("lock inc dword ptr [eax + 8]")),
    ]
}

fn permissions(suite: &mut Suite, mode: &Mode, used: &str, page: usize) {
    for (access, code) in accesses(mode) {
        for rights in 0..8 {
            for dirty in [0, ACCESSED_DIRTY] {
                for flags in [0, 0x60] {
                    let mut vm = Vm::new(code);
                    nested_paging::answer_calls();
                    vm.or(EPT_POINTER, dirty);
                    (mode.prepare)(&mut vm, flags);
                    vm.registers.rax =
                        mode.linear + TARGET as u64 * 4096 + if mode.name.starts_with('4') { LINEAR_64 } else { 0 };
                    WINDOW_PT.set(page, WINDOW_PT.get(page) & !7 | rights);
                    let _ = invept(2, [0; 2]);
                    let verdict = vm.run();
                    suite.case(
                        format_args!("{}-{used}-{rights:03b}-{access}-ad-{}-guest-{flags:#x}", mode.name, dirty >> 6),
                        format_args!("{verdict}{}", Flags),
                    );
                }
            }
        }
    }
}

/// The flags of the used entries of EPT12 and of the guest's tables.
struct Flags;

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ept = [TARGET, TABLE, DIRECTORY, POINTERS].map(|page| WINDOW_PT.get(page) >> 8 & 3);
        let guest = [(TABLE, 1), (DIRECTORY, 0), (DIRECTORY, 1), (POINTERS, 0), (POINTERS, 1)]
            .map(|(page, at)| PAGES.get(page * 512 + at) >> 5 & 3);
        write!(f, " {:x} ept={ept:?} guest={guest:?}", PML4.get(0) >> 8 & 3)
    }
}

fn window_page(page: usize) -> u64 {
    WINDOW + page as u64 * 4096
}

fn clear_tables() {
    for entry in TABLE * 512..(POINTERS + 1) * 512 {
        PAGES.set(entry, 0);
    }
}

/// Real mode with 32-bit segments.
pub fn real(vm: &mut Vm) {
    protected(vm);
    vm.clear(GUEST_CR0, CR0_PE);
}

/// PD entries of 4 MiB; the window by a page table and, 4 MiB further, by a large page.
fn paging_32(vm: &mut Vm, flags: u64) {
    protected(vm);
    clear_tables();
    let set = |page: usize, at: usize, entry: u64| {
        let (word, shift) = (page * 512 + at / 2, at % 2 * 32);
        PAGES.set(word, PAGES.get(word) & !(0xffff_ffff << shift) | entry << shift);
    };
    for at in 0..16 {
        set(DIRECTORY, at, (at as u64) << 22 | LARGE | PRESENT_WRITE_USER | 0x60);
    }
    let first = (LINEAR_32 >> 22) as usize;
    set(DIRECTORY, first, window_page(TABLE) | PRESENT_WRITE_USER | flags & 0x20);
    set(DIRECTORY, first + 1, WINDOW | LARGE | PRESENT_WRITE_USER | flags);
    for at in 0..TABLE {
        set(TABLE, at, window_page(at) | PRESENT_WRITE_USER | flags);
    }
    vm.or(GUEST_CR0, CR0_PG).set(GUEST_CR3, window_page(DIRECTORY));
    vm.clear(GUEST_CR4, CR4_PAE).or(GUEST_CR4, CR4_PSE);
}

/// PDPTE 3 leads to the window's directory: the window by a page table and, 2 MiB further, by a large page.
fn paging_pae(vm: &mut Vm, flags: u64) {
    protected(vm);
    window_directory(flags);
    PAGES.set(POINTERS * 512, nested_paging::first_page_directory() | 1);
    PAGES.set(POINTERS * 512 + 3, window_page(DIRECTORY) | 1);
    vm.or(GUEST_CR0, CR0_PG).set(GUEST_CR3, window_page(POINTERS));
    vm.set(GUEST_PDPTE0, nested_paging::first_page_directory() | 1).set(GUEST_PDPTE3, window_page(DIRECTORY) | 1);
}

/// PML4 entry 1 leads to the window's PDPT: a directory, and a page of 1 GiB.
fn paging_4_level(_: &mut Vm, flags: u64) {
    window_directory(flags);
    PAGES.set(POINTERS * 512, window_page(DIRECTORY) | PRESENT_WRITE_USER | flags & 0x20);
    PAGES.set(POINTERS * 512 + 1, WINDOW | LARGE | PRESENT_WRITE_USER | flags);
    nested_paging::set_guest_pml4(1, window_page(POINTERS) | PRESENT_WRITE_USER | flags & 0x20);
}

fn window_directory(flags: u64) {
    clear_tables();
    PAGES.set(DIRECTORY * 512, window_page(TABLE) | PRESENT_WRITE_USER | flags & 0x20);
    PAGES.set(DIRECTORY * 512 + 1, WINDOW | LARGE | PRESENT_WRITE_USER | flags);
    for at in 0..TABLE {
        PAGES.set(TABLE * 512 + at, window_page(at) | PRESENT_WRITE_USER | flags);
    }
}

/// MOV to CR3 and CR0 by a PAE guest loads PDPTEs from memory: through EPT12, and with checks (SDM 5.4.1 "PDPTE
/// Registers").
fn pdpte_loads(suite: &mut Suite) {
    let loads = [
        ("cr3", code_32!("mov cr3, ecx")),
        ("cr0", code_32!("mov eax, cr0", "xor eax, 0x40000000", "mov cr0, eax")),
        ("cr4", code_32!("mov eax, cr4", "xor eax, 0x80", "mov cr4, eax")),
    ];
    let mut case = |name: fmt::Arguments<'_>, code: u64, change: &dyn Fn(&mut Vm)| {
        let mut vm = Vm::new(code);
        paging_pae(&mut vm, 0x60);
        vm.registers.rcx = window_page(POINTERS);
        change(&mut vm);
        let _ = invept(2, [0; 2]);
        let verdict = vm.run();
        let loaded = [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3].map(|field| vm.get(field));
        suite.case(name, format_args!("{verdict} {loaded:x?}{Flags}"));
    };
    for (name, code) in loads {
        for rights in 0..8 {
            for dirty in [0, ACCESSED_DIRTY] {
                case(format_args!("pdpte-{name}-{rights:03b}-ad-{}", dirty >> 6), code, &|vm| {
                    vm.or(EPT_POINTER, dirty);
                    WINDOW_PT.set(POINTERS, WINDOW_PT.get(POINTERS) & !7 | rights);
                });
            }
        }
        for pdpte in [1, 3] {
            for bit in 0..64 {
                case(format_args!("pdpte-{name}-{pdpte}-bit-{bit}"), code, &|_| {
                    let at = POINTERS * 512 + pdpte;
                    PAGES.set(at, (window_page(DIRECTORY) | 1) ^ 1 << bit);
                });
            }
        }
    }
    // With EPT, VM entry loads the PDPTEs from VMCS12: the PDPT in memory is not read.
    case(format_args!("pdpte-entry-ignores-memory"), code_32!("mov cl, [eax]"), &|vm| {
        PAGES.set(POINTERS * 512 + 3, u64::MAX);
        WINDOW_PT.set(POINTERS, 0);
        vm.registers.rax = LINEAR_32 + TARGET as u64 * 4096;
    });
    legacy_entry(suite);
    pae_between_entries(suite);
}

/// A guest without EPT for which its hypervisor switches PAE on between two VMRESUMEs: entry loads the PDPTEs from
/// memory from then on (SDM 27.3.2.4 "Loading Page-Directory-Pointer-Table Entries").
fn pae_between_entries(suite: &mut Suite) {
    const PAGE_4M: u64 = 4 << 20;
    /// The last 2 MiB of the first GiB.
    const ELSEWHERE: u64 = (1 << 30) - (2 << 20);
    const PDPT: usize = 0;
    const DIRECTORY: usize = 1;
    let mut vm = Vm::new(code_32!("mov eax, [ecx]"));
    protected(&mut vm);
    vm.clear(SECONDARY_CONTROLS, Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST);
    vm.clear(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
    SPARE.fill(0);
    for at in 0..512 {
        let entry = |at: u64| (at * PAGE_4M) | LARGE | PRESENT_WRITE_USER | 0x60;
        SPARE.set(at as usize, entry(2 * at) | entry(2 * at + 1) << 32);
    }
    vm.or(GUEST_CR0, CR0_PG).set(GUEST_CR3, SPARE.address());
    vm.clear(GUEST_CR4, CR4_PAE).or(GUEST_CR4, CR4_PSE);
    OPERANDS.fill(0x5a5a);
    vm.registers.rcx = OPERANDS.address();
    for round in 0..4 {
        let verdict = vm.rerun();
        suite.case(format_args!("pae-before-{round}"), format_args!("{verdict} eax={:#x}", vm.registers.rax));
    }
    LONG_MSR_AREA.fill(0);
    LONG_MSR_AREA.set(PDPT * 512, (LONG_MSR_AREA.address() + DIRECTORY as u64 * 4096) | 1);
    for at in 0..511_u64 {
        LONG_MSR_AREA.set(DIRECTORY * 512 + at as usize, at << 21 | LARGE | PRESENT_WRITE_USER | 0x60);
    }
    let operands = OPERANDS.address();
    let page = operands & !((2 << 20) - 1);
    LONG_MSR_AREA.set(DIRECTORY * 512 + 511, page | LARGE | PRESENT_WRITE_USER | 0x60);
    vm.or(GUEST_CR4, CR4_PAE).set(GUEST_CR3, LONG_MSR_AREA.address());
    vm.registers.rcx = ELSEWHERE + (operands - page);
    for round in 0..2 {
        vm.registers.rax = 0;
        let verdict = vm.rerun();
        suite.case(format_args!("pae-after-{round}"), format_args!("{verdict} eax={:#x}", vm.registers.rax));
    }
}

/// A guest that disables paging and enables it again, after its tables are gone.
fn legacy_entry(suite: &mut Suite) {
    let code = code_32!("mov ecx, cr0", "and ecx, 0x7fffffff", "mov cr0, ecx", "mov cl, [eax]");
    for rights in 0..8 {
        let mut vm = Vm::new(code);
        paging_32(&mut vm, 0x60);
        vm.registers.rax = window_page(TARGET);
        WINDOW_PT.set(TARGET, WINDOW_PT.get(TARGET) & !7 | rights);
        vm.clear(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST);
        let _ = invept(2, [0; 2]);
        let verdict = vm.run();
        suite.case(format_args!("paging-off-{rights:03b}"), format_args!("{verdict}{Flags}"));
    }
}
