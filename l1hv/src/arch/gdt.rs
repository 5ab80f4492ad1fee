//! The host's segments: one code and one data segment, and a TSS that names the stacks of the exceptions that need their own.

use core::cell::UnsafeCell;

use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::SegmentSelector;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use super::idt;

/// What the VMCS's host-state area takes: after a VM exit the processor runs with these again.
#[derive(Clone, Copy, Debug)]
pub struct HostSegments {
    /// Selector of the 64-bit code segment.
    pub cs: u16,
    /// Selector of the data segment in SS, DS and ES.
    pub data: u16,
    /// Selector of the TSS. FS and GS are null.
    pub tr: u16,
    /// Linear address of the TSS.
    pub tr_base: u64,
    /// Linear address of the GDT.
    pub gdt_base: u64,
    /// Linear address of the IDT.
    pub idt_base: u64,
}

/// The interrupt stacks, in the order of the TSS's interrupt stack table (IST 1 and up).
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum InterruptStack {
    /// An NMI may come at any instruction.
    Nmi = 0,
    /// A double fault is most likely an overflow of the current stack.
    DoubleFault = 1,
    /// A machine check may come at any instruction.
    MachineCheck = 2,
}

const INTERRUPT_STACKS: usize = 3;
const INTERRUPT_STACK_BYTES: usize = 16 * 1024;

#[repr(C, align(16))]
struct Stack([u8; INTERRUPT_STACK_BYTES]);

struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
}

struct TablesCell(UnsafeCell<Tables>);

// SAFETY: written once by `init`, before there is a second cpu or an exception; only the processor reads them afterwards.
unsafe impl Sync for TablesCell {}

static TABLES: TablesCell =
    TablesCell(UnsafeCell::new(Tables { gdt: GlobalDescriptorTable::empty(), tss: TaskStateSegment::new() }));

struct StacksCell(UnsafeCell<[Stack; INTERRUPT_STACKS]>);

// SAFETY: only the processor uses them, one exception each.
unsafe impl Sync for StacksCell {}

static STACKS: StacksCell =
    StacksCell(UnsafeCell::new([const { Stack([0; INTERRUPT_STACK_BYTES]) }; INTERRUPT_STACKS]));

/// Loads the host's own GDT, TSS and IDT in place of the boot code's. Called once.
pub fn init() -> HostSegments {
    // SAFETY: the only call, and nothing else touches the cell.
    let tables: &'static mut Tables = unsafe { &mut *TABLES.0.get() };
    let stacks = STACKS.0.get().addr() as u64;
    for i in 0..INTERRUPT_STACKS {
        // By index: the TSS is packed, so its entries cannot be borrowed.
        tables.tss.interrupt_stack_table[i] = VirtAddr::new(stacks) + ((i + 1) * INTERRUPT_STACK_BYTES) as u64;
    }
    let tr_base = (&raw const tables.tss).addr() as u64;
    let code = tables.gdt.append(Descriptor::kernel_code_segment());
    let data = tables.gdt.append(Descriptor::kernel_data_segment());
    let tss = tables.gdt.append(Descriptor::tss_segment(&tables.tss));
    tables.gdt.load();
    let null = SegmentSelector::NULL;
    // SAFETY: the selectors are those of the table just loaded, flat segments like the ones before; the TSS lives for ever.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        FS::set_reg(null);
        GS::set_reg(null);
        load_tss(tss);
    }
    let idt_base = idt::init(code);
    let gdt_base = x86_64::instructions::tables::sgdt().base.as_u64();
    HostSegments { cs: code.0, data: data.0, tr: tss.0, tr_base, gdt_base, idt_base }
}
