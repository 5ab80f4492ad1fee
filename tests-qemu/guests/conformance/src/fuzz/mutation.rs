//! Random values for the fields of a VMCS.
//!
//! A bare machine must survive every entry and every exit, so that fields that decide where the exit goes, and what the
//! processor writes to, get only values with which it does: the image's own pages, and addresses that no entry accepts.

use shadow::VmxCaps;
use shadow::controls::*;
use shadow::fields::*;
use shadow::registers::GUEST_SEGMENTS;

use super::areas;
use super::modes::{Mode, SYSTEM_SEGMENTS};
use super::snippets::{SNIPPETS, VECTOR_TABLE};
use super::state::{State, written};
use super::tables;
use crate::memory::*;
use crate::nested_paging::{self, LINEAR, WINDOW};
use crate::random::Random;

/// Addresses on both sides of what is canonical.
const CANONICAL: [u64; 6] = [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, 0xffff_ffff_ffff_f000, 1 << 33, 0x1234_5678];

/// Interrupt vectors.
const VECTORS: [u64; 12] = [0, 1, 2, 3, 6, 8, 13, 14, 17, 0x21, 0x80, 0xff];

/// Changes one thing of a state, without regard to what else it then should be.
pub fn mutate(random: &mut Random, state: &mut State, mode: Mode) {
    match random.below(32) {
        0 => toggle(random, state, PIN_CONTROLS, Pin::OFFERED.bits().into()),
        1..4 => toggle(random, state, PRIMARY_CONTROLS, Primary::OFFERED.bits().into()),
        4..7 => toggle(random, state, SECONDARY_CONTROLS, Secondary::OFFERED.bits().into()),
        7 | 8 => toggle(random, state, EXIT_CONTROLS, ExitControls::OFFERED.bits().into()),
        9 => toggle(random, state, ENTRY_CONTROLS, EntryControls::OFFERED.bits().into()),
        10 | 11 => event(random, state),
        12 => non_register(random, state),
        13 => exceptions(random, state),
        14 => control_register(random, state),
        15 => masks(random, state),
        16 => guest_msr(random, state),
        17..20 => segment(random, state),
        20 => flags(random, state),
        21 => host(random, state),
        22 => host_registers(random, state),
        23 => paging(random, state),
        24 => area_counts(random, state),
        25 => structures(random, state),
        26 => virtual_apic(random, state),
        27 => time(random, state),
        28 => table_registers(random, state),
        29 => link(random, state),
        30 => _ = state.set(GUEST_RIP, mode.rip(random.below(SNIPPETS.len() as u64) as usize)),
        _ => functions(random, state),
    }
}

/// Inverts one to three bits of `bits`.
fn toggle<T: FieldValue>(random: &mut Random, state: &mut State, field: Field<T>, bits: u64) {
    for _ in 0..=random.below(3) {
        let value = state.get(field) ^ random.bit_of(bits);
        state.set(field, value);
    }
}

fn event(random: &mut Random, state: &mut State) {
    const VALID: u64 = 1 << 31;
    let info = VALID | random.pick(&VECTORS) | random.below(8) << 8 | random.below(2) << 11;
    state.set(ENTRY_INTERRUPTION_INFO, info);
    state.set(ENTRY_EXCEPTION_ERROR_CODE, random.pick(&[0, 0, 8, 0x1f, 0x7fff, 0x8000, 0xffff_ffff]));
    state.set(ENTRY_INSTRUCTION_LENGTH, random.pick(&[1, 2, 3, 0, 15, 16]));
}

fn non_register(random: &mut Random, state: &mut State) {
    match random.below(3) {
        0 => state.set(GUEST_ACTIVITY_STATE, random.below(3)),
        1 => {
            state.or(GUEST_RFLAGS, random.below(2) << 9);
            state.set(GUEST_INTERRUPTIBILITY, random.pick(&[1, 2, 8, 9, 10, 3, 0x10, 4]))
        }
        _ => {
            state.or(GUEST_RFLAGS, random.below(2) << 8);
            state.set(GUEST_PENDING_DEBUG, random.pick(&[0, 1, 0xf, 0x1000, 0x4000, 0x5001, 0x8000]))
        }
    };
}

fn exceptions(random: &mut Random, state: &mut State) {
    let bitmap = random.pick(&[0, u64::MAX, 1 << 14, !(1 << 14), 1 << 13, 1 << 1, 1 << 6]);
    state.set(EXCEPTION_BITMAP, bitmap);
    state.set(PAGE_FAULT_ERROR_CODE_MASK, random.pick(&[0, 0, 1, 2, 0x1f, u64::MAX]));
    state.set(PAGE_FAULT_ERROR_CODE_MATCH, random.pick(&[0, 0, 1, 2, 0x10, u64::MAX]));
}

fn control_register(random: &mut Random, state: &mut State) {
    match random.below(4) {
        // Not CD, NW: they cost time. PE and PG make another mode.
        0 | 1 => toggle(random, state, GUEST_CR0, 0x5_003f),
        2 => toggle(random, state, GUEST_CR4, 0x37_27ff),
        _ => {
            let low = random.pick(&[0, 0, 8, 0x18, 1, 0xfff]);
            state.set(GUEST_CR3, state.get(GUEST_CR3) & !0xfff | low);
        }
    }
}

fn masks(random: &mut Random, state: &mut State) {
    let values = [0, u64::MAX, 1, 1 << 31, 0x21, 8, 1 << 16, 0x2000, 0x20, 0x80, 1 << 18];
    for field in [CR0_GUEST_HOST_MASK, CR4_GUEST_HOST_MASK, CR0_READ_SHADOW, CR4_READ_SHADOW] {
        if random.one_in(2) {
            state.set(field, random.pick(&values));
        }
    }
    let targets = [CR3_TARGET_VALUE_0, CR3_TARGET_VALUE_1, CR3_TARGET_VALUE_2, CR3_TARGET_VALUE_3];
    state.set(CR3_TARGET_COUNT, random.below(6)).set(random.pick(&targets), nested_paging::guest_cr3());
}

fn guest_msr(random: &mut Random, state: &mut State) {
    match random.below(5) {
        0 => state
            .set(GUEST_PAT, random.pick(&[0x0007_0406_0007_0406, 0, 0x0606_0606_0606_0606, 2, 0x0105_0406_0007_0406])),
        1 => state.set(GUEST_EFER, state.get(GUEST_EFER) ^ random.pick(&[1, 0x800, 0x400, 0x100, 2, 1 << 20])),
        2 => state.set(GUEST_DEBUGCTL, random.pick(&[0, 1, 2, 3, 1 << 14, 1 << 16, 4])),
        3 => state.set(GUEST_DR7, random.pick(&[0x400, 0, 0x2400, 0xffff_ffff, 1 << 32, 0x455])),
        _ => state
            .set(GUEST_SYSENTER_CS, random.pick(&[0, 8, 0x18, 0xffff_ffff]))
            .set(GUEST_SYSENTER_ESP, random.pick(&CANONICAL))
            .set(GUEST_SYSENTER_EIP, random.pick(&CANONICAL)),
    };
}

fn segment(random: &mut Random, state: &mut State) {
    let segment = if random.one_in(4) { random.pick(&SYSTEM_SEGMENTS) } else { random.pick(&GUEST_SEGMENTS) };
    let is_code = segment.selector.id() == GUEST_CS_SELECTOR.id();
    match random.below(5) {
        0 => toggle(random, state, segment.access_rights, 0x1_f0ff),
        1 => {
            let kind = random.below(16) | random.below(4) << 5;
            state.set(segment.access_rights, state.get(segment.access_rights) & !0x6f | kind);
        }
        2 => _ = state.set(segment.selector, state.get(segment.selector) & !7 | random.below(8)),
        3 => _ = state.set(segment.limit, random.pick(&[0, 0x66, 0x67, 0xffff, 0xf_ffff, 0x10_0000, u64::MAX])),
        // The code would be elsewhere.
        _ if is_code => toggle(random, state, segment.base, 1 << 32 | 1 << 47),
        _ => _ = state.set(segment.base, random.pick(&[0, 0, 1 << 47, 1 << 32, 0xffff_8000_0000_0000, WINDOW])),
    }
}

fn flags(random: &mut Random, state: &mut State) {
    toggle(random, state, GUEST_RFLAGS, 0x3d_7fd5);
}

fn host(random: &mut Random, state: &mut State) {
    match random.below(5) {
        0 => toggle(random, state, HOST_CR0, 0x5_002e),
        1 => toggle(random, state, HOST_CR4, safe_bits(HOST_CR4.id(), Mode::Long) & 0x37_ffff),
        2 => _ = state.set(HOST_EFER, state.get(HOST_EFER) ^ random.pick(&[1, 0x800, 1, 0x800, 0x400, 0x100, 2])),
        3 => _ = state.set(HOST_PAT, random.pick(&[0x0007_0406_0007_0406, 0x0606_0606_0606_0606, 0, 2])),
        _ => {
            state.set(HOST_SYSENTER_CS, random.pick(&[0, 8, 0xffff_ffff]));
            state.set(HOST_SYSENTER_ESP, random.pick(&CANONICAL)).set(HOST_SYSENTER_EIP, random.pick(&CANONICAL));
        }
    }
}

fn host_registers(random: &mut Random, state: &mut State) {
    let data = [HOST_DS_SELECTOR, HOST_ES_SELECTOR, HOST_FS_SELECTOR, HOST_GS_SELECTOR];
    match random.below(4) {
        0 => state.set(random.pick(&data), random.pick(&[0, DATA.into(), 0x30, 0x1238])),
        1 => state.set(random.pick(&[HOST_FS_BASE, HOST_GS_BASE, HOST_TR_BASE]), random.pick(&CANONICAL)),
        2 => state.set(HOST_SS_SELECTOR, random.pick(&[0, DATA.into()])),
        _ => state.set(HOST_CR3, state.get(HOST_CR3) ^ random.pick(&[8, 0x10, 0x18, 0])),
    };
}

/// EPT, VPID, and the roots of the guest's own paging structures.
fn paging(random: &mut Random, state: &mut State) {
    match random.below(5) {
        0 => toggle(random, state, EPT_POINTER, 0x5f),
        1 => _ = state.set(VPID, random.pick(&[0, 1, 2, 0xffff])),
        2 => {
            let roots = [nested_paging::guest_cr3(), tables::directory_32(), tables::pdpt_pae(), SPARE.address()];
            state.set(GUEST_CR3, random.pick(&roots));
        }
        3 => {
            let field = random.pick(&GUEST_PDPTES);
            let entry = random.pick(&tables::pdptes()) ^ random.pick(&[0, 1, 2, 0x18, 0x20, 0x100, 1 << 63, 1 << 45]);
            state.set(field, entry);
        }
        _ => {
            let stacks = [guest_stack(), guest_stack() - 4, LINEAR + 0x2000, 8, 1 << 47, LINEAR + 0x8000];
            state.set(GUEST_RSP, random.pick(&stacks));
        }
    }
}

fn area_counts(random: &mut Random, state: &mut State) {
    let count = random.below(areas::ENTRIES as u64 + 1);
    match random.below(3) {
        0 => state.set(EXIT_MSR_STORE_COUNT, count),
        1 => state.set(EXIT_MSR_LOAD_COUNT, count),
        _ => state.set(ENTRY_MSR_LOAD_COUNT, count),
    };
}

/// Addresses of pages.
fn structures(random: &mut Random, state: &mut State) {
    let bitmaps = [IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, VMREAD_BITMAP, VMWRITE_BITMAP];
    // The APIC-access page has no other use: whether the processor's own accesses to it exit is open (SDM 30.4.6.2
    // "Physical Accesses to the APIC-Access Page").
    let written = [VIRTUAL_APIC_ADDRESS, PML_ADDRESS, VIRTUALIZATION_EXCEPTION_INFO];
    let pages = [SPARE.address(), MSR_BITMAPS.address(), IO_BITMAPS.address(), MODIFICATION_LOG.address()];
    if random.one_in(2) {
        state.set(random.pick(&bitmaps), random.pick(&pages));
    } else {
        let pages = [VIRTUAL_APIC.address(), MODIFICATION_LOG.address(), SPARE.address()];
        state.set(random.pick(&written), random.pick(&pages));
    }
}

fn virtual_apic(random: &mut Random, state: &mut State) {
    let primary = Primary::USE_TPR_SHADOW | Primary::ACTIVATE_SECONDARY;
    let secondary = [
        Secondary::VIRTUALIZE_APIC_ACCESSES,
        Secondary::VIRTUALIZE_X2APIC_MODE,
        Secondary::APIC_REGISTER_VIRTUALIZATION,
        Secondary::VIRTUAL_INTERRUPT_DELIVERY,
    ];
    state.or(PRIMARY_CONTROLS, primary.bits().into());
    state.or(SECONDARY_CONTROLS, random.pick(&secondary).bits().into());
    state.or(PIN_CONTROLS, (Pin::EXTERNAL_INTERRUPT_EXITING & Pin::OFFERED).bits().into());
    state.set(GUEST_INTERRUPT_STATUS, random.pick(&[0, 0x21, 0x80, 0x2100, 0x8021, 0xffff]));
    state.set(TPR_THRESHOLD, random.pick(&[0, 0, 1, 2, 15, 16]));
    let bitmap = random.pick(&[EOI_EXIT_BITMAP_0, EOI_EXIT_BITMAP_1, EOI_EXIT_BITMAP_2, EOI_EXIT_BITMAP_3]);
    state.set(bitmap, random.pick(&[0, u64::MAX, 1 << 33]));
    state.set(POSTED_INTERRUPT_DESCRIPTOR_ADDRESS, POSTED.address() + random.pick(&[0, 0x40, 8]));
    state.set(POSTED_INTERRUPT_NOTIFICATION_VECTOR, random.pick(&[0xf2, 0x20, 0x100]));
}

fn time(random: &mut Random, state: &mut State) {
    match random.below(3) {
        0 => state.set(TSC_OFFSET, random.pick(&[0, 1 << 40, u64::MAX])),
        1 => state.set(TSC_MULTIPLIER, random.pick(&[0, 1 << 48, 1 << 47, 3 << 48])),
        _ => state.set(PLE_GAP, random.below(200)).set(PLE_WINDOW, 1 << 30),
    };
}

fn table_registers(random: &mut Random, state: &mut State) {
    match random.below(4) {
        0 => state.set(GUEST_GDTR_LIMIT, random.pick(&[0, 0x5f, 0xffff, 0x1_0000])),
        1 => state.set(GUEST_IDTR_LIMIT, random.pick(&[0, 0x7f, 0x3ff, 0xfff, 0xffff, 0x8000_0fff])),
        2 => state.set(GUEST_GDTR_BASE, random.pick(&[gdt_table().address(), SPARE.address(), 1 << 47, LINEAR])),
        _ => state.set(GUEST_IDTR_BASE, random.pick(&[GUEST_IDT.address(), VECTOR_TABLE, 1 << 47, LINEAR])),
    };
}

fn link(random: &mut Random, state: &mut State) {
    if random.one_in(2) {
        state.or(SECONDARY_CONTROLS, (Secondary::VMCS_SHADOWING & Secondary::OFFERED).bits().into());
    }
    let pointers = [u64::MAX, OTHER_VMCS.address(), OTHER_VMCS.address(), SPARE.address(), VMCS.address(), 1 << 45];
    state.set(VMCS_LINK_POINTER, random.pick(&pointers));
}

fn functions(random: &mut Random, state: &mut State) {
    state.or(SECONDARY_CONTROLS, (Secondary::ENABLE_VM_FUNCTIONS | Secondary::ENABLE_EPT).bits().into());
    state.set(VM_FUNCTION_CONTROLS, random.pick(&[1, 1, 0, 2]));
    state.set(EPTP_LIST_ADDRESS, areas::eptp_list());
    state.set(EPTP_INDEX, random.pick(&[0, 1, 511, 0xffff])).set(PML_INDEX, random.pick(&[511, 0, 512, 0xffff]));
}

/// Inverts a bit of a random field, one that no exit depends on.
pub fn flip(random: &mut Random, state: &mut State, mode: Mode, caps: &VmxCaps) {
    let fields = caps.fields();
    let count = written(&fields).count() as u64;
    loop {
        let Some(id) = written(&fields).nth(random.below(count) as usize) else { return };
        let bits = safe_bits(id, mode) & id.encoding().width().mask();
        if bits != 0 {
            return state.set_word(id, state.word(id) ^ random.bit_of(bits));
        }
    }
}

/// Address bits that make the address misaligned, or wider than any processor's.
const WRONG_PAGE: u64 = 0xfff | !0 << 48;

/// The bits of a field that a guest hypervisor may invert and go on. Hidden controls are left out: a processor that has
/// them differs from what l1hv offers.
fn safe_bits(id: FieldId, mode: Mode) -> u64 {
    const NOT_CANONICAL: u64 = 0xffff << 47;
    const RPL_AND_TI: u64 = 7;
    // LA57 and LASS take the image's own addresses away from it.
    const HOST_CR4_BITS: u64 = !(1 << 12 | 1 << 27);
    macro_rules! is {
        ($($field:ident),*) => { [$($field.id()),*].contains(&id) };
    }
    if is!(PREEMPTION_TIMER_VALUE, EXIT_MSR_STORE_COUNT, EXIT_MSR_LOAD_COUNT, ENTRY_MSR_LOAD_COUNT, HOST_RSP) {
        0
    } else if is!(PIN_CONTROLS) {
        !u64::from((Pin::HIDDEN | Pin::ACTIVATE_PREEMPTION_TIMER).bits())
    } else if is!(PRIMARY_CONTROLS) {
        !u64::from(Primary::HIDDEN.bits())
    } else if is!(SECONDARY_CONTROLS) {
        !u64::from(Secondary::HIDDEN.bits())
    } else if is!(EXIT_CONTROLS) {
        !u64::from(ExitControls::HIDDEN.bits())
    } else if is!(ENTRY_CONTROLS) {
        !u64::from(EntryControls::HIDDEN.bits())
    } else if is!(HOST_RIP, HOST_GDTR_BASE, HOST_IDTR_BASE) {
        NOT_CANONICAL
    } else if is!(HOST_CR3) {
        0x18 | !0 << 48
    } else if is!(HOST_CR4) {
        HOST_CR4_BITS
    } else if is!(HOST_CS_SELECTOR, HOST_TR_SELECTOR, HOST_SS_SELECTOR) {
        RPL_AND_TI
    } else if is!(GUEST_RIP) {
        if mode.is_16_bit() { !0xffff } else { !0 << 32 }
    } else if is!(GUEST_RSP) {
        !0 << 35
    } else if is!(GUEST_ACTIVITY_STATE) {
        // Not 3: nothing ends wait-for-SIPI on one processor.
        !3
    } else if is!(GUEST_CR3, GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3) {
        WRONG_PAGE
    } else if is!(EPT_POINTER) {
        const SUPERVISOR_SHADOW_STACK: u64 = 1 << 7;
        WRONG_PAGE & !SUPERVISOR_SHADOW_STACK
    } else if is!(EXIT_MSR_STORE_ADDRESS, EXIT_MSR_LOAD_ADDRESS, ENTRY_MSR_LOAD_ADDRESS) {
        0xf | !0 << 48
    } else if GUEST_SEGMENTS.iter().chain(&SYSTEM_SEGMENTS).any(|segment| segment.base.id() == id)
        || is!(GUEST_GDTR_BASE, GUEST_IDTR_BASE)
    {
        !0 << 32
    } else if id.info().name.ends_with("_ADDRESS")
        || is!(IO_BITMAP_A, IO_BITMAP_B, MSR_BITMAP, VMREAD_BITMAP)
        || is!(VMWRITE_BITMAP, VIRTUALIZATION_EXCEPTION_INFO, VMCS_LINK_POINTER)
    {
        WRONG_PAGE
    } else {
        u64::MAX
    }
}
