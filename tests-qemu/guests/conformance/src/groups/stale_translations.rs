//! Translations of the guest hypervisor's own that what it does has to end (SDM Volume 3A, 4.10.4.1 "Operations that
//! Invalidate TLBs and Paging-Structure Caches"; 29.4.3.1 "Operations that Invalidate Cached Mappings"): a page is
//! accessed, its entry leads elsewhere from then on, and the next access has to go there. Some of these operations are
//! exits under a host, which then has to invalidate as the processor does.

use core::fmt;

use shadow::caps::ept_vpid;
use shadow::controls::Primary;
use shadow::fields::*;
use shadow::msr::IA32_VMX_EPT_VPID_CAP;
use shadow::registers::{CR0_NE, CR0_PG, CR4_PCIDE, CR4_PGE, CR4_SMEP, CR4_VMXE};

use super::ept::LARGE;

use crate::arguments::has_memory_only;
use crate::attempt;
use crate::code;
use crate::cpu::*;
use crate::fault::Outcome;
use crate::memory::{Page, VMXON, WINDOW, host_cr3, poke, set_window};
use crate::nested_paging::{self, LEAF, PAGES, PDPT, WINDOW_PD, reset_guest};
use crate::output::Suite;
use crate::vm::{Vm, prepare_host};

const PAGE: usize = 5;
const LINEAR: u64 = WINDOW + PAGE as u64 * 4096;
const PRESENT_WRITE_USER: u64 = 7;
const GLOBAL: u64 = 1 << 8;

/// Entries after which a host has seen all there is: it may watch a bitmap for writes after a few.
const ENTRIES: u32 = 20;

static OLD: Page = Page::new();
static NEW: Page = Page::new();

/// All of them.
pub fn run(suite: &mut Suite) {
    OLD.set(0, 1);
    NEW.set(0, 2);
    in_operation(suite);
    transitions(suite);
    memory_becomes_bitmap(suite);
    page_in_place_of_tables(suite);
    many_epts(suite);
    let _ = vmxoff();
    outside_operation(suite);
    prepare_host();
    let _ = vmxon(VMXON.address());
    set_window(PAGE, 0);
    let _ = invlpg();
}

/// What an operation came to, and the page that the next access finds.
struct Found(Outcome, u64);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Nothing was invalidated.
            Self(outcome @ Outcome::Fault { .. }, _) => outcome.fmt(f),
            Self(outcome, page) => write!(f, "{outcome} page={page}"),
        }
    }
}

/// Accesses the page, moves it, and looks for it after `operation`.
fn find_after(flags: u64, operation: impl FnOnce() -> Outcome) -> Found {
    set_window(PAGE, OLD.address() | PRESENT_WRITE_USER | flags);
    let _ = invlpg();
    let _ = read();
    set_window(PAGE, NEW.address() | PRESENT_WRITE_USER | flags);
    let outcome = operation();
    Found(outcome, read())
}

fn read() -> u64 {
    let value;
    let _ = attempt!("mov rax, [rcx]"; in("rcx") LINEAR, out("rax") value);
    value
}

fn invlpg() -> Outcome {
    attempt!("invlpg [rcx]", "test rsp, rsp"; in("rcx") LINEAR)
}

fn in_operation(suite: &mut Suite) {
    suite.case("invlpg", find_after(0, invlpg));
    suite.case("invlpg-global", find_after(GLOBAL, invlpg));
    suite.case("mov-to-cr3", find_after(0, || set_cr3(host_cr3())));
    let old = cr4();
    for (name, before, changed) in CHANGES_OF_CR4 {
        let _ = set_cr4(old & !CR4_PCIDE | before);
        let found = find_after((before & CR4_PGE) << 1, || set_cr4(cr4() ^ changed));
        let _ = set_cr4(old);
        suite.case(format_args!("mov-to-cr4-{name}"), found);
    }
}

/// A nested guest without VPID: entry and exit invalidate what VPID 0000H has, its hypervisor's mappings.
fn transitions(suite: &mut Suite) {
    let code = code!("cpuid");
    let mut vm = Vm::without_vpid(code);
    vm.or(HOST_CR4, CR4_PGE);
    let _ = set_cr4(cr4() | CR4_PGE);
    // What a host does at the first entries only is no reason for anything later.
    (0..ENTRIES).for_each(|_| _ = vm.set(GUEST_RIP, code).run_again());
    for (name, activity) in [("entry-and-exit", 0), ("failed-entry", u32::MAX)] {
        for (kind, flags) in [("", 0), ("-global", GLOBAL)] {
            vm.set(GUEST_RIP, code).set(GUEST_ACTIVITY_STATE, activity);
            let transition = || {
                let _ = vm.run_again();
                Outcome::Success
            };
            suite.case(format_args!("{name}{kind}"), find_after(flags, transition));
        }
    }
    prepare_host();
}

/// The nested guest has a page as memory, which then becomes its MSR bitmap: what it writes there counts from the next
/// entry on.
fn memory_becomes_bitmap(suite: &mut Suite) {
    const MSR: u64 = 0x174;
    const IN_WINDOW: usize = 3;
    let (read_msr, write) = (code!("rdmsr"), code!("mov [rax], rdx"));
    let mut vm = Vm::new(write);
    let _ = invept(2, [0; 2]);
    PAGES.fill(0);
    let bitmap = PAGES.address() + IN_WINDOW as u64 * 4096;
    let at = nested_paging::WINDOW + IN_WINDOW as u64 * 4096 + MSR / 64 * 8;
    vm.registers.rax = at;
    suite.case("bitmap-as-memory", vm.run());
    vm.or(PRIMARY_CONTROLS, Primary::USE_MSR_BITMAPS).set(MSR_BITMAP, bitmap);
    vm.registers.rcx = MSR;
    for (round, bit) in [1, 0, 1].into_iter().enumerate() {
        vm.set_entry_point(read_msr);
        for _ in 0..ENTRIES {
            let _ = vm.rerun();
        }
        (vm.registers.rax, vm.registers.rdx) = (at, bit << (MSR % 64));
        vm.set_entry_point(write);
        suite.case(format_args!("bitmap-{round}-written"), vm.rerun());
        vm.set_entry_point(read_msr);
        suite.case(format_args!("bitmap-{round}-bit-{bit}"), vm.rerun());
    }
    reset_guest();
}

/// A page of 1 GiB takes the place of tables and leads where they led, without INVEPT: to addresses without memory,
/// where a host has pages as large. Only the translation of the address that is met next ends (SDM 29.4.3.1); what the
/// processor keeps of the tables stays true, unless a host has made something else of its own tables that correspond to
/// them. The other tables lead to memory.
fn page_in_place_of_tables(suite: &mut Suite) {
    const HAS_1_GIB: u64 = ept_vpid::PAGE_1G;
    const NESTED_GIB: usize = 2;
    const NOTHING: u64 = 2 << 30;
    const TABLES: u64 = 340 << 20;
    const OTHERS: u64 = 8;
    if has_memory_only() || rdmsr(IA32_VMX_EPT_VPID_CAP).is_ok_and(|has| has & HAS_1_GIB == 0) {
        return;
    }
    let [directory, first, second] = [0, 1, 2].map(|table| TABLES + table * 4096);
    let other = |table: u64| TABLES + (3 + table) * 4096;
    let memory = other(OTHERS);
    (0..512 * (4 + OTHERS)).for_each(|at| poke(TABLES + at * 8, 0));
    let mut vm = Vm::new(code!("mov rcx, [rax]"));
    poke(directory, first | 7);
    poke(directory + 8, second | 7);
    poke(first, NOTHING | LEAF);
    poke(memory, 0x1234);
    for page in 0..8 {
        poke(second + page * 8, (NOTHING + (2 << 20) + page * 4096) | LEAF);
        (0..OTHERS).for_each(|table| poke(other(table) + page * 8, memory | LEAF));
    }
    for table in 0..OTHERS {
        WINDOW_PD.set(1 + table as usize, other(table) | 7);
    }
    PDPT.set(NESTED_GIB, directory | 7);
    let _ = invept(2, [0; 2]);
    let mut read = |address: u64| {
        vm.registers.rax = address;
        let verdict = vm.rerun();
        (verdict, vm.registers.rcx)
    };
    let [first, second] = [0, 1].map(|region| ((NESTED_GIB as u64) << 30) + (region << 21));
    (0..ENTRIES).for_each(|_| _ = read(nested_paging::WINDOW));
    let _ = (read(first), read(second));
    PDPT.set(NESTED_GIB, NOTHING | LARGE | LEAF);
    let _ = read(first + 4096);
    (0..OTHERS).for_each(|table| _ = read(nested_paging::WINDOW + ((1 + table) << 21)));
    for page in 1..8 {
        let (verdict, found) = read(second + page * 4096);
        suite.case(format_args!("page-in-place-of-tables-{page}"), format_args!("{verdict} {found:#x}"));
    }
    PDPT.set(NESTED_GIB, 0);
    (0..OTHERS).for_each(|table| WINDOW_PD.set(1 + table as usize, 0));
    let _ = invept(2, [0; 2]);
}

/// More EPT12s in turn than a host may keep translations of: what it had of an earlier one must not serve a later one.
fn many_epts(suite: &mut Suite) {
    const EPTS: u64 = 264;
    const VARIANTS: u64 = 7;
    // A host that keeps few gives the tables of an earlier one to a later one in the first round, all others in the second.
    const ROUNDS: u64 = 2;
    const TABLES: u64 = 344 << 20;
    // PML4 table and PDPT of each; page directory, page table and page of each variant.
    let root = |number: u64| TABLES + number * 2 * 4096;
    let variant = |number: u64| root(EPTS) + number * 3 * 4096;
    (0..512 * (EPTS * 2 + VARIANTS * 3)).for_each(|at| poke(TABLES + at * 8, 0));
    for number in 0..VARIANTS {
        let [directory, table, page] = [0, 1, 2].map(|at| variant(number) + at * 4096);
        poke(directory, table | 7);
        poke(table, page | LEAF);
        poke(page, number);
    }
    for number in 0..EPTS {
        let pdpt = root(number) + 4096;
        poke(root(number), pdpt | 7);
        poke(pdpt, nested_paging::low_directory() | 7);
        poke(pdpt + 8, variant(number % VARIANTS) | 7);
    }
    let mut vm = Vm::new(code!("mov rcx, [rax]"));
    let _ = invept(2, [0; 2]);
    let mut right = 0;
    for number in (0..ROUNDS).flat_map(|_| 0..EPTS) {
        vm.set(EPT_POINTER, nested_paging::eptp() & 0xfff | root(number));
        vm.registers.rax = nested_paging::WINDOW;
        let _ = vm.rerun();
        right += u64::from(vm.registers.rcx == number % VARIANTS);
    }
    suite.case("many-epts", format_args!("{right} of {}", ROUNDS * EPTS));
}

/// Bits that are set before, and those that MOV to CR4 changes. A global page is one if CR4.PGE is set before.
const CHANGES_OF_CR4: [(&str, u64, u64); 4] = [
    ("sets-pge", 0, CR4_PGE),
    ("clears-pge", CR4_PGE, CR4_PGE),
    ("sets-smep", 0, CR4_SMEP),
    ("clears-pcide", CR4_PCIDE, CR4_PCIDE),
];

/// A host lets CR4.VMXE and CR0.NE not be what the guest hypervisor wants: changed with another bit, that bit's change
/// is the host's to do.
fn outside_operation(suite: &mut Suite) {
    let old = cr4();
    for (name, before, changed) in CHANGES_OF_CR4 {
        let _ = set_cr4(old & !CR4_PCIDE | before);
        let found = find_after((before & CR4_PGE) << 1, || set_cr4(cr4() ^ changed ^ CR4_VMXE));
        let _ = set_cr4(old);
        suite.case(format_args!("mov-to-cr4-{name}-and-changes-vmxe"), found);
    }
    let _ = set_cr4(old & !CR4_PCIDE | CR4_PGE);
    for (name, also) in [("clears-pg", 0), ("clears-pg-and-ne", CR0_NE)] {
        let found = find_after(GLOBAL, || {
            without_paging((cr0() & !CR0_PG & !also) as u32, cr0() as u32);
            Outcome::Success
        });
        suite.case(format_args!("mov-to-cr0-{name}"), found);
    }
    let _ = set_cr4(old);
}
