//! Task switches of the guest hypervisor by hardware, in 32-bit protected mode outside VMX operation (SDM Volume 3A,
//! chapter 8 "Task Management"): what begins them, and what can be wrong with the new task.

use core::arch::global_asm;
use core::fmt;

use crate::apic;
use crate::cpu::{cr0, cr2};
use crate::fault::unblock_nmis;
use crate::memory::{Page, reload_task_register};
use crate::output::Suite;
use crate::smp;

global_asm!(include_str!("task_switches/tasks.S"), options(att_syntax));

/// The address of a label of tasks.S.
macro_rules! label {
    ($label:ident) => {{
        unsafe extern "C" {
            static $label: u8;
        }
        (&raw const $label).addr() as u32
    }};
}

/// The mode in which a switch begins, as tasks.S reads it.
#[repr(C, packed)]
struct Mode {
    cr0: u32,
    cr3: u32,
    cr4: u32,
    esp: u32,
    gdt_limit: u16,
    gdt: u64,
    padding: [u8; 6],
    idt_limit: u16,
    idt: u64,
}

unsafe extern "C" {
    fn run_task(code: u32, mode: *const Mode);
    static task_record: [u32; RECORD];
}

/// Words that tasks.S records.
const RECORD: usize = 32;

static GDT: Page = Page::new();
static IDT: Page = Page::new();
static LOCAL_TABLE: Page = Page::new();
static OLD_TSS: Page = Page::new();
static NEW_TSS: Page = Page::new();
static LAST_TSS: Page = Page::new();
static OLD_STACK: Page = Page::new();
static NEW_STACK: Page = Page::new();
/// Page directories, and the page table of the 4 MiB around the pages above, for the old and the new task.
static DIRECTORIES: [Page; 2] = [const { Page::new() }; 2];
static PAGE_TABLES: [Page; 2] = [const { Page::new() }; 2];

/// Selectors. Those of the old task, the new ones, the task gate, 64-bit code and the last task are in tasks.S, too.
mod selector {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CONFORMING: u16 = 0x18;
    pub const OLD: u16 = 0x20;
    pub const NEW: u16 = 0x28;
    pub const NEW_16: u16 = 0x30;
    pub const LDT: u16 = 0x38;
    pub const GATE: u16 = 0x40;
    pub const USER_CODE: u16 = 0x4b;
    pub const USER_DATA: u16 = 0x53;
    pub const ABSENT_DATA: u16 = 0x58;
    pub const ABSENT_CODE: u16 = 0x60;
    pub const READ_ONLY: u16 = 0x68;
    pub const EXECUTE_ONLY: u16 = 0x70;
    pub const SHORT_CODE: u16 = 0x78;
    pub const ABSENT_LDT: u16 = 0x80;
    pub const SHORT_STACK: u16 = 0x8b;
    pub const CODE_64: u16 = 0x90;
    pub const LAST: u16 = 0x98;
    pub const CODE_OF_16: u16 = 0xa0;
    pub const STACK_OF_16: u16 = 0xa8;
    pub const UNTOUCHED_CODE: u16 = 0xb0;
    pub const UNTOUCHED_DATA: u16 = 0xb8;
    /// In the LDT.
    pub const IN_LDT: u16 = 0x0c;
    pub const BEYOND: u16 = 0x200;
}
use selector::*;

const GDT_LIMIT: u16 = 0xbf;
/// The page that a task in virtual-8086 mode runs in.
const LOW_PAGE: u32 = 0x9000;

/// Offsets in a 32-bit TSS.
mod at {
    pub const LINK: usize = 0;
    pub const ESP0: usize = 4;
    pub const SS0: usize = 8;
    pub const CR3: usize = 0x1c;
    pub const EIP: usize = 0x20;
    pub const EFLAGS: usize = 0x24;
    pub const EAX: usize = 0x28;
    pub const ESP: usize = 0x38;
    pub const ES: usize = 0x48;
    pub const CS: usize = 0x4c;
    pub const SS: usize = 0x50;
    pub const DS: usize = 0x54;
    pub const FS: usize = 0x58;
    pub const GS: usize = 0x5c;
    pub const LDT: usize = 0x60;
    pub const TRAP: usize = 0x64;
}

fn put(page: &Page, offset: usize, value: u32) {
    for (index, byte) in value.to_le_bytes().into_iter().enumerate() {
        page.set_byte(offset + index, byte);
    }
}

fn get(page: &Page, offset: usize) -> u32 {
    (page.get(offset / 8) >> (offset % 8 * 8)) as u32
}

/// A descriptor. `flags` are bits 55:52: G, D/B, L.
fn describe(selector: u16, base: u32, limit: u32, access: u8, flags: u8) {
    let (base, limit) = (u64::from(base), u64::from(limit));
    let low = limit & 0xffff | (base & 0xff_ffff) << 16 | u64::from(access) << 40;
    let high = (limit >> 16 & 0xf) << 48 | u64::from(flags) << 52 | (base >> 24) << 56;
    GDT.set(usize::from(selector / 8), low | high);
}

fn address(page: &Page) -> u32 {
    page.address() as u32
}

fn stack_top(page: &Page) -> u32 {
    address(page) + 0xf00
}

/// Makes the gate of a vector a task gate to the new task.
fn task_gate(vector: usize) {
    IDT.set(vector, 0x0000_e500_0000_0000 | u64::from(NEW) << 16);
}

/// Everything as the plainest switch needs it.
fn prepare() {
    const FLAT: u32 = 0xf_ffff;
    const BIG_GRANULAR: u8 = 0xc;
    for page in [&GDT, &IDT, &LOCAL_TABLE, &OLD_TSS, &NEW_TSS, &LAST_TSS, &OLD_STACK, &NEW_STACK] {
        page.fill(0);
    }
    describe(CODE, 0, FLAT, 0x9b, BIG_GRANULAR);
    describe(DATA, 0, FLAT, 0x93, BIG_GRANULAR);
    describe(CONFORMING, 0, FLAT, 0x9f, BIG_GRANULAR);
    describe(OLD, address(&OLD_TSS), 0x67, 0x89, 0);
    describe(NEW, address(&NEW_TSS), 0x67, 0x89, 0);
    describe(NEW_16, address(&NEW_TSS), 0x2b, 0x81, 0);
    describe(LDT, address(&LOCAL_TABLE), 0xf, 0x82, 0);
    GDT.set(usize::from(GATE / 8), 0x0000_e500_0000_0000 | u64::from(NEW) << 16);
    describe(USER_CODE, 0, FLAT, 0xfb, BIG_GRANULAR);
    describe(USER_DATA, 0, FLAT, 0xf3, BIG_GRANULAR);
    describe(ABSENT_DATA, 0, FLAT, 0x13, BIG_GRANULAR);
    describe(ABSENT_CODE, 0, FLAT, 0x1b, BIG_GRANULAR);
    describe(READ_ONLY, 0, FLAT, 0x91, BIG_GRANULAR);
    describe(EXECUTE_ONLY, 0, FLAT, 0x99, BIG_GRANULAR);
    describe(SHORT_CODE, 0, 0xfff, 0x9b, 4);
    describe(ABSENT_LDT, address(&LOCAL_TABLE), 0xf, 0x02, 0);
    describe(SHORT_STACK, 0, 0xfff, 0xf3, 4);
    describe(CODE_64, 0, FLAT, 0x9b, 0xa);
    describe(LAST, address(&LAST_TSS), 0x67, 0x89, 0);
    describe(CODE_OF_16, label!(task_arrived), FLAT, 0x9b, BIG_GRANULAR);
    describe(STACK_OF_16, address(&NEW_STACK), 0xfff, 0x93, 0);
    describe(UNTOUCHED_CODE, 0, FLAT, 0x9a, BIG_GRANULAR);
    describe(UNTOUCHED_DATA, 0, FLAT, 0x92, BIG_GRANULAR);
    LOCAL_TABLE.set(usize::from(IN_LDT / 8), GDT.get(usize::from(DATA / 8)));
    for vector in 0..0x31 {
        let handler = u64::from(label!(task_vectors)) + 16 * vector as u64;
        let kind = if vector == 0x30 { 0xee00 } else { 0x8e00 };
        IDT.set(vector, handler & 0xffff | u64::from(CODE) << 16 | kind << 32 | (handler >> 16) << 48);
    }
    put(&NEW_TSS, at::ESP0, stack_top(&OLD_STACK));
    put(&NEW_TSS, at::SS0, DATA.into());
    put(&NEW_TSS, at::CR3, address(&DIRECTORIES[0]));
    put(&NEW_TSS, at::EIP, label!(task_arrived));
    put(&NEW_TSS, at::EFLAGS, 2);
    for number in 0..8 {
        put(&NEW_TSS, at::EAX + 4 * number, 0x0a0a_0a00 + number as u32);
    }
    put(&NEW_TSS, at::ESP, stack_top(&NEW_STACK));
    for (offset, selector) in [(at::ES, DATA), (at::CS, CODE), (at::SS, DATA), (at::DS, DATA), (at::FS, DATA)] {
        put(&NEW_TSS, offset, selector.into());
    }
    map();
}

/// Maps the first 4 GiB to themselves, for both tasks.
fn map() {
    const PRESENT_WRITE_LARGE: u32 = 0x83;
    const PRESENT_WRITE: u32 = 3;
    /// Nothing is here, and nobody else looks for something here.
    const ABSENT: u32 = 0xfff0_0000;
    let region = address(&NEW_TSS) & !0x3f_ffff;
    for (directory, table) in DIRECTORIES.iter().zip(&PAGE_TABLES) {
        for index in 0..1024 {
            put(directory, 4 * index, (index as u32) << 22 | PRESENT_WRITE_LARGE);
            put(table, 4 * index, (region + ((index as u32) << 12)) | PRESENT_WRITE);
        }
        put(directory, (region >> 22) as usize * 4, address(table) | PRESENT_WRITE);
        put(directory, (ABSENT >> 22) as usize * 4, 0);
    }
}

/// Changes the flags of a page in the old task's page table, or the new one's.
fn remap(task: usize, page: &Page, flags: u32) {
    move_page(task, page, page, flags);
}

/// Puts another page at the place of a page.
fn move_page(task: usize, page: &Page, other: &Page, flags: u32) {
    put(&PAGE_TABLES[task], (address(page) >> 12 & 0x3ff) as usize * 4, address(other) | flags);
}

const READ_ONLY_PAGE: u32 = 1;
const ABSENT_PAGE: u32 = 0;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Paging {
    Off,
    On,
}

/// A name, what begins the switch, and what is not plain about it.
type Case = (&'static str, fn() -> u32, fn());

/// A 16-bit task in place of the new one.
fn sixteen_bits() {
    NEW_TSS.fill(0);
    let put_word = |offset: usize, value: u16| {
        NEW_TSS.set_byte(offset, value as u8);
        NEW_TSS.set_byte(offset + 1, (value >> 8) as u8);
    };
    put_word(0x10, 2);
    for number in 0..8 {
        put_word(0x12 + 2 * number, 0x1a00 + number as u16);
    }
    put_word(0x1a, 0xf00);
    for (offset, selector) in [(0x22, DATA), (0x24, CODE_OF_16), (0x26, STACK_OF_16), (0x28, DATA)] {
        put_word(offset, selector);
    }
}

/// The new task has a selector in this place.
macro_rules! with {
    ($offset:ident = $value:expr) => {
        || put(&NEW_TSS, at::$offset, u32::from($value))
    };
}

/// A program of tasks.S.
macro_rules! program {
    ($label:ident) => {
        || label!($label)
    };
}

fn plain() {}

fn as_user() {
    put(&NEW_TSS, at::CS, USER_CODE.into());
    for offset in [at::SS, at::DS, at::ES, at::FS] {
        put(&NEW_TSS, offset, USER_DATA.into());
    }
    put(&NEW_TSS, at::EIP, label!(task_arrived_as_user));
}

fn in_virtual_8086_mode() {
    const VM: u32 = 1 << 17;
    const IOPL_3: u32 = 3 << 12;
    put(&NEW_TSS, at::EFLAGS, VM | IOPL_3 | 2);
    put(&NEW_TSS, at::EIP, 0);
    put(&NEW_TSS, at::ESP, 0x800);
    for offset in [at::CS, at::SS, at::DS, at::ES, at::FS, at::GS] {
        put(&NEW_TSS, offset, LOW_PAGE >> 4);
    }
}

/// The old task returns to the new one.
fn nested() {
    put(&OLD_TSS, at::LINK, NEW.into());
    describe(NEW, address(&NEW_TSS), 0x67, 0x8b, 0);
}

/// A task at privilege level 3 gets an error code on a page with these flags.
fn error_code_for_user(flags: u32) {
    const PRESENT_WRITE_USER: u32 = 7;
    as_user();
    task_gate(13);
    put(&NEW_TSS, at::CR3, address(&DIRECTORIES[1]));
    put(&NEW_TSS, at::ESP, stack_top(&NEW_STACK));
    for index in 0..1024 {
        put(&DIRECTORIES[1], 4 * index, get(&DIRECTORIES[1], 4 * index) | PRESENT_WRITE_USER);
        put(&PAGE_TABLES[1], 4 * index, get(&PAGE_TABLES[1], 4 * index) | PRESENT_WRITE_USER);
    }
    remap(1, &NEW_STACK, flags);
}

const BEGINNINGS: &[Case] = &[
    ("jump", program!(task_jump), plain),
    ("call", program!(task_call), plain),
    ("jump-gate", program!(task_jump_gate), plain),
    ("call-gate", program!(task_call_gate), plain),
    ("indirect-jump", program!(task_indirect_jump), plain),
    ("call-and-return", program!(task_call), || put(&NEW_TSS, at::EIP, label!(task_returns))),
    ("call-and-return-twice", program!(task_call_twice), || put(&NEW_TSS, at::EIP, label!(task_returns))),
    ("int", program!(task_int), || task_gate(0x21)),
    ("int-and-return", program!(task_int), || {
        task_gate(0x21);
        put(&NEW_TSS, at::EIP, label!(task_returns));
    }),
    ("int3", program!(task_int3), || task_gate(3)),
    ("exception", program!(task_ud), || task_gate(6)),
    ("exception-with-error-code", program!(task_gp), || task_gate(13)),
    ("double-fault", program!(task_gp), || {
        IDT.set(13, 0);
        task_gate(8);
    }),
    ("return", program!(task_return), nested),
    ("nmi", program!(task_nmi), || task_gate(2)),
    ("interrupt", program!(task_interrupt), || task_gate(0x22)),
    ("jump-while-stepping", program!(task_jump_stepping), plain),
];

const NEW_TASKS: &[Case] = &[
    ("ldt", program!(task_jump), with!(LDT = LDT)),
    ("ldt-for-data", program!(task_jump), || {
        put(&NEW_TSS, at::LDT, LDT.into());
        put(&NEW_TSS, at::ES, IN_LDT.into());
    }),
    ("ldt-in-ldt", program!(task_jump), with!(LDT = IN_LDT)),
    ("ldt-beyond", program!(task_jump), with!(LDT = BEYOND)),
    ("ldt-is-data", program!(task_jump), with!(LDT = DATA)),
    ("ldt-is-tss", program!(task_call), with!(LDT = OLD)),
    ("ldt-not-present", program!(task_jump), with!(LDT = ABSENT_LDT)),
    ("ss-null", program!(task_jump), with!(SS = 0_u16)),
    ("ss-beyond", program!(task_jump), with!(SS = BEYOND)),
    ("ss-in-no-ldt", program!(task_jump), with!(SS = IN_LDT)),
    ("ss-read-only", program!(task_jump), with!(SS = READ_ONLY)),
    ("ss-code", program!(task_jump), with!(SS = CODE)),
    ("ss-tss", program!(task_jump), with!(SS = OLD)),
    ("ss-not-present", program!(task_jump), with!(SS = ABSENT_DATA)),
    ("ss-user", program!(task_jump), with!(SS = USER_DATA)),
    ("ss-rpl", program!(task_jump), with!(SS = DATA | 1)),
    ("ds-null", program!(task_jump), with!(DS = 3_u16)),
    ("ds-beyond", program!(task_jump), with!(DS = BEYOND)),
    ("ds-execute-only", program!(task_jump), with!(DS = EXECUTE_ONLY)),
    ("ds-read-only", program!(task_jump), with!(DS = READ_ONLY)),
    ("ds-tss", program!(task_jump), with!(DS = NEW)),
    ("ds-not-present", program!(task_jump), with!(DS = ABSENT_DATA)),
    ("es-rpl", program!(task_jump), with!(ES = DATA | 3)),
    ("es-conforming", program!(task_jump), with!(ES = CONFORMING | 3)),
    ("fs-user", program!(task_jump), with!(FS = USER_DATA)),
    ("gs-code", program!(task_jump), with!(GS = CODE)),
    ("gs-in-no-ldt", program!(task_int), || {
        task_gate(0x21);
        put(&NEW_TSS, at::GS, IN_LDT.into());
    }),
    ("cs-null", program!(task_jump), with!(CS = 0_u16)),
    ("cs-beyond", program!(task_jump), with!(CS = BEYOND)),
    ("cs-data", program!(task_jump), with!(CS = DATA)),
    ("cs-not-present", program!(task_jump), with!(CS = ABSENT_CODE)),
    ("cs-conforming", program!(task_jump), with!(CS = CONFORMING)),
    ("cs-rpl", program!(task_jump), with!(CS = CODE | 1)),
    ("cs-user", program!(task_jump), with!(CS = USER_CODE)),
    ("cs-in-no-ldt-after-exception", program!(task_ud), || {
        task_gate(6);
        put(&NEW_TSS, at::CS, IN_LDT.into());
    }),
    ("eip-beyond", program!(task_jump), with!(CS = SHORT_CODE)),
    ("untouched-segments", program!(task_jump), || {
        put(&NEW_TSS, at::CS, UNTOUCHED_CODE.into());
        put(&NEW_TSS, at::SS, UNTOUCHED_DATA.into());
    }),
    ("error-code-on-short-stack", program!(task_gp), || {
        as_user();
        task_gate(13);
        put(&NEW_TSS, at::SS, SHORT_STACK.into());
    }),
    ("user", program!(task_jump), as_user),
    ("user-called", program!(task_call), as_user),
    ("virtual-8086", program!(task_jump), in_virtual_8086_mode),
    ("virtual-8086-with-bad-ldt", program!(task_jump), || {
        in_virtual_8086_mode();
        put(&NEW_TSS, at::LDT, DATA.into());
    }),
    ("trap", program!(task_jump), with!(TRAP = 1_u16)),
    ("trap-called", program!(task_call), with!(TRAP = 1_u16)),
    ("flags-step", program!(task_jump), with!(EFLAGS = 0x102_u16)),
    ("flags-nested", program!(task_jump), with!(EFLAGS = 0x4002_u16)),
    ("flags-all", program!(task_jump), || put(&NEW_TSS, at::EFLAGS, 0xffdc_fcff)),
    ("new-limit", program!(task_jump), || describe(NEW, address(&NEW_TSS), 0x66, 0x89, 0)),
    ("new-busy", program!(task_jump), || describe(NEW, address(&NEW_TSS), 0x67, 0x8b, 0)),
    ("old-limit", program!(task_jump), || describe(OLD, address(&OLD_TSS), 0x5e, 0x89, 0)),
    ("old-limit-of-exception", program!(task_ud), || {
        describe(OLD, address(&OLD_TSS), 0x5e, 0x89, 0);
        task_gate(6);
    }),
];

/// Tasks with 16-bit TSSs.
const SIXTEEN_BITS: &[Case] = &[
    ("jump-to-16", program!(task_jump_16), sixteen_bits),
    ("call-to-16", program!(task_call_16), sixteen_bits),
    ("call-to-16-and-return", program!(task_call_16), || {
        sixteen_bits();
        describe(CODE_OF_16, label!(task_returns), 0xf_ffff, 0x9b, 0xc);
    }),
    ("exception-to-16-with-error-code", program!(task_gp), || {
        sixteen_bits();
        IDT.set(13, 0x0000_e500_0000_0000 | u64::from(NEW_16) << 16);
    }),
    ("old-is-16", program!(task_jump), || describe(OLD, address(&OLD_TSS), 0x2b, 0x81, 0)),
];

const PAGED: &[Case] = &[
    ("jump", program!(task_jump), plain),
    ("other-cr3", program!(task_call), || put(&NEW_TSS, at::CR3, address(&DIRECTORIES[1]) | 0x18)),
    ("other-cr3-and-return", program!(task_call), || {
        put(&NEW_TSS, at::CR3, address(&DIRECTORIES[1]));
        put(&OLD_TSS, at::CR3, address(&DIRECTORIES[0]));
        put(&NEW_TSS, at::EIP, label!(task_returns));
    }),
    ("other-cr3-with-another-stack", program!(task_indirect_jump), || {
        put(&NEW_TSS, at::CR3, address(&DIRECTORIES[1]));
        put(&NEW_TSS, at::ESP, stack_top(&OLD_STACK));
        move_page(1, &OLD_STACK, &NEW_STACK, 3);
    }),
    ("page-fault", program!(task_page_fault), || task_gate(14)),
    ("new-absent", program!(task_jump), || remap(0, &NEW_TSS, ABSENT_PAGE)),
    ("new-read-only", program!(task_jump), || remap(0, &NEW_TSS, READ_ONLY_PAGE)),
    ("new-read-only-called", program!(task_call), || remap(0, &NEW_TSS, READ_ONLY_PAGE)),
    ("old-read-only", program!(task_jump), || remap(0, &OLD_TSS, READ_ONLY_PAGE)),
    ("old-read-only-for-exception", program!(task_ud), || {
        task_gate(6);
        remap(0, &OLD_TSS, READ_ONLY_PAGE);
    }),
    ("old-read-only-for-page-fault", program!(task_page_fault), || {
        task_gate(14);
        remap(0, &OLD_TSS, READ_ONLY_PAGE);
    }),
    ("ldt-absent-in-new", program!(task_jump), || {
        put(&NEW_TSS, at::CR3, address(&DIRECTORIES[1]));
        put(&NEW_TSS, at::LDT, LDT.into());
        put(&NEW_TSS, at::DS, IN_LDT.into());
        remap(1, &LOCAL_TABLE, ABSENT_PAGE);
    }),
    ("error-code-on-absent-stack", program!(task_gp), || error_code_for_user(ABSENT_PAGE)),
    ("error-code-on-supervisors-stack", program!(task_gp), || error_code_for_user(3)),
    ("error-code-on-read-only-stack", program!(task_gp), || error_code_for_user(5)),
    ("error-code-on-users-stack", program!(task_gp), || error_code_for_user(7)),
];

/// Runs the cases of 32-bit tasks.
pub fn run(suite: &mut Suite) {
    run_cases(suite, &[("by", Paging::Off, BEGINNINGS), ("to", Paging::Off, NEW_TASKS), ("paged", Paging::On, PAGED)]);
}

/// Runs the cases of 16-bit tasks.
pub fn run_16(suite: &mut Suite) {
    run_cases(suite, &[("16", Paging::Off, SIXTEEN_BITS)]);
}

/// Runs cases. Without paging a processor sees the first one's memory, and not its own.
fn run_cases(suite: &mut Suite, kinds: &[(&str, Paging, &[Case])]) {
    if smp::number() != 0 {
        return;
    }
    for &(kind, paging, cases) in kinds {
        for (name, program, change) in cases {
            prepare();
            change();
            switch(program(), paging);
            suite.case(format_args!("{kind}-{name}"), Found(paging));
        }
    }
    reload_task_register();
}

/// Runs a program to the end.
fn switch(program: u32, paging: Paging) {
    const PROTECTED: u64 = 0x33;
    const WRITE_PROTECT: u64 = 1 << 16;
    const PAGING: u64 = 1 << 31;
    const PAGE_SIZE_EXTENSIONS: u32 = 1 << 4;
    let low_page = core::ptr::with_exposed_provenance_mut::<[u8; 3]>(LOW_PAGE as usize);
    let code = core::ptr::with_exposed_provenance::<[u8; 3]>(label!(task_in_virtual_8086_mode) as usize);
    let paged = if paging == Paging::On { PAGING | WRITE_PROTECT } else { 0 };
    let mode = Mode {
        cr0: (cr0() & PROTECTED | paged) as u32,
        cr3: address(&DIRECTORIES[0]),
        cr4: PAGE_SIZE_EXTENSIONS,
        esp: stack_top(&OLD_STACK),
        gdt_limit: GDT_LIMIT,
        gdt: GDT.address(),
        padding: [0; 6],
        idt_limit: 0x31 * 8 - 1,
        idt: IDT.address(),
    };
    // SAFETY: nothing else uses the low page meanwhile. tasks.S ends each program with the state that it began with.
    unsafe {
        let before = low_page.read_volatile();
        low_page.write_volatile(code.read());
        run_task(program, &raw const mode);
        low_page.write_volatile(before);
    }
    unblock_nmis();
    apic::end_of_interrupt();
}

/// What a case leaves behind.
struct Found(Paging);

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 13] =
            ["dr7", "dr6", "cr3", "cr0", "ldt", "tr", "cs", "ss", "gs", "fs", "es", "ds", "eflags"];
        const VECTOR: usize = 21;
        // SAFETY: tasks.S does not run.
        let words = unsafe { (&raw const task_record).read_volatile() };
        write!(f, "at {:#x}", words[VECTOR])?;
        for (name, word) in NAMES.into_iter().zip(words) {
            write!(f, " {name}={word:x}")?;
        }
        f.write_str(" registers")?;
        words[NAMES.len()..VECTOR].iter().try_for_each(|word| write!(f, " {word:x}"))?;
        f.write_str(" stack")?;
        words[VECTOR + 1..].iter().try_for_each(|word| write!(f, " {word:x}"))?;
        write!(f, " old eip={:x} eflags={:x}", get(&OLD_TSS, at::EIP), get(&OLD_TSS, at::EFLAGS))?;
        write!(f, " sums {:x} {:x}", sum(&OLD_TSS), sum(&NEW_TSS))?;
        write!(f, " link={:x}", get(&NEW_TSS, at::LINK))?;
        if self.0 == Paging::On {
            write!(f, " cr2={:x} stacks {:x} {:x}", cr2(), sum(&OLD_STACK), sum(&NEW_STACK))?;
        }
        f.write_str(" types")?;
        [OLD, NEW, NEW_16, UNTOUCHED_CODE, UNTOUCHED_DATA, SHORT_CODE]
            .iter()
            .try_for_each(|selector| write!(f, " {:x}", GDT.get(usize::from(selector / 8)) >> 40 & 0xff))
    }
}

/// A sum over a page in which each word's place counts.
fn sum(page: &Page) -> u64 {
    (0..512).fold(0, |sum: u64, index| sum.rotate_left(7) ^ page.get(index))
}
