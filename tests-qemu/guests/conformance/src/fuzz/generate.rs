//! From a seed and a number to a program, the same on every machine.

use shadow::controls::Pin;
use shadow::encoding::Encoding;
use shadow::fields::*;
use shadow::index::lookup;
use shadow::{FieldSet, VmxCaps};

use super::areas::{self, Area};
use super::hostile::aim_at_the_host;
use super::modes::MODES;
use super::mutation::{flip, mutate};
use super::program::{Entering, General, Instruction, Operand, Program, Region, Step};
use super::rounding::{never_waits_for_sipi, round};
use super::snippets::{self, LOW_OPERANDS, SNIPPETS};
use super::state::{State, written};
use crate::nested_paging::{self, LINEAR, WINDOW, WINDOW_PAGES};
use crate::random::Random;

/// What programs are made of.
pub struct Generator {
    /// The capabilities.
    pub caps: VmxCaps,
    /// A state in 64-bit mode that enters.
    pub base: State,
    /// The seed of the run.
    pub seed: u64,
    /// Whether programs name the host's memory.
    pub is_hostile: bool,
}

/// Ports without a device, or with one that any value leaves as it is.
const PORTS: [u64; 8] = [0x80, 0x81, 0xed, 0x7ffc, 0x7fff, 0x8000, 0xffff, 0xfffe];

/// Exit information that only some exits define, which is observed after those.
const UNDEFINED_AT_TIMES: FieldSet = FieldSet::of(&[
    GUEST_LINEAR_ADDRESS.id(),
    GUEST_PHYSICAL_ADDRESS.id(),
    EXIT_INSTRUCTION_LENGTH.id(),
    EXIT_INSTRUCTION_INFO.id(),
    EXIT_INTERRUPTION_ERROR_CODE.id(),
    IDT_VECTORING_ERROR_CODE.id(),
]);

/// Leaves of CPUID in which nothing is withheld.
const CPUID_LEAVES: [u32; 7] = [0, 2, 4, 0x8000_0000, 0x8000_0002, 0x8000_0006, 0x8000_0008];

impl Generator {
    /// The program with this number, and the state that its mode begins with.
    pub fn program(&self, number: u64) -> (Program, State) {
        let mut random = Random(self.seed.wrapping_mul(0xd134_2543_de82_ef95) ^ number.wrapping_mul(0x9e37_79b9));
        let _ = random.next();
        let mode = random.pick(&MODES);
        let mut start = self.base.clone();
        mode.apply(&mut start);
        let mut program = Program::new(mode);
        let mut state = start.clone();
        self.change(&mut random, &mut program, &mut state);
        for _ in 0..=random.below(4) {
            self.operation(&mut random, &mut program, &mut state);
            if self.is_hostile {
                aim_at_the_host(&mut random, &mut program);
            }
            program.push(self.enter(&mut random));
        }
        (program, start)
    }

    /// VMWRITEs of a random state: close to one that VM entry accepts, and often one that it does accept.
    fn change(&self, random: &mut Random, program: &mut Program, state: &mut State) {
        let before = state.clone();
        for _ in 0..random.below(9) {
            mutate(random, state, program.mode);
        }
        if !random.one_in(8) {
            round(state, &self.caps);
        }
        if random.one_in(2) {
            for _ in 0..=random.below(2) {
                flip(random, state, program.mode, &self.caps);
            }
        }
        // Every nested guest comes to an end.
        state.or(PIN_CONTROLS, Pin::ACTIVATE_PREEMPTION_TIMER.bits().into());
        if !never_waits_for_sipi(state) {
            *state = before.clone();
        }
        for id in written(&self.caps.fields()) {
            if state.word(id) != before.word(id) {
                program.push(Step::Write(id, state.word(id)));
            }
        }
    }

    fn enter(&self, random: &mut Random) -> Step {
        let snippet = random.below(SNIPPETS.len() as u64) as u8;
        let goes_on = random.one_in(4);
        Step::Enter(Entering {
            snippet: (!goes_on).then_some(snippet),
            registers: registers(random, SNIPPETS[usize::from(snippet)].1, &self.caps),
            is_wrong: random.one_in(24),
            has_no_time: random.one_in(32),
        })
    }

    /// Zero to two steps between entries.
    fn operation(&self, random: &mut Random, program: &mut Program, state: &mut State) {
        for _ in 0..random.below(3) {
            let step = match random.below(28) {
                0 | 1 => {
                    // What an exit has changed is unknown here: these are VMWRITEs of a few fields of the last state.
                    self.change(random, program, state);
                    continue;
                }
                2 => Step::Read(self.encoding(random)),
                3 => Step::WriteBy(self.encoding_to_write(random), random.next()),
                4 => Step::Load(operand(random)),
                5 => Step::Clear(operand(random)),
                6 => Step::Store,
                7 => region_or_mode(random),
                8 => Step::Invept(random.pick(&[0, 1, 1, 2, 2, 3, 1 << 32]), eptp_descriptor(random)),
                9 => Step::Invvpid(random.pick(&[0, 0, 1, 2, 3, 4, 1 << 33]), vpid_descriptor(random)),
                10 | 11 => Step::Ept(random.below(WINDOW_PAGES as u64) as usize, ept_bits(random)),
                12 => Step::GuestTable(random.below(WINDOW_PAGES as u64) as usize, guest_bits(random)),
                13 => Step::MsrBit(msr_bit(random)),
                14 => Step::PortBit(random.pick(&PORTS) as usize),
                15 | 16 => {
                    let area = random.pick(&[Area::ExitStore, Area::ExitLoad, Area::EntryLoad]);
                    Step::MsrArea(area, random.below(areas::ENTRIES as u64) as usize, area.entry(random))
                }
                17 => Step::VirtualApic(random.below(0x80) as usize * 2, random.pick(&[0, 0x21, 0xff, u64::MAX, 0x80])),
                18 => Step::Nmi,
                19 => Step::Interrupt(random.pick(&[0x21, 0x30, 0x80, 0xf2, 0xff])),
                20 => Step::Wrmsr(random.pick(&areas::WRITABLE), random.pick(&areas::VALUES)),
                21 if random.one_in(2) => Step::Rdmsr(random.pick(&areas::READABLE)),
                21 => Step::Rdmsr(random.pick(&areas::OF_HYPERVISOR)),
                22 => Step::Cr0(random.bit_of(0x5_002e)),
                23 => Step::Dr7(random.pick(&[0, 0x400, 0x2400, 0xffff_0355, 1 << 32])),
                24 => Step::Xsetbv(random.pick(&[0, 0, 0, 1]), random.pick(&[0, 1, 3, 5, 7, 1 << 62 | 1])),
                25 => Step::Cpuid(random.pick(&CPUID_LEAVES)),
                26 if random.one_in(2) => Step::Tables,
                26 => {
                    let all = [
                        Instruction::Invd,
                        Instruction::Wbinvd,
                        Instruction::Vmcall,
                        Instruction::Vmfunc,
                        Instruction::Getsec,
                    ];
                    Step::Instruction(random.pick(&all))
                }
                _ => Step::Cr4(random.bit_of(0x37_27ff & !(1 << 12) | 1 << 13)),
            };
            program.push(step);
        }
    }

    /// Mostly the encoding of a field that exists, now and then one of its upper half, or none. The preemption timer
    /// counts time.
    fn encoding(&self, random: &mut Random) -> u32 {
        const PREEMPTION_TIMER: u32 = 0x482e;
        let fields = self.caps.fields();
        let known = fields.iter().nth(random.below(fields.iter().count() as u64) as usize).map(|id| id.encoding().0);
        let encoding = match random.below(8) {
            0 => random.below(0x8000) as u32,
            1 => known.unwrap_or(0) | 1,
            2 => known.unwrap_or(0) ^ 1 << random.below(32),
            _ => known.unwrap_or(0),
        };
        let is_unknown = |id| !fields.contains(id) || UNDEFINED_AT_TIMES.contains(id);
        let is_unknown = lookup(Encoding(encoding)).is_some_and(is_unknown);
        if is_unknown || encoding & !1 == PREEMPTION_TIMER { EXIT_REASON.id().encoding().0 } else { encoding }
    }

    /// An encoding to write any value to: of a field that no exit depends on.
    fn encoding_to_write(&self, random: &mut Random) -> u32 {
        let free = [
            CR0_READ_SHADOW.id(),
            CR4_READ_SHADOW.id(),
            TSC_OFFSET.id(),
            ENTRY_EXCEPTION_ERROR_CODE.id(),
            EXCEPTION_BITMAP.id(),
            EXIT_REASON.id(),
            EXIT_QUALIFICATION.id(),
            VM_INSTRUCTION_ERROR.id(),
            GUEST_LINEAR_ADDRESS.id(),
            GUEST_DEBUGCTL.id(),
            GUEST_PDPTE2.id(),
            GUEST_SYSENTER_CS.id(),
        ];
        let encoding = self.encoding(random);
        if lookup(Encoding(encoding)).is_none() {
            encoding
        } else {
            random.pick(&free).encoding().0 | u32::from(random.one_in(8))
        }
    }
}

/// The operand of VMPTRLD, VMCLEAR or VMXON.
fn operand(random: &mut Random) -> Operand {
    let region =
        random.pick(&[Region::First, Region::First, Region::Second, Region::Second, Region::Vmxon, Region::Other]);
    let inverted = match random.below(6) {
        0 => random.bit_of(0xfff),
        1 => random.bit_of(!0 << 48),
        _ => 0,
    };
    Operand { region, inverted }
}

fn region_or_mode(random: &mut Random) -> Step {
    match random.below(4) {
        0 => Step::Off,
        1 => Step::On(operand(random)),
        _ => Step::Revision(random.pick(&[0, 1 << 31, 1, 1 << 31 | 2])),
    }
}

fn eptp_descriptor(random: &mut Random) -> [u64; 2] {
    let eptp = nested_paging::eptp() ^ random.pick(&[0, 0, 1 << 6, 1, 8, 0x100, 1 << 50]);
    [eptp, random.pick(&[0, 0, 1])]
}

fn vpid_descriptor(random: &mut Random) -> [u64; 2] {
    let vpid = random.pick(&[1, 1, 0, 2, 0x1_0001]);
    [vpid, random.pick(&[LINEAR, 0, 1 << 47, WINDOW])]
}

/// Bits of a leaf of EPT12.
fn ept_bits(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => random.below(8),
        1 => random.bit_of(0x3f),
        2 => random.bit_of(1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 63),
        _ => random.bit_of(1 << 45 | 1 << 12 | 1 << 13),
    }
}

/// Bits of an entry of the nested guest's page table.
fn guest_bits(random: &mut Random) -> u64 {
    random.bit_of(0x1ff | 1 << 63 | 1 << 45 | 1 << 12)
}

/// The place of an MSR's bit in the MSR bitmap (SDM 25.6.9 "MSR-Bitmap Address").
fn msr_bit(random: &mut Random) -> usize {
    let is_write = random.one_in(2);
    let msr = if is_write { random.pick(&areas::WRITABLE) } else { random.pick(&areas::READABLE) };
    let quarter = usize::from(is_write) * 2 + usize::from(msr >> 31 != 0);
    quarter * 0x2000 + (msr & 0x1fff) as usize
}

/// Registers that suit an instruction.
fn registers(random: &mut Random, operand: snippets::Operand, caps: &VmxCaps) -> General {
    use snippets::Operand as Needs;
    let any = random.pick(&areas::VALUES);
    let memory = [
        WINDOW + 16,
        WINDOW + 0x3010,
        WINDOW + 0x2ffe,
        LINEAR + 16,
        LINEAR + 0x1008,
        LINEAR + 0x2ffe,
        LINEAR + 0x7ffe,
        LOW_OPERANDS,
        // With 32-bit addresses these are in the window, too.
        3 << 32 | WINDOW,
        1 << 47 | WINDOW,
    ];
    let mut general = General { rax: any, rcx: random.below(4), rdx: random.pick(&memory) };
    match operand {
        Needs::Any | Needs::Memory | Needs::Time => (),
        Needs::ReadMsr => general.rcx = random.pick(&areas::READABLE).into(),
        Needs::WriteMsr => {
            general.rcx = random.pick(&areas::WRITABLE).into();
            (general.rax, general.rdx) = (any & 0xffff_ffff, any >> 32);
        }
        Needs::Port => general.rdx = random.pick(&PORTS),
        // Not the last ports: under l1hv a string instruction that goes on at port 0 is #GP (shadow::nested::ports).
        Needs::String => general.rdx = random.pick(&PORTS[..4]),
        Needs::Cr0 => {
            general.rax = 0x8001_0033 ^ random.pick(&[0, 1, 2, 4, 8, 0x20, 1 << 16, 1 << 31, 1 << 18, 1 << 32])
        }
        Needs::Cr3 => general.rax = nested_paging::guest_cr3() | random.pick(&[0, 8, 1 << 63, 1 << 45, 1]),
        Needs::Cr4 => {
            general.rax = 0x20 ^ random.pick(&[0, 0x2000, 0x20, 0x10, 0x80, 0x200, 1 << 17, 1 << 20, 1 << 11, 1 << 40])
        }
        Needs::Selector => general.rax = random.pick(&[0, 8, 0x10, 0x18, 0x33, 0x3b, 0x40, 0x50, 0x60, 0x14]),
        Needs::Field => {
            let fields = caps.fields();
            let id = fields.iter().nth(random.below(fields.iter().count() as u64) as usize);
            general.rcx = id.map_or(0, |id| id.encoding().0.into());
        }
    }
    general
}
