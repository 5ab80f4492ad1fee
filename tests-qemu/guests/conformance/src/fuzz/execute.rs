//! The steps of a program, executed.

use shadow::controls::Secondary;
use shadow::encoding::Area;
use shadow::exit::ExitReason;
use shadow::fields::*;

use super::fresh::forget_translations;
use super::observe::{Counts, Observer, has_instruction_length};
use super::program::{Entering, General, Instruction, Operand, Program, Region, Step};
use super::snippets::{self, LOW_OPERANDS};
use super::state::State;
use crate::apic::{self, Message};
use crate::attempt;
use crate::cpu;
use crate::fault::Outcome;
use crate::memory::*;
use crate::nested_paging::{GUEST_PT, WINDOW_PT};
use crate::random::Random;
use crate::vm::{Registers, enter, prepare_host, revision};

/// Ticks of the preemption timer: more than any snippet takes, under any hypervisor.
const GUARD: u64 = 100_000;

/// Whether a program goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// It does.
    GoesOn,
    /// Its nested guest used up its time, which ends at no determined instruction.
    RanOutOfTime,
}

/// A program under way.
pub struct Run<'a> {
    program: &'a Program,
    observer: &'a mut Observer,
    counts: &'a mut Counts,
    repaired: Option<&'a State>,
    is_in_vmx_operation: bool,
    current: Option<Region>,
    launched: [bool; 2],
    /// Whether the last exit was of an instruction whose length it tells.
    is_behind_instruction: bool,
}

impl<'a> Run<'a> {
    /// A program that begins with this state in the current VMCS.
    /// Before each entry the fields get those values of `repaired` that make the exit come back.
    pub fn begin(
        program: &'a Program,
        start: &State,
        observer: &'a mut Observer,
        (counts, repaired): (&'a mut Counts, Option<&'a State>),
    ) -> Self {
        let _ = cpu::vmptrld(VMCS.address());
        fill(start);
        let current = Some(Region::First);
        Self {
            program,
            observer,
            counts,
            repaired,
            is_in_vmx_operation: true,
            current,
            launched: [false; 2],
            is_behind_instruction: false,
        }
    }

    /// Executes the steps of the mask.
    pub fn steps(&mut self, mask: u64) -> Course {
        for (number, &step) in self.program.steps().iter().enumerate() {
            if mask >> number & 1 == 0 {
                continue;
            }
            self.observer.step(number, step);
            if self.step(step) == Course::RanOutOfTime {
                return Course::RanOutOfTime;
            }
        }
        Course::GoesOn
    }

    fn step(&mut self, step: Step) -> Course {
        let outcome = match step {
            Step::Enter(entering) => return self.enter(entering),
            Step::Write(id, value) => self.write(id, value),
            Step::WriteBy(encoding, value) => cpu::vmwrite(encoding.into(), value),
            Step::Read(encoding) => match cpu::vmread(encoding.into()) {
                Ok(value) => {
                    self.observer.note("value", value);
                    Outcome::Success
                }
                Err(outcome) => outcome,
            },
            Step::Load(operand) => self.load(operand),
            Step::Clear(operand) => self.clear(operand),
            Step::AtAddress(which, address) => self.at_address(which, address),
            Step::Store => {
                let (outcome, address) = cpu::vmptrst();
                self.observer.note("current VMCS", address);
                outcome
            }
            Step::On(operand) => self.vmxon(operand),
            Step::Off => self.vmxoff(),
            Step::Invept(kind, descriptor) => cpu::invept(kind, descriptor),
            Step::Invvpid(kind, descriptor) => cpu::invvpid(kind, descriptor),
            Step::Wrmsr(msr, value) => cpu::wrmsr(msr, value),
            Step::Rdmsr(msr) => {
                self.observer.note("value", cpu::rdmsr(msr).unwrap_or(u64::MAX));
                Outcome::Success
            }
            Step::Dr7(value) => cpu::set_dr7(value),
            Step::Xsetbv(register, value) => {
                const AT_RESET: u64 = 1;
                let outcome = cpu::xsetbv(register, value);
                let _ = cpu::xsetbv(0, AT_RESET);
                outcome
            }
            Step::Cpuid(leaf) => {
                for word in cpu::cpuid(leaf, 0) {
                    self.observer.note("word", word.into());
                }
                Outcome::Success
            }
            Step::Tables => {
                cpu::load_tables(gdt_table().address(), HOST_IDT.address());
                Outcome::Success
            }
            Step::Instruction(instruction) => execute(instruction),
            Step::Cr0(bits) => cpu::set_cr0(cpu::cr0() ^ bits),
            Step::Cr4(bits) => cpu::set_cr4(cpu::cr4() ^ bits),
            _ => {
                self.change_memory(step);
                return Course::GoesOn;
            }
        };
        self.observer.outcome(outcome);
        Course::GoesOn
    }

    fn change_memory(&mut self, step: Step) {
        match step {
            Step::Ept(index, bits) => {
                WINDOW_PT.set(index, WINDOW_PT.get(index) ^ bits);
                forget_translations();
            }
            Step::GuestTable(index, bits) => {
                GUEST_PT.set(index, GUEST_PT.get(index) ^ bits);
                forget_translations();
            }
            Step::MsrBit(bit) => MSR_BITMAPS.set(bit / 64, MSR_BITMAPS.get(bit / 64) ^ 1 << (bit % 64)),
            Step::PortBit(bit) => IO_BITMAPS.set(bit / 64, IO_BITMAPS.get(bit / 64) ^ 1 << (bit % 64)),
            Step::MsrArea(area, index, entry) => area.set(index, entry),
            Step::VirtualApic(word, value) => VIRTUAL_APIC.set(word, value),
            // A VMCS that is current may be in the processor and nowhere else.
            Step::Revision(bits) if self.current != Some(Region::Second) => OTHER_VMCS.set(0, revision() ^ bits),
            Step::Nmi => apic::send(apic::id(), Message::Nmi),
            Step::Interrupt(vector) => apic::interrupt_self(vector),
            _ => (),
        }
    }

    fn write(&mut self, id: FieldId, value: u64) -> Outcome {
        let outcome = cpu::vmwrite(id.encoding().0.into(), value);
        // What is cached for an EPTP does not stay right if its attributes change (SDM 29.4.3.4).
        if [EPT_POINTER.id(), SECONDARY_CONTROLS.id()].contains(&id) && self.is_in_vmx_operation {
            forget_translations();
        }
        outcome
    }

    fn load(&mut self, operand: Operand) -> Outcome {
        let outcome = cpu::vmptrld(address(operand));
        if outcome == Outcome::Success {
            self.current = Some(operand.region);
            self.is_behind_instruction = false;
        }
        outcome
    }

    fn clear(&mut self, operand: Operand) -> Outcome {
        let outcome = cpu::vmclear(address(operand));
        if outcome == Outcome::Success {
            self.set_launched(Some(operand.region), false);
            if self.current == Some(operand.region) {
                self.current = None;
            }
        }
        outcome
    }

    fn at_address(&mut self, which: u8, address: u64) -> Outcome {
        let outcome = [cpu::vmptrld, cpu::vmclear, cpu::vmxon][usize::from(which)](address);
        if which == 0 && outcome == Outcome::Success {
            self.current = None;
        }
        self.is_in_vmx_operation |= which == 2 && outcome == Outcome::Success;
        outcome
    }

    fn vmxon(&mut self, operand: Operand) -> Outcome {
        let outcome = cpu::vmxon(address(operand));
        self.is_in_vmx_operation |= outcome == Outcome::Success;
        outcome
    }

    /// VMCLEAR of all VMCSs comes first, as the SDM asks for (25.11.1 "Software Use of Virtual-Machine Control
    /// Structures").
    fn vmxoff(&mut self) -> Outcome {
        for region in [Region::First, Region::Second] {
            let _ = self.clear(Operand { region, inverted: 0 });
        }
        let outcome = cpu::vmxoff();
        self.is_in_vmx_operation &= outcome != Outcome::Success;
        outcome
    }

    fn set_launched(&mut self, region: Option<Region>, launched: bool) {
        match region {
            Some(Region::First) => self.launched[0] = launched,
            Some(Region::Second) => self.launched[1] = launched,
            _ => (),
        }
    }

    fn is_launched(&self) -> bool {
        match self.current {
            Some(Region::First) => self.launched[0],
            Some(Region::Second) => self.launched[1],
            _ => false,
        }
    }

    fn enter(&mut self, entering: Entering) -> Course {
        if !self.is_in_vmx_operation {
            self.observer.outcome(attempt!("vmlaunch"));
            return Course::GoesOn;
        }
        self.prepare(entering);
        let General { rax, rcx, rdx } = entering.registers;
        let [rbx, rbp, rsi, rdi] = [LOW_OPERANDS; 4];
        let mut registers = Registers { rax, rcx, rdx, rbx, rbp, rsi, rdi, ..Registers::default() };
        let began_at = next_instruction();
        let outcome = enter(&mut registers, self.is_launched() != entering.is_wrong);
        if outcome != Outcome::Success {
            self.count_failure(outcome);
            self.observer.outcome(outcome);
            return Course::GoesOn;
        }
        let reason = ExitReason(cpu::vmread(EXIT_REASON.id().encoding().0.into()).unwrap_or(0) as u32);
        self.counts.exits[usize::from(reason.basic()) % ExitReason::BASIC_COUNT] += 1;
        if reason == ExitReason::PREEMPTION_TIMER && !entering.has_no_time {
            self.observer.note("out of time", 0);
            return Course::RanOutOfTime;
        }
        if [began_at, next_instruction()].into_iter().any(snippets::reads_time) {
            (registers.rax, registers.rdx) = (0, 0);
        }
        self.observer.host(&registers);
        prepare_host();
        self.observer.exit(reason);
        if !reason.is_entry_failure() {
            self.set_launched(self.current, true);
        }
        self.is_behind_instruction = !reason.is_entry_failure() && has_instruction_length(reason);
        Course::GoesOn
    }

    /// Sets RIP and the timer. The next instruction after an exit is behind the one that exited, if one did.
    fn prepare(&mut self, entering: Entering) {
        let write = |id: FieldId, value| cpu::vmwrite(id.encoding().0.into(), value);
        let read = |id: FieldId| cpu::vmread(id.encoding().0.into()).unwrap_or(0);
        if let Some(snippet) = entering.snippet {
            let _ = write(GUEST_RIP.id(), self.program.mode.rip(usize::from(snippet)));
        } else if self.is_behind_instruction {
            let _ = write(GUEST_RIP.id(), read(GUEST_RIP.id()) + read(EXIT_INSTRUCTION_LENGTH.id()));
        }
        let _ = write(PREEMPTION_TIMER_VALUE.id(), if entering.has_no_time { 0 } else { GUARD });
        // A hypervisor that changes what a VPID's translations are made from invalidates them.
        if read(SECONDARY_CONTROLS.id()) & u64::from(Secondary::ENABLE_VPID.bits()) != 0 {
            let _ = cpu::invvpid(2, [0; 2]);
        }
        if let Some(repaired) = self.repaired {
            repair(repaired);
        }
        // The error numbers of instructions before do not count.
        let _ = write(VM_INSTRUCTION_ERROR.id(), 0);
    }

    fn count_failure(&mut self, outcome: Outcome) {
        let number = match outcome {
            Outcome::FailValid(error) => error as usize % 32,
            _ => 0,
        };
        self.counts.failed[number] += 1;
    }
}

/// The linear address at which the nested guest goes on.
fn next_instruction() -> u64 {
    let [base, rip] = [GUEST_CS_BASE.id(), GUEST_RIP.id()].map(|id| cpu::vmread(id.encoding().0.into()).unwrap_or(0));
    base.wrapping_add(rip)
}

/// Writes the fields on which it depends that a nested guest ends, and that its exit comes back.
fn repair(state: &State) {
    let write = |id: FieldId, value| cpu::vmwrite(id.encoding().0.into(), value);
    for id in FieldId::all().filter(|id| id.encoding().area() == Area::Host) {
        let _ = write(id, state.word(id));
    }
    for id in [EXIT_CONTROLS.id(), EXIT_MSR_LOAD_COUNT.id(), EXIT_MSR_STORE_COUNT.id(), PIN_CONTROLS.id()] {
        let _ = write(id, state.word(id));
    }
    if cpu::vmread(GUEST_ACTIVITY_STATE.id().encoding().0.into()) == Ok(3) {
        let _ = write(GUEST_ACTIVITY_STATE.id(), 0);
    }
}

fn execute(instruction: Instruction) -> Outcome {
    match instruction {
        Instruction::Invd => attempt!("invd"),
        Instruction::Wbinvd => attempt!("wbinvd"),
        Instruction::Vmcall => attempt!("vmcall"; in("eax") 0, in("ecx") 0),
        Instruction::Vmfunc => attempt!("vmfunc"; in("eax") 0, in("ecx") 0),
        Instruction::Getsec => attempt!("getsec"; inout("eax") 0 => _),
    }
}

fn address(operand: Operand) -> u64 {
    let page = match operand.region {
        Region::First => &VMCS,
        Region::Second => &OTHER_VMCS,
        Region::Vmxon => &VMXON,
        Region::Other => &SPARE,
    };
    page.address() ^ operand.inverted
}

/// Gives the current VMCS, which has been cleared, this state.
fn fill(state: &State) {
    for id in FieldId::all() {
        let value = state.word(id);
        if value != 0 {
            let _ = cpu::vmwrite(id.encoding().0.into(), value);
        }
    }
}

/// Fills the second VMCS with a state too, for a quarter of the programs.
pub fn second(number: u64, start: &State) {
    if Random(number).one_in(4) {
        let _ = cpu::vmptrld(OTHER_VMCS.address());
        fill(start);
    }
}
