//! The host's segments: one code and one data segment, and a TSS that names the stacks of the exceptions that need
//! their own.

use core::cell::UnsafeCell;

use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::model_specific::GsBase;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use super::idt::{self, InterruptStack};
use crate::mem::{HostPages, PAGE_BYTES};
use crate::processor::Processor;

/// Values for the VMCS's host-state area, which the processor loads at every VM exit.
#[derive(Clone, Copy, Debug)]
pub struct HostSegments {
    /// Selector of the 64-bit code segment.
    pub cs: u16,
    /// Selector of the data segment in SS, DS and ES.
    pub data: u16,
    /// Selector of the TSS. FS and GS are null.
    pub tr: u16,
    /// The base of GS: the address of the [`Processor`].
    pub gs_base: u64,
    /// Linear address of the TSS.
    pub tr_base: u64,
    /// Linear address of the GDT.
    pub gdt_base: u64,
    /// Linear address of the IDT.
    pub idt_base: u64,
}

const INTERRUPT_STACK_BYTES: usize = 16 * 1024;

#[repr(C, align(16))]
struct Stack([u8; INTERRUPT_STACK_BYTES]);

struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
}

impl Tables {
    const fn new() -> Self {
        Self { gdt: GlobalDescriptorTable::empty(), tss: TaskStateSegment::new() }
    }
}

/// The tables and stacks of one processor.
struct Area {
    tables: Tables,
    stacks: [Stack; InterruptStack::COUNT],
}

/// The number of pages that [`init_on`] needs.
pub const AREA_PAGES: u64 = (size_of::<Area>() as u64).div_ceil(PAGE_BYTES);

struct AreaCell(UnsafeCell<Area>);

// SAFETY: only the boot processor uses the area, and its Rust code accesses it only in `init`.
unsafe impl Sync for AreaCell {}

static BOOT_AREA: AreaCell = AreaCell(UnsafeCell::new(Area {
    tables: Tables::new(),
    stacks: [const { Stack([0; INTERRUPT_STACK_BYTES]) }; InterruptStack::COUNT],
}));

/// The boot processor's `Processor` until all processors are known. It only counts NMIs.
static BOOT_PROCESSOR: Processor = Processor::new(0);

/// Loads the boot processor's own GDT, TSS and IDT in place of the boot code's. Called once.
pub fn init() -> HostSegments {
    // SAFETY: the only call, and nothing else touches the cell.
    let area: &'static mut Area = unsafe { &mut *BOOT_AREA.0.get() };
    load(area, &BOOT_PROCESSOR, Idt::Fill)
}

/// Gives the boot processor its final `Processor` among all processors.
pub fn move_boot_processor(segments: HostSegments, processor: &'static Processor) -> HostSegments {
    processor.request(BOOT_PROCESSOR.take_requests());
    let gs_base = processor.address();
    GsBase::write(VirtAddr::new_truncate(gs_base));
    HostSegments { gs_base, ..segments }
}

/// Loads GDT, TSS and IDT of another processor. `area` has [`AREA_PAGES`].
pub fn init_on(area: HostPages, processor: &'static Processor) -> HostSegments {
    assert!(area.bytes() >= size_of::<Area>() as u64, "area too small");
    let place = area.as_mut_ptr().cast::<Area>();
    // SAFETY: the pages are owned, large enough, and zeroed, which is a valid content of stacks.
    let area = unsafe {
        (&raw mut (*place).tables).write(Tables::new());
        &mut *place
    };
    load(area, processor, Idt::IsFilled)
}

/// Whether the gates, which all processors share, are still to be filled.
enum Idt {
    Fill,
    IsFilled,
}

fn load(area: &'static mut Area, processor: &'static Processor, idt: Idt) -> HostSegments {
    let Area { tables, stacks } = area;
    for (number, stack) in stacks.iter().enumerate() {
        // By index: the TSS is packed, so its entries cannot be borrowed.
        tables.tss.interrupt_stack_table[number] = VirtAddr::from_ptr(stack) + INTERRUPT_STACK_BYTES as u64;
    }
    let tr_base = (&raw const tables.tss).addr() as u64;
    let code = tables.gdt.append(Descriptor::kernel_code_segment());
    let data = tables.gdt.append(Descriptor::kernel_data_segment());
    let tss = tables.gdt.append(Descriptor::tss_segment(&tables.tss));
    tables.gdt.load();
    let null = SegmentSelector::NULL;
    // SAFETY: the selectors are those of the table just loaded, flat segments like the ones before; the TSS lives for
    // ever.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        FS::set_reg(null);
        GS::set_reg(null);
        load_tss(tss);
    }
    let gs_base = processor.address();
    GsBase::write(VirtAddr::new_truncate(gs_base));
    let idt_base = match idt {
        Idt::Fill => idt::fill(code),
        Idt::IsFilled => idt::load(),
    };
    let gdt_base = x86_64::instructions::tables::sgdt().base.as_u64();
    HostSegments { cs: code.0, data: data.0, tr: tss.0, gs_base, tr_base, gdt_base, idt_base }
}
