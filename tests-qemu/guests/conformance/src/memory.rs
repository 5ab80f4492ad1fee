//! Static memory: the tables that the processor reads, and the pages that cases access.
//!
//! ```text
//!   0                     4 GiB, identity, but for what each processor has of its own (smp/local.rs)
//!   USER                  the same 4 GiB for CPL 3
//!   WINDOW + n * 4 KiB    0 writable, 1 not present, 2 read-only, 3 reserved bit set
//! ```

use core::cell::UnsafeCell;

use crate::cpu;
use crate::smp::local;

/// Selector of 64-bit code.
pub const CODE: u16 = 0x08;
/// Selector of data.
pub const DATA: u16 = 0x10;
/// Selector of 32-bit code.
pub const CODE_32: u16 = 0x18;
/// Selector of the host's TSS.
pub const HOST_TSS: u16 = 0x20;
/// Selector of data for CPL 3.
pub const USER_DATA: u16 = 0x33;
/// Selector of 64-bit code for CPL 3.
pub const USER_CODE: u16 = 0x3b;
/// Selector of the nested guest's TSS.
pub const GUEST_TSS: u16 = 0x40;
/// Selector of a second TSS, 32-bit and available.
pub const OTHER_TSS: u16 = 0x50;

/// The address at which CPL 3 accesses the first 4 GiB.
pub const USER: u64 = 1 << 39;
/// Pages with one property each.
pub const WINDOW: u64 = USER + (4 << 30);

/// `N` quadwords at a page boundary, accessed by the processor behind the compiler's back.
#[repr(C, align(4096))]
pub struct Table<const N: usize>(UnsafeCell<[u64; N]>);

// SAFETY: each processor has its own tables, and exception handlers do not access them. The few tables that processors
// share are accessed a word at a time, and their groups say what makes a word's value certain, or that it is uncertain.
#[allow(unsafe_code, reason = "shared with the processor")]
unsafe impl<const N: usize> Sync for Table<N> {}

/// One page.
pub type Page = Table<512>;

impl<const N: usize> Table<N> {
    /// All zero.
    pub const fn new() -> Self {
        Self(UnsafeCell::new([0; N]))
    }

    /// Its address, physical and linear.
    pub fn address(&self) -> u64 {
        local::physical(self.0.get().addr() as u64)
    }

    fn pointer(&self, index: usize) -> *mut u64 {
        assert!(index < N, "outside the table");
        self.0.get().cast::<u64>().wrapping_add(index)
    }

    /// A quadword.
    pub fn get(&self, index: usize) -> u64 {
        // SAFETY: inside the table.
        unsafe { self.pointer(index).read_volatile() }
    }

    /// Changes a quadword.
    pub fn set(&self, index: usize, value: u64) {
        // SAFETY: inside the table.
        unsafe { self.pointer(index).write_volatile(value) }
    }

    /// Changes a byte.
    pub fn set_byte(&self, offset: usize, value: u8) {
        let shift = offset % 8 * 8;
        let word = self.get(offset / 8) & !(0xff << shift);
        self.set(offset / 8, word | u64::from(value) << shift);
    }

    /// Sets every quadword.
    pub fn fill(&self, value: u64) {
        for index in 0..N {
            self.set(index, value);
        }
    }

    /// A 64-bit interrupt gate.
    pub fn set_gate(&self, vector: usize, handler: u64, selector: u16) {
        const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
        let low =
            handler & 0xffff | u64::from(selector) << 16 | PRESENT_INTERRUPT_GATE | (handler >> 16 & 0xffff) << 48;
        self.set(2 * vector, low);
        self.set(2 * vector + 1, handler >> 32);
    }
}

/// The host's IDT.
pub static HOST_IDT: Page = Page::new();
/// The nested guest's IDT.
pub static GUEST_IDT: Page = Page::new();
/// The host's TSS.
pub static HOST_TSS_AREA: Page = Page::new();
/// The nested guest's TSS.
pub static GUEST_TSS_AREA: Page = Page::new();
/// A second TSS.
pub static OTHER_TSS_AREA: Page = Page::new();
/// Stack of CPL 0 for exceptions at CPL 3, and of the nested guest.
pub static STACKS: Table<2048> = Table::new();
/// VMXON region.
pub static VMXON: Page = Page::new();
/// The VMCS of most cases.
pub static VMCS: Page = Page::new();
/// Another VMCS.
pub static OTHER_VMCS: Page = Page::new();
/// I/O bitmaps A and B.
pub static IO_BITMAPS: Table<1024> = Table::new();
/// MSR bitmaps.
pub static MSR_BITMAPS: Page = Page::new();
/// Virtual-APIC page.
pub static VIRTUAL_APIC: Page = Page::new();
/// Page-modification log.
pub static MODIFICATION_LOG: Page = Page::new();
/// MSR area of 512 entries.
pub static LONG_MSR_AREA: Table<1024> = Table::new();
/// Posted-interrupt descriptor.
pub static POSTED: Page = Page::new();
/// A page that a control needs and no case reads.
pub static SPARE: Page = Page::new();
/// MSR areas: VM-exit store, VM-exit load, VM-entry load, a quarter page each.
pub static MSR_AREAS: Page = Page::new();
/// The page behind the writable and the read-only page of [`WINDOW`].
pub static OPERANDS: Page = Page::new();
static WINDOW_PD: Page = Page::new();
static WINDOW_PT: Page = Page::new();

/// The first address above the image that cases may use freely.
const FREE_MEMORY: u64 = 128 << 20;

/// A page for the processor to write to when a case changes one bit of its address: neither the page nor those that
/// differ from it in one bit are of the image.
pub const FAR_FROM_THE_IMAGE: u64 = 256 << 20;

fn free_memory(address: u64) -> *mut u64 {
    assert!(address >= FREE_MEMORY && address.is_multiple_of(8), "memory of the image");
    core::ptr::with_exposed_provenance_mut(address as usize)
}

/// A quadword of memory above the image.
pub fn peek(address: u64) -> u64 {
    // SAFETY: the address is mapped to itself, and no Rust object is there.
    unsafe { free_memory(address).read_volatile() }
}

/// Changes a quadword of memory above the image.
pub fn poke(address: u64, value: u64) {
    // SAFETY: as for `peek`.
    unsafe { free_memory(address).write_volatile(value) }
}

/// Top of the stack for exceptions at CPL 3.
pub fn exception_stack() -> u64 {
    STACKS.address() + 0x2000
}

/// Top of the nested guest's stack.
pub fn guest_stack() -> u64 {
    STACKS.address() + 0x4000 - 64
}

unsafe extern "C" {
    static gdt: Page;
    static host_pml4: Page;
    static user_pdpt: Page;
    static exception_vectors: u8;
    static nested_vectors: u8;
}

/// The GDT, for host and nested guest.
pub fn gdt_table() -> &'static Page {
    // SAFETY: boot.S defines it. It is shorter than a page, and no code goes beyond index 11.
    unsafe { &gdt }
}

/// CR3 of the host.
pub fn host_cr3() -> u64 {
    // SAFETY: boot.S defines it.
    unsafe { &host_pml4 }.address()
}

/// The nested guest's handler of vector 0. The handler of each further vector is 8 bytes higher.
pub fn nested_handlers() -> u64 {
    (&raw const nested_vectors).addr() as u64
}

/// Completes what boot.S began: descriptors, IDTs, the window.
pub fn init() {
    tss(HOST_TSS, &HOST_TSS_AREA, 0x89);
    tss(GUEST_TSS, &GUEST_TSS_AREA, 0x89);
    tss(OTHER_TSS, &OTHER_TSS_AREA, 0x89);
    gdt_table().set(usize::from(OTHER_TSS) / 8 + 1, 0x0000_8500_0050_0000);
    // RSP0 is at offset 4.
    let stack = exception_stack();
    for area in [&HOST_TSS_AREA, &GUEST_TSS_AREA] {
        area.set(0, stack << 32);
        area.set(1, stack >> 32);
    }
    crate::fault::fill_idt(&HOST_IDT, (&raw const exception_vectors).addr() as u64, 16);
    crate::fault::fill_idt(&GUEST_IDT, nested_handlers(), 8);
    cpu::load_tables(gdt_table().address(), HOST_IDT.address());
    cpu::load_task_register(HOST_TSS);
    window();
}

/// Loads TR with the host's TSS again.
pub fn reload_task_register() {
    tss(HOST_TSS, &HOST_TSS_AREA, 0x89);
    cpu::load_task_register(HOST_TSS);
}

/// Describes a TSS.
fn tss(selector: u16, area: &Page, kind: u64) {
    const LIMIT: u64 = 0x67;
    let base = area.address();
    let low = LIMIT | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56;
    gdt_table().set(usize::from(selector) / 8, low);
    gdt_table().set(usize::from(selector) / 8 + 1, base >> 32);
}

/// An entry of the page table of [`WINDOW`].
pub fn set_window(page: usize, entry: u64) {
    WINDOW_PT.set(page, entry);
}

fn window() {
    const PRESENT_WRITE_USER: u64 = 7;
    const RESERVED: u64 = 1 << 51;
    // SAFETY: boot.S defines it.
    unsafe { &user_pdpt }.set(4, WINDOW_PD.address() | PRESENT_WRITE_USER);
    WINDOW_PD.set(0, WINDOW_PT.address() | PRESENT_WRITE_USER);
    WINDOW_PT.set(0, OPERANDS.address() | PRESENT_WRITE_USER);
    WINDOW_PT.set(2, OPERANDS.address() | 5);
    WINDOW_PT.set(3, OPERANDS.address() | PRESENT_WRITE_USER | RESERVED);
}
