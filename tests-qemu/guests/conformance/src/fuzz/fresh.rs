//! The state that every program begins with, so that none depends on those before it.

use shadow::registers::CR4_VMXE;

use super::observe::Observer;
use super::{areas, snippets, tables};
use crate::apic;
use crate::cpu;
use crate::fault::{Outcome, take_interrupt, unblock_nmis};
use crate::memory::*;
use crate::minimal::enter_vmx_operation;
use crate::nested_paging::{self, GUEST_PT, PAGES, WINDOW_PAGES, WINDOW_PT};
use crate::smp::TAKEN;
use crate::vm::{prepare_host, revision};

/// Words of a page.
const PAGE: usize = 512;

/// The most pieces of memory, and words, that are restored.
const MOST_PIECES: usize = 48;
const MOST_WORDS: usize = 16 * PAGE;

static COPIES: Table<MOST_WORDS> = Table::new();

/// Who changes a piece of memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Changed {
    /// Steps alone.
    BySteps,
    /// The processor or a nested guest, too.
    ByAnyone,
}

/// A piece of memory that programs change.
#[derive(Clone, Copy)]
struct Piece {
    name: &'static str,
    address: u64,
    words: usize,
    changed: Changed,
    /// Where its copy begins, in words.
    copy: usize,
}

/// Pieces of memory, and what they hold at the beginning of a program.
pub struct Fresh {
    pieces: [Piece; MOST_PIECES],
    count: usize,
    words: usize,
}

impl Fresh {
    /// Fills all memory that programs use, and remembers what they change.
    pub fn new() -> Self {
        snippets::init();
        tables::init();
        areas::init();
        nested_paging::set_all_flags();
        OTHER_TSS_AREA.set(0, exception_stack() << 32);
        OTHER_TSS_AREA.set(1, DATA.into());
        let nothing = Piece { name: "", address: 0, words: 0, changed: Changed::BySteps, copy: 0 };
        let mut fresh = Self { pieces: [nothing; MOST_PIECES], count: 0, words: 0 };
        for number in 0..snippets::LOW_PAGES {
            fresh.add(Changed::ByAnyone, "low memory", snippets::low_page(number).address(), PAGE);
        }
        let pieces = [
            ("GDT", gdt_table().address(), 12),
            ("guest's TSS", GUEST_TSS_AREA.address(), 14),
            ("other TSS", OTHER_TSS_AREA.address(), 14),
            ("host's TSS", HOST_TSS_AREA.address(), 14),
            ("MSR areas", MSR_AREAS.address(), 0x110),
            ("virtual APIC", VIRTUAL_APIC.address(), PAGE),
            ("page log", MODIFICATION_LOG.address(), PAGE),
            ("posted interrupts", POSTED.address(), 16),
            ("stack", STACKS.address() + 0x3000, PAGE),
            ("EPT12", WINDOW_PT.address(), WINDOW_PAGES),
            ("guest's page table", GUEST_PT.address(), WINDOW_PAGES),
        ];
        for (name, address, words) in pieces {
            fresh.add(Changed::ByAnyone, name, address, words);
        }
        // Operands and stacks are at both ends of the pages.
        for page in 0..WINDOW_PAGES as u64 {
            let start = PAGES.address() + page * 4096;
            fresh.add(Changed::ByAnyone, "window", start, 16);
            fresh.add(Changed::ByAnyone, "window", start + 4096 - 32 * 8, 32);
        }
        fresh.add(Changed::BySteps, "MSR bitmap", MSR_BITMAPS.address(), PAGE);
        fresh.add(Changed::BySteps, "I/O bitmaps", IO_BITMAPS.address(), 2 * PAGE);
        fresh
    }

    fn add(&mut self, changed: Changed, name: &'static str, address: u64, words: usize) {
        let piece = Piece { name, address, words, changed, copy: self.words };
        copy(address, self.copy_of(piece), words);
        self.pieces[self.count] = piece;
        self.count += 1;
        self.words += words;
        assert!(self.words <= MOST_WORDS, "more memory than there are copies for");
    }

    fn copy_of(&self, piece: Piece) -> u64 {
        COPIES.address() + piece.copy as u64 * 8
    }

    /// Notes what the program has left behind, and restores everything. `has_edited` tells whether steps have changed
    /// what they alone change.
    pub fn end_of_program(&self, observer: &mut Observer, is_determined: bool, has_edited: bool) {
        prepare_host();
        unblock_nmis();
        observer.note("cr2", cpu::cr2());
        areas::restore(|msr, value| observer.note(format_args!("msr-{msr:#x}"), value));
        self.drain_events(observer);
        let mut has_changed = false;
        for &piece in &self.pieces[..self.count] {
            let Piece { name, address, words, changed, .. } = piece;
            if changed == Changed::BySteps && !has_edited || !differs(address, self.copy_of(piece), words) {
                continue;
            }
            if is_determined {
                observer.note(format_args!("{name} {address:#x}"), sum(address, words));
            }
            copy(self.copy_of(piece), address, words);
            has_changed = true;
        }
        // VMCLEAR may have written to it.
        SPARE.fill(0);
        if has_changed {
            forget_translations();
        }
    }

    /// Takes what is pending, and ends what is in service.
    fn drain_events(&self, observer: &mut Observer) {
        let _ = cpu::set_cr8(0);
        for _ in 0..4 {
            apic::end_of_interrupt();
        }
        while let Some(vector) = take_interrupt() {
            observer.note("pending interrupt", vector.into());
        }
        observer.note("NMIs", TAKEN.by(0, 2));
        TAKEN.forget(2);
    }
}

/// INVEPT and INVVPID of everything. Outside VMX operation they fault, and nothing is cached for a guest.
pub fn forget_translations() {
    let _ = cpu::invept(2, [0; 2]);
    let _ = cpu::invvpid(2, [0; 2]);
}

/// VMX operation with the usual VMXON region, and two clear VMCSs, none current.
pub fn begin() {
    let regions = [&VMCS, &OTHER_VMCS];
    let clear = |region: &Page| cpu::vmclear(region.address()) == Outcome::Success;
    let is_usual = cpu::cr4() & CR4_VMXE != 0 && regions.iter().all(|region| clear(region));
    if !is_usual {
        // A program has left VMX operation, or entered it again with a region that this one needs for a VMCS.
        let _ = cpu::vmxoff();
        let _ = enter_vmx_operation();
    }
    for region in regions {
        region.fill(0);
        region.set(0, revision());
        assert!(clear(region), "no VMCS can be made");
    }
}

fn word(address: u64, index: usize) -> u64 {
    // SAFETY: the callers' memory is the image's: its own pages, or the pages below 1 MiB.
    unsafe { core::ptr::with_exposed_provenance::<u64>(address as usize).add(index).read() }
}

/// Copies words.
fn copy(from: u64, to: u64, words: usize) {
    for index in 0..words {
        // SAFETY: as for `word`.
        unsafe {
            core::ptr::with_exposed_provenance_mut::<u64>(to as usize).add(index).write_volatile(word(from, index));
        }
    }
}

fn differs(memory: u64, copy: u64, words: usize) -> bool {
    (0..words).any(|index| word(memory, index) != word(copy, index))
}

/// A checksum.
fn sum(address: u64, words: usize) -> u64 {
    (0..words).fold(0_u64, |sum, index| sum.rotate_left(7).wrapping_add(word(address, index)))
}
