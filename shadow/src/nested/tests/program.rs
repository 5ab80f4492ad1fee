//! Programs of a hypervisor: VMX instructions, changes of its memory and registers, and what its guests do.

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;
use proptest::sample::select;

use super::processor::{Guest, Step};
use crate::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use crate::exit::ExitReason;
use crate::fake::{Ram, VMXON_REGION, skylake_caps};
use crate::fields::*;
use crate::hw::GuestMemory;
use crate::msr::{Access, IA32_FEATURE_CONTROL, IA32_FS_BASE, bitmap_bit};
use crate::registers::{CR0_PE, CR0_PG, CR4_PAE, CR4_VMXE, EFER_LMA, EFER_LME, access_rights};
use crate::vmcs12::SHADOW_INDICATOR;
use crate::{Field, caps::Policy};
use ept::Gpa;

pub const VMCS_REGIONS: [u64; 2] = [0x5000, 0x6000];
const MSR_BITMAPS: [u64; 2] = [0x8000, 0x9000];
/// EPT12s: PML4, PDPT, PD and page table, page after page.
const EPTS: [u64; 2] = [0x1_0000, 0x2_0000];
const EPTPS: [u64; 2] = [EPTS[0] | 0x1e, EPTS[1] | 0x5e];
const ENTRY_LOAD: u64 = 0x4_0000;
const EXIT_STORE: u64 = 0x4_1000;
const EXIT_LOAD: u64 = 0x4_2000;

const IA32_STAR: u32 = 0xc000_0081;
const IA32_LSTAR: u32 = 0xc000_0082;

/// One operation of the hypervisor.
#[derive(Clone, Debug)]
pub enum Op {
    /// VMWRITE.
    Write(FieldId, u64),
    /// VMREAD.
    Read(FieldId),
    /// VMPTRLD of one of [`VMCS_REGIONS`].
    Load(usize),
    /// VMCLEAR.
    Clear(usize),
    /// VMLAUNCH, or VMRESUME if true.
    Enter(bool, Guest),
    /// A store to memory.
    Store(u64, u64),
    /// INVEPT.
    Invept(Option<u64>),
    /// Another instruction, which writes a register.
    Change(FieldId, u64),
    /// The host drops what it has derived from EPT12s. No hypervisor can notice.
    HostFlush,
}

/// A program: the prologue, and then its operations.
#[derive(Clone, Debug)]
pub struct Program(pub Vec<Op>);

/// The initial memory of all programs.
pub fn memory() -> Ram {
    let ram = Ram::with_paging();
    let put = |at: u64, word: u64| ram.write_u64(Gpa(at), word);
    for region in [VMXON_REGION, VMCS_REGIONS[0], VMCS_REGIONS[1]] {
        ram.write_u32(Gpa(region), Policy::EVERYTHING.revision & !SHADOW_INDICATOR);
    }
    for ept in EPTS {
        for (table, below) in [(ept, ept + 0x1000), (ept + 0x1000, ept + 0x2000), (ept + 0x2000, ept + 0x3000)] {
            put(table, below | 7);
        }
    }
    for (area, value) in [(ENTRY_LOAD, 1), (EXIT_STORE, 0), (EXIT_LOAD, 3)] {
        for (number, msr) in (0..).zip([IA32_STAR, IA32_LSTAR]) {
            put(area + number * 16, msr.into());
            put(area + number * 16 + 8, value + number);
        }
    }
    // The third entry of the load area is one that VM entry refuses.
    put(ENTRY_LOAD + 32, IA32_FS_BASE.into());
    ram
}

fn word<T: FieldValue>(field: Field<T>, value: T) -> (FieldId, u64) {
    (field.id(), value.into_word())
}

fn pin() -> Vec<(FieldId, u64)> {
    let base = Pin::from_bits_retain(skylake_caps().pin.must_be_1);
    [
        Pin::empty(),
        Pin::NMI_EXITING,
        Pin::NMI_EXITING | Pin::VIRTUAL_NMIS,
        Pin::NMI_EXITING | Pin::VIRTUAL_NMIS | Pin::ACTIVATE_PREEMPTION_TIMER,
    ]
    .map(|controls| word(PIN_CONTROLS, base | controls))
    .to_vec()
}

fn primary() -> Vec<(FieldId, u64)> {
    let base = Primary::from_bits_retain(skylake_caps().primary.must_be_1) | Primary::ACTIVATE_SECONDARY;
    [Primary::USE_MSR_BITMAPS, Primary::empty()].map(|controls| word(PRIMARY_CONTROLS, base | controls)).to_vec()
}

fn secondary() -> Vec<(FieldId, u64)> {
    let ept = Secondary::ENABLE_EPT | Secondary::UNRESTRICTED_GUEST;
    [ept | Secondary::ENABLE_VPID, ept, Secondary::ENABLE_VPID, Secondary::UNRESTRICTED_GUEST]
        .map(|controls| word(SECONDARY_CONTROLS, controls))
        .to_vec()
}

fn exit() -> Vec<(FieldId, u64)> {
    let base = ExitControls::from_bits_retain(skylake_caps().exit.must_be_1) | ExitControls::HOST_ADDRESS_SPACE_SIZE;
    let loads = ExitControls::LOAD_PAT | ExitControls::LOAD_EFER;
    let saves = ExitControls::SAVE_PAT | ExitControls::SAVE_EFER;
    [
        loads | saves,
        loads,
        saves,
        loads | saves | ExitControls::SAVE_PREEMPTION_TIMER,
        ExitControls::LOAD_EFER | ExitControls::SAVE_PAT,
    ]
    .map(|controls| word(EXIT_CONTROLS, base | controls))
    .to_vec()
}

/// VM-entry controls of a 64-bit guest, and `controls` besides.
pub fn entry_controls(controls: EntryControls) -> u64 {
    let base = EntryControls::from_bits_retain(skylake_caps().entry.must_be_1) | EntryControls::IA32E_MODE_GUEST;
    (base | controls).bits().into()
}

fn entry() -> Vec<(FieldId, u64)> {
    let all = EntryControls::LOAD_PAT | EntryControls::LOAD_EFER | EntryControls::LOAD_DEBUG_CONTROLS;
    [all, EntryControls::LOAD_PAT, EntryControls::LOAD_EFER | EntryControls::LOAD_DEBUG_CONTROLS]
        .map(|controls| (ENTRY_CONTROLS.id(), entry_controls(controls)))
        .to_vec()
}

/// A VMCS with which a nested guest runs: exits take the short way.
fn template(ept: usize) -> Vec<(FieldId, u64)> {
    let host_cr0 = CR0_PE | CR0_PG | 0x20;
    let mut fields = vec![pin()[2], primary()[0], secondary()[0], exit()[0], entry()[0]];
    fields.extend([
        word(EPT_POINTER, EPTPS[ept]),
        word(VPID, 1 + ept as u16),
        word(MSR_BITMAP, MSR_BITMAPS[ept]),
        word(VMCS_LINK_POINTER, u64::MAX),
        word(ENTRY_MSR_LOAD_ADDRESS, ENTRY_LOAD),
        word(EXIT_MSR_STORE_ADDRESS, EXIT_STORE),
        word(EXIT_MSR_LOAD_ADDRESS, EXIT_LOAD),
        word(HOST_CR0, host_cr0),
        word(HOST_CR3, Ram::PML4),
        word(HOST_CR4, CR4_PAE | CR4_VMXE),
        word(HOST_EFER, EFER_LME | EFER_LMA),
        word(HOST_PAT, 0x0007_0406_0007_0406),
        word(HOST_CS_SELECTOR, 0x10),
        word(HOST_SS_SELECTOR, 0x18),
        word(HOST_TR_SELECTOR, 0x40),
        word(HOST_RIP, 0xffff_8000_0000_1000),
        word(HOST_RSP, 0xffff_8000_0000_2000),
        word(GUEST_CR0, host_cr0),
        word(GUEST_CR4, CR4_PAE | CR4_VMXE),
        word(GUEST_EFER, EFER_LME | EFER_LMA),
        word(GUEST_PAT, 0x0007_0406_0007_0406),
        word(GUEST_RFLAGS, 2),
        word(GUEST_RIP, 0x10_0000),
        word(GUEST_CS_ACCESS_RIGHTS, access_rights::CODE_64),
    ]);
    fields
}

/// The operations at the start of every program: they build two VMCSs and leave the first one current.
pub fn prologue() -> Vec<Op> {
    [1, 0]
        .into_iter()
        .flat_map(|number| {
            let writes = template(number).into_iter().map(|(id, value)| Op::Write(id, value));
            [Op::Clear(number), Op::Load(number)].into_iter().chain(writes)
        })
        .collect()
}

/// VMWRITEs of meaningful values, some of them wrong.
fn writes() -> Vec<(FieldId, u64)> {
    const NON_CANONICAL: u64 = 1 << 62;
    let mut all = [pin(), primary(), secondary(), exit(), entry()].concat();
    all.extend([
        word(EXCEPTION_BITMAP, 0x4000),
        word(EXCEPTION_BITMAP, 0),
        word(TSC_OFFSET, 7),
        word(GUEST_RIP, 0x1234),
        word(GUEST_RSP, 0x9999),
        word(GUEST_RFLAGS, 0x202),
        word(GUEST_RFLAGS, 0),
        word(GUEST_RFLAGS, 2),
        word(GUEST_RFLAGS, 2),
        word(GUEST_TR_BASE, 0x3000),
        word(GUEST_CR3, 0x1_2000),
        word(GUEST_DR7, 0x401),
        word(GUEST_DEBUGCTL, 1),
        word(GUEST_PAT, 0x0606_0606_0606_0606),
        word(GUEST_SYSENTER_EIP, 0x77),
        word(GUEST_INTERRUPTIBILITY, 0),
        word(GUEST_INTERRUPTIBILITY, 8),
        word(HOST_RIP, 0x4444),
        word(HOST_FS_BASE, 0x1_0000),
        word(HOST_FS_BASE, NON_CANONICAL),
        word(HOST_FS_BASE, 0x2_0000),
        word(HOST_GDTR_BASE, 0x3_0000),
        word(HOST_IDTR_BASE, 0x3_1000),
        word(HOST_SYSENTER_EIP, 0x3_2000),
        word(HOST_PAT, 0x0606_0606_0606_0606),
        word(HOST_ES_SELECTOR, 0x18),
        word(HOST_ES_SELECTOR, 0),
        word(HOST_TR_SELECTOR, 0),
        word(HOST_TR_SELECTOR, 0x40),
        word(HOST_TR_SELECTOR, 0x48),
        word(EPT_POINTER, EPTPS[0]),
        word(EPT_POINTER, EPTPS[1]),
        word(EPT_POINTER, 0x1_0000),
        word(VPID, 2),
        word(VPID, 3),
        word(VPID, 0),
        word(MSR_BITMAP, MSR_BITMAPS[0]),
        word(MSR_BITMAP, MSR_BITMAPS[1]),
        word(ENTRY_MSR_LOAD_COUNT, 0),
        word(ENTRY_MSR_LOAD_COUNT, 2),
        word(ENTRY_MSR_LOAD_COUNT, 3),
        word(EXIT_MSR_STORE_COUNT, 0),
        word(EXIT_MSR_STORE_COUNT, 2),
        word(EXIT_MSR_LOAD_COUNT, 0),
        word(EXIT_MSR_LOAD_COUNT, 1),
        word(PREEMPTION_TIMER_VALUE, 1000),
        word(ENTRY_EXCEPTION_ERROR_CODE, 0x10),
        word(ENTRY_INSTRUCTION_LENGTH, 2),
        word(CR0_READ_SHADOW, 0x21),
        word(CR4_GUEST_HOST_MASK, 0x2000),
    ]);
    all.extend(injections());
    all
}

/// Interruption information: an interrupt, #PF, an NMI, INT n, and one of the reserved type.
fn injections() -> Vec<(FieldId, u64)> {
    [0x8000_0030, 0x8000_0b0e, 0x8000_0202, 0x8000_0480, 0x8000_0130]
        .map(|info| word(ENTRY_INTERRUPTION_INFO, info))
        .to_vec()
}

/// Values with which a nested guest can run, more often than with those of [`writes`].
fn good_writes() -> Vec<(FieldId, u64)> {
    template(0).into_iter().chain(template(1)).chain(injections().into_iter().take(4)).collect()
}

fn changes() -> Vec<(FieldId, u64)> {
    vec![
        word(GUEST_GDTR_BASE, 0x5_0000),
        word(GUEST_IDTR_BASE, 0x5_1000),
        word(GUEST_TR_BASE, 0x5_2000),
        word(GUEST_DR7, 0x455),
        word(GUEST_PAT, 0x0101_0101_0101_0101),
        word(GUEST_SYSENTER_EIP, 0x5_3000),
        word(GUEST_DEBUGCTL, 2),
    ]
}

/// A page of the nested guest. There are few pages, so that programs return to them. Without EPT12 the first two are
/// the hypervisor's MSR bitmaps.
fn page() -> impl Strategy<Value = u64> {
    select(vec![MSR_BITMAPS[0] >> 12, MSR_BITMAPS[1] >> 12, 0x30, 0x31, 0x32])
}

fn step() -> impl Strategy<Value = Step> {
    let registers = vec![
        word(GUEST_RIP, 0x20_0000),
        word(GUEST_TR_BASE, 0x6_0000),
        word(GUEST_CR3, 0x7_0000),
        word(GUEST_PAT, 0x0505_0505_0505_0505),
        word(GUEST_DR7, 0x477),
        word(GUEST_INTERRUPTIBILITY, 0),
    ];
    let exits = vec![
        Step::Exit(ExitReason::CPUID, 0),
        Step::Exit(ExitReason::VMCALL, 0),
        Step::Exit(ExitReason::IO_INSTRUCTION, 0x70_0000),
        Step::Exit(ExitReason::EXTERNAL_INTERRUPT, 0),
        Step::Exception(14),
        Step::Exception(3),
    ];
    prop_oneof![
        3 => select(registers).prop_map(|(id, value)| Step::Set(id, value)),
        4 => (page(), select(vec![None, Some(0), Some(u64::MAX)]))
            .prop_map(|(page, write)| Step::Touch { page, write }),
        2 => select(vec![IA32_FEATURE_CONTROL, IA32_STAR, IA32_LSTAR, 0x4000_0000]).prop_map(Step::Rdmsr),
        2 => select(exits),
        1 => Just(Step::Nmi),
        1 => Just(Step::Kick),
    ]
}

fn guest() -> impl Strategy<Value = Guest> {
    (prop::collection::vec(step(), 0..6), prop::option::of(page()), prop::bool::weighted(0.1))
        .prop_map(|(steps, stack, nmi)| Guest { steps, stack, nmi })
}

/// An edit of an EPT12 with the INVEPT that it needs, if it takes rights away.
fn edit() -> impl Strategy<Value = Vec<Op>> {
    let rights = select(vec![7_u64, 3, 1, 5, 0, 2, 7, 7]);
    // The hypervisor lends its guests its MSR bitmaps, too.
    let frame = select(vec![0x8_0000, 0x8_1000, 0x8_2000, MSR_BITMAPS[0], MSR_BITMAPS[1]]);
    (0_usize..2, page(), rights, frame, any::<bool>()).prop_map(|(ept, page, rights, frame, all)| {
        let entry = if rights == 0 { 0 } else { frame | 6 << 3 | rights };
        let at = EPTS[ept] + 0x3000 + page * 8;
        vec![Op::Store(at, entry), Op::Invept((!all).then_some(EPTPS[ept]))]
    })
}

fn bitmap_edit() -> impl Strategy<Value = Vec<Op>> {
    let (byte, bit) = bitmap_bit(IA32_FEATURE_CONTROL, Access::Read).expect("it is in the bitmap");
    let star = bitmap_bit(IA32_STAR, Access::Read).expect("it is in the bitmap");
    let at = select(vec![(byte, bit), star]);
    (0_usize..2, at, any::<bool>()).prop_map(|(which, (byte, bit), set)| {
        let address = MSR_BITMAPS[which] + (byte as u64 & !7);
        vec![Op::Store(address, if set { 1 << (byte % 8 * 8 + bit as usize) } else { 0 })]
    })
}

fn readable() -> Vec<FieldId> {
    skylake_caps().offered(&Policy::EVERYTHING).fields().iter().collect()
}

/// Operations that belong together.
fn phrase() -> impl Strategy<Value = Vec<Op>> {
    prop_oneof![
        4 => select(writes()).prop_map(|(id, value)| vec![Op::Write(id, value)]),
        4 => select(good_writes()).prop_map(|(id, value)| vec![Op::Write(id, value)]),
        2 => select(readable()).prop_map(|id| vec![Op::Read(id)]),
        2 => select(vec![GUEST_RIP.id(), EXIT_REASON.id(), GUEST_TR_BASE.id(), ENTRY_INTERRUPTION_INFO.id()])
            .prop_map(|id| vec![Op::Read(id)]),
        1 => (0_usize..2).prop_map(|number| vec![Op::Load(number)]),
        1 => (0_usize..2).prop_map(|number| vec![Op::Clear(number), Op::Load(number)]),
        10 => (any::<bool>(), guest(), guest())
            .prop_map(|(first, one, two)| vec![Op::Enter(!first, one), Op::Enter(true, two)]),
        4 => edit(),
        2 => bitmap_edit(),
        2 => select(changes()).prop_map(|(id, value)| vec![Op::Change(id, value)]),
        1 => Just(vec![Op::HostFlush]),
    ]
}

/// Random programs.
pub fn program() -> impl Strategy<Value = Program> {
    prop::collection::vec(phrase(), 1..40).prop_map(|phrases| Program(phrases.concat()))
}
