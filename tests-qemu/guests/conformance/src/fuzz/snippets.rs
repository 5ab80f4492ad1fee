//! What nested guests of random programs execute (snippets.S), and the memory below 1 MiB that they use:
//!
//! ```text
//!   9000H  snippets of 16-bit, 32-bit and 64-bit code
//!   A800H  interrupt-vector table of real mode
//!   AC00H  operands
//!   B000H  IDT of 32-bit protected mode
//!   B800H  stack of 16-bit modes
//! ```

use core::arch::global_asm;
use core::ops::Range;

use crate::memory::{CODE_32, Page};

global_asm!(include_str!("snippets.S"), options(att_syntax));

/// The first page of the memory.
pub const LOW: u64 = 0x9000;
/// Its pages.
pub const LOW_PAGES: usize = 3;
/// The interrupt-vector table of real mode.
pub const VECTOR_TABLE: u64 = 0xa800;
/// Operands that every mode reaches.
pub const LOW_OPERANDS: u64 = 0xac00;
/// The IDT of 32-bit protected mode.
pub const IDT_32: u64 = 0xb000;
/// The stack pointer of 16-bit modes.
pub const STACK_16: u64 = 0xbff0;

/// Bytes of each snippet.
const SLOT: u64 = 32;

/// What an instruction takes from the registers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// Nothing, or any value.
    Any,
    /// Nothing; EDX:EAX is the time.
    Time,
    /// An MSR in ECX that can be read.
    ReadMsr,
    /// An MSR in ECX, and a value in EDX:EAX.
    WriteMsr,
    /// A port in DX.
    Port,
    /// A port in DX, memory at DI and SI, and a count in CX.
    String,
    /// A value for CR0 in EAX.
    Cr0,
    /// A value for CR3 in EAX.
    Cr3,
    /// A value for CR4 in EAX.
    Cr4,
    /// Memory at EDX.
    Memory,
    /// A selector in AX.
    Selector,
    /// The encoding of a field in ECX, or EAX.
    Field,
}

/// A snippet's name and operand, in the order of snippets.S.
pub const SNIPPETS: [(&str, Operand); 56] = {
    use Operand::*;
    [
        ("nop", Any),
        ("cpuid", Any),
        ("hlt", Any),
        ("pause", Any),
        ("rdmsr", ReadMsr),
        ("wrmsr", WriteMsr),
        ("in al, dx", Port),
        ("out dx, al", Port),
        ("insb", String),
        ("rep outsd", String),
        ("mov rax, cr0", Any),
        ("mov cr0, rax", Cr0),
        ("mov rax, cr3", Any),
        ("mov cr3, rax", Cr3),
        ("mov rax, cr4", Any),
        ("mov cr4, rax", Cr4),
        ("mov cr8, rax", Any),
        ("mov rax, cr8", Any),
        ("clts", Any),
        ("lmsw ax", Cr0),
        ("smsw ax", Any),
        ("mov dr7, rax", Any),
        ("invlpg [rdx]", Memory),
        ("invd", Any),
        ("wbinvd", Any),
        ("int3", Any),
        ("int 0x21", Any),
        ("ud2", Any),
        ("rdtsc", Time),
        ("rdpmc", Any),
        ("mov eax, [rdx]", Memory),
        ("mov [rdx], eax", Memory),
        ("lock inc dword [rdx]", Memory),
        ("jmp rdx", Memory),
        ("push rax", Any),
        ("sgdt [rdx]", Memory),
        ("lidt [rdx]", Memory),
        ("str ax", Any),
        ("ltr ax", Selector),
        ("sti; nop", Any),
        ("mov ss, ax; nop", Selector),
        ("int1", Any),
        ("div by 0", Any),
        ("vmptrst [rdx]", Memory),
        ("vmread rax, rcx", Field),
        ("vmfunc", Any),
        ("xsetbv", Any),
        ("sysenter", Any),
        ("syscall", Any),
        ("swapgs", Any),
        ("invpcid rax, [rdx]", Memory),
        ("vmwrite rcx, rax", Field),
        ("popf", Any),
        ("mov ds, ax", Selector),
        ("cpuid; cpuid; cpuid", Any),
        ("sti; hlt", Any),
    ]
};

/// The width of code.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 16 bits.
    W16,
    /// 32 bits.
    W32,
    /// 64 bits.
    W64,
}

/// The linear address of a snippet in a flat code segment.
pub fn address(snippet: usize, width: Width) -> u64 {
    LOW + (width as u64 * SNIPPETS.len() as u64 + snippet as u64) * SLOT
}

/// Whether the snippet around a linear address reads the time.
pub fn reads_time(linear: u64) -> bool {
    let slot = linear.wrapping_sub(LOW) / SLOT;
    slot < SNIPPETS.len() as u64 * 3 && SNIPPETS[slot as usize % SNIPPETS.len()].1 == Operand::Time
}

unsafe extern "C" {
    static fuzz_snippets: Page;
    static fuzz_snippets_end: u8;
}

/// A page below 1 MiB.
pub fn low_page(number: usize) -> &'static Page {
    assert!(number < LOW_PAGES, "not one of the pages");
    // SAFETY: the page is mapped to itself, and neither loader nor image has anything there.
    unsafe { &*core::ptr::with_exposed_provenance(LOW as usize + number * 4096) }
}

fn set(address: u64, word: u64) {
    let offset = (address - LOW) as usize;
    low_page(offset / 4096).set(offset % 4096 / 8, word);
}

/// The memory around, but for an interrupt-vector table at 0: a nested guest in real mode that goes astray gets there.
const AROUND: [Range<u64>; 2] = [0x400..0x8000, LOW + LOW_PAGES as u64 * 4096..0x9_f000];

/// Fills the memory. What firmware and loader left around it depends on time and host; HLT takes its place.
pub fn init() {
    // SAFETY: no firmware runs any more, and the loader's information has been copied.
    let set_around = |address: u64, word: u64| unsafe {
        core::ptr::with_exposed_provenance_mut::<u64>(address as usize).write_volatile(word);
    };
    for address in AROUND.into_iter().flat_map(|range| range.step_by(8)) {
        set_around(address, 0xf4f4_f4f4_f4f4_f4f4);
    }
    for page in 0..LOW_PAGES {
        low_page(page).fill(0);
    }
    let (first, end) = (&raw const fuzz_snippets, (&raw const fuzz_snippets_end).addr());
    let bytes = SLOT as usize * SNIPPETS.len() * 3;
    assert!(end - first.addr() == bytes, "the snippets are not those of the list");
    for offset in (0..bytes).step_by(8) {
        // SAFETY: between the two symbols.
        set(LOW + offset as u64, unsafe { first.cast::<u8>().add(offset).cast::<u64>().read() });
    }
    let (real, protected) = (address(0, Width::W16), address(0, Width::W32));
    for vector in (0..256).step_by(2) {
        let pointer = LOW << 12 | (real - LOW);
        let pointers = pointer | pointer << 32;
        set(VECTOR_TABLE + vector * 4, pointers);
        set_around(vector * 4, pointers);
    }
    const PRESENT_INTERRUPT_GATE: u64 = 0x8e00 << 32;
    for vector in 0..256 {
        let gate = protected | u64::from(CODE_32) << 16 | PRESENT_INTERRUPT_GATE;
        set(IDT_32 + vector * 8, gate);
    }
    for word in 0..64 {
        set(LOW_OPERANDS + word * 8, crate::nested_paging::VMCALL);
    }
}
