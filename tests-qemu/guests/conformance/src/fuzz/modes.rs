//! The modes that nested guests begin in. Each is a state that enters.

use shadow::controls::{EntryControls, Secondary};
use shadow::fields::*;
use shadow::registers::*;

use super::snippets::{self, IDT_32, LOW, STACK_16, VECTOR_TABLE, Width};
use super::state::State;
use super::tables;
use crate::memory::{CODE_32, OTHER_TSS, OTHER_TSS_AREA, USER_CODE, USER_DATA, guest_stack};

/// A mode of a nested guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit mode at CPL 0.
    Long,
    /// 64-bit mode at CPL 3.
    LongUser,
    /// Compatibility mode.
    Compatibility,
    /// 32-bit protected mode without paging.
    Protected,
    /// 32-bit protected mode with 32-bit paging.
    Paging32,
    /// 32-bit protected mode with PAE paging.
    PaePaging,
    /// 32-bit protected mode with 16-bit code.
    Protected16,
    /// Real mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
}

/// All, with 64-bit mode as often as hypervisors use it.
pub const MODES: [Mode; 12] = [
    Mode::Long,
    Mode::Long,
    Mode::Long,
    Mode::Long,
    Mode::LongUser,
    Mode::Compatibility,
    Mode::Protected,
    Mode::Paging32,
    Mode::PaePaging,
    Mode::Protected16,
    Mode::Real,
    Mode::Virtual8086,
];

const EFER_LME_LMA: u64 = EFER_LME | EFER_LMA;

impl Mode {
    /// The width of the mode's code.
    pub fn width(self) -> Width {
        match self {
            Self::Long | Self::LongUser => Width::W64,
            Self::Compatibility | Self::Protected | Self::Paging32 | Self::PaePaging => Width::W32,
            Self::Protected16 | Self::Real | Self::Virtual8086 => Width::W16,
        }
    }

    /// RIP at a snippet.
    pub fn rip(self, snippet: usize) -> u64 {
        let address = snippets::address(snippet, self.width());
        if self.width() == Width::W16 { address - LOW } else { address }
    }

    /// Whether linear addresses have 16 bits.
    pub fn is_16_bit(self) -> bool {
        self.width() == Width::W16
    }

    /// Changes a state in 64-bit mode at CPL 0 to one in this mode.
    pub fn apply(self, state: &mut State) {
        match self {
            Self::Long => (),
            Self::LongUser => user(state),
            Self::Compatibility => code_32(state),
            Self::Protected => protected(state),
            Self::Paging32 => {
                protected(state);
                state.or(GUEST_CR0, CR0_PG).set(GUEST_CR3, tables::directory_32());
                state.or(GUEST_CR4, CR4_PSE).clear(GUEST_CR4, CR4_PAE);
            }
            Self::PaePaging => {
                protected(state);
                state.or(GUEST_CR0, CR0_PG).or(GUEST_CR4, CR4_PAE).set(GUEST_CR3, tables::pdpt_pae());
                for (field, entry) in GUEST_PDPTES.into_iter().zip(tables::pdptes()) {
                    state.set(field, entry);
                }
            }
            Self::Protected16 => {
                protected(state);
                code_16(state);
                state.set(GUEST_SS_ACCESS_RIGHTS, access_rights::DATA.into()).set(GUEST_SS_LIMIT, u32::MAX.into());
                state.set(GUEST_CS_ACCESS_RIGHTS, 0x9b);
            }
            Self::Real => real(state),
            Self::Virtual8086 => {
                protected(state);
                code_16(state);
                state.or(GUEST_RFLAGS, RFLAGS_VM);
                for segment in GUEST_SEGMENTS {
                    let selector = if segment.selector.id() == GUEST_CS_SELECTOR.id() { LOW / 16 } else { 0 };
                    state.set(segment.selector, selector).set(segment.base, selector * 16);
                    state.set(segment.limit, 0xffff).set(segment.access_rights, 0xf3);
                }
            }
        }
        state.set(GUEST_RIP, self.rip(0));
    }
}

fn user(state: &mut State) {
    const DPL_3: u64 = 3 << 5;
    state.set(GUEST_CS_SELECTOR, USER_CODE.into()).or(GUEST_CS_ACCESS_RIGHTS, DPL_3);
    for segment in GUEST_SEGMENTS.iter().filter(|segment| segment.selector.id() != GUEST_CS_SELECTOR.id()) {
        state.set(segment.selector, USER_DATA.into()).or(segment.access_rights, DPL_3);
    }
}

fn code_32(state: &mut State) {
    state.set(GUEST_CS_SELECTOR, CODE_32.into()).set(GUEST_CS_ACCESS_RIGHTS, 0xc09b);
}

fn protected(state: &mut State) {
    code_32(state);
    state.clear(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST.bits().into());
    state.clear(GUEST_EFER, EFER_LME_LMA).clear(GUEST_CR0, CR0_PG);
    state.set(GUEST_TR_SELECTOR, OTHER_TSS.into()).set(GUEST_TR_BASE, OTHER_TSS_AREA.address());
    state.set(GUEST_IDTR_BASE, IDT_32).set(GUEST_IDTR_LIMIT, 0x7ff);
    // An exception handler that itself faults without end pushes down to the end of its segment, not through the image:
    // the segment expands down to the stack's page.
    const EXPAND_DOWN: u64 = 0xc097;
    state.set(GUEST_SS_ACCESS_RIGHTS, EXPAND_DOWN).set(GUEST_SS_LIMIT, (guest_stack() & !0xfff) - 1);
}

fn code_16(state: &mut State) {
    state.set(GUEST_CS_BASE, LOW).set(GUEST_CS_LIMIT, 0xffff).set(GUEST_RSP, STACK_16);
}

fn real(state: &mut State) {
    protected(state);
    code_16(state);
    state.clear(GUEST_CR0, CR0_PE);
    state.set(GUEST_IDTR_BASE, VECTOR_TABLE).set(GUEST_IDTR_LIMIT, 0x3ff);
    for segment in GUEST_SEGMENTS {
        let is_code = segment.selector.id() == GUEST_CS_SELECTOR.id();
        let selector = if is_code { LOW / 16 } else { 0 };
        state.set(segment.selector, selector).set(segment.base, selector * 16);
        state.set(segment.limit, 0xffff).set(segment.access_rights, if is_code { 0x9b } else { 0x93 });
    }
}

/// The system segment registers.
pub const SYSTEM_SEGMENTS: [SegmentFields; 2] = [GUEST_TR, GUEST_LDTR];

/// Whether the state's guest is unrestricted.
pub fn is_unrestricted(state: &State) -> bool {
    state.has(SECONDARY_CONTROLS, Secondary::UNRESTRICTED_GUEST.bits().into())
}

/// Whether the state's guest runs in IA-32e mode.
pub fn is_ia32e(state: &State) -> bool {
    state.has(ENTRY_CONTROLS, EntryControls::IA32E_MODE_GUEST.bits().into())
}
