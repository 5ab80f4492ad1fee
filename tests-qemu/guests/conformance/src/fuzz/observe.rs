//! What a program sees of its machine: folded into a digest, and printed where one looks closer.

use core::arch::asm;
use core::fmt;

use shadow::encoding::Area;
use shadow::exit::{ExitReason, Fills, InterruptionInfo};
use shadow::fields::*;
use shadow::{FieldSet, VmxCaps};

use crate::cpu::{self, vmread};
use crate::fault::Outcome;
use crate::output::print;
use crate::vm::Registers;

/// VM exits and VM entries by how they ended.
#[derive(Clone, Copy)]
pub struct Counts {
    /// Entries that failed, by VM-instruction error; 0 is VMfailInvalid.
    pub failed: [u32; 32],
    /// Exits by basic exit reason, entry failures among them.
    pub exits: [u32; ExitReason::BASIC_COUNT],
}

impl Counts {
    /// Nothing has happened.
    pub const fn new() -> Self {
        Self { failed: [0; 32], exits: [0; ExitReason::BASIC_COUNT] }
    }
}

/// The observations of one program.
pub struct Observer {
    digest: u64,
    is_verbose: bool,
    saved: FieldSet,
}

impl Observer {
    /// No observations.
    pub fn new(caps: &VmxCaps, is_verbose: bool) -> Self {
        // The timer counts time.
        const NOT_DETERMINED: FieldSet = FieldSet::of(&[PREEMPTION_TIMER_VALUE.id()]);
        let is_saved = |id: &FieldId| id.encoding().area() == Area::Guest;
        let saved = caps.fields().minus(&NOT_DETERMINED).iter().filter(is_saved).fold(FieldSet::EMPTY, FieldSet::with);
        Self { digest: 0, is_verbose, saved }
    }

    /// All observations in one number.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Forgets everything.
    pub fn restart(&mut self) {
        self.digest = 0;
    }

    /// Names the step that the following observations belong to.
    pub fn step(&self, number: usize, step: impl fmt::Display) {
        if self.is_verbose {
            print(format_args!("F-STEP {number} {step}"));
        }
    }

    /// Notes a value.
    pub fn note(&mut self, name: impl fmt::Display, value: u64) {
        self.digest = (self.digest.rotate_left(5) ^ value).wrapping_mul(0x9fb2_1c65_1e98_df25);
        if self.is_verbose {
            print(format_args!("F-SEES {name}={value:#x}"));
        }
    }

    /// Notes how an instruction ended.
    pub fn outcome(&mut self, outcome: Outcome) {
        let (kind, value) = match outcome {
            Outcome::Success => (0, 0),
            Outcome::FailInvalid => (1, 0),
            Outcome::FailValid(error) => (2, error),
            Outcome::Fault { vector, error_code, cr2, resumes } => {
                self.note("fault-cr2", cr2);
                (3 + u64::from(resumes), u64::from(vector) << 32 | u64::from(error_code))
            }
        };
        if self.is_verbose {
            print(format_args!("F-SEES {outcome}"));
        }
        self.digest = (self.digest.rotate_left(5) ^ value ^ kind << 60).wrapping_mul(0x9fb2_1c65_1e98_df25);
    }

    /// Notes what reading a field gives.
    pub fn field(&mut self, id: FieldId) {
        self.note(format_args!("{id:?}"), vmread(id.encoding().0.into()).unwrap_or(u64::MAX));
    }

    /// Notes the registers of the hypervisor right after an exit.
    pub fn host(&mut self, registers: &Registers) {
        let Registers { rax, rcx, rdx, rbx, rbp, rsi, rdi, host_rflags, host_gdtr, host_idtr } = registers;
        for (name, value) in [
            ("rax", *rax),
            ("rcx", *rcx),
            ("rdx", *rdx),
            ("rbx", *rbx),
            ("rbp", *rbp),
            ("rsi", *rsi),
            ("rdi", *rdi),
            ("rflags", *host_rflags),
            ("gdtr-limit", host_gdtr[0] & 0xffff),
            ("gdtr-base", host_gdtr[0] >> 16 | host_gdtr[1] << 48),
            ("idtr-limit", host_idtr[0] & 0xffff),
            ("idtr-base", host_idtr[0] >> 16 | host_idtr[1] << 48),
            ("cr0", cpu::cr0()),
            ("cr2", cpu::cr2()),
            ("cr3", cpu::cr3()),
            ("cr4", cpu::cr4()),
            ("cr8", cpu::cr8()),
            ("dr7", cpu::dr7()),
            ("selectors", selectors()),
        ] {
            self.note(name, value);
        }
        for msr in [0xc000_0080, 0xc000_0100, 0xc000_0101, 0x174, 0x175, 0x176, 0x277, 0x1d9] {
            self.note(format_args!("msr-{msr:#x}"), cpu::rdmsr(msr).unwrap_or(u64::MAX));
        }
    }

    /// Notes an exit: the exit information that the SDM defines for it, and the guest state that it saves.
    pub fn exit(&mut self, reason: ExitReason) {
        self.note("reason", reason.0.into());
        self.field(EXIT_QUALIFICATION.id());
        self.field(ENTRY_INTERRUPTION_INFO.id());
        if !reason.is_entry_failure() {
            self.information(reason);
        }
        for id in self.saved.iter() {
            self.field(id);
        }
    }

    fn information(&mut self, reason: ExitReason) {
        let fills = reason.info().map_or(Fills::empty(), |row| row.fills);
        for (info, error) in
            [(EXIT_INTERRUPTION_INFO, EXIT_INTERRUPTION_ERROR_CODE), (IDT_VECTORING_INFO, IDT_VECTORING_ERROR_CODE)]
        {
            let event = event(info);
            if !event.is_valid() {
                self.note("no event", 0);
                continue;
            }
            self.field(info.id());
            if event.has_error_code() {
                self.field(error.id());
            }
        }
        if has_instruction_length(reason) {
            self.field(EXIT_INSTRUCTION_LENGTH.id());
        }
        let qualification = read(EXIT_QUALIFICATION.id());
        let (has_instruction, has_linear) = match reason.without_modifiers() {
            // Only INS and OUTS have more to say.
            ExitReason::IO_INSTRUCTION => (qualification & 1 << 4 != 0, qualification & 1 << 4 != 0),
            ExitReason::EPT_VIOLATION => (false, qualification & 1 << 7 != 0),
            // LMSW of memory, which no snippet has.
            ExitReason::CR_ACCESS => (false, false),
            _ => (fills.contains(Fills::INSTRUCTION), false),
        };
        if has_instruction {
            self.field(EXIT_INSTRUCTION_INFO.id());
        }
        if has_linear {
            self.field(GUEST_LINEAR_ADDRESS.id());
        }
        if fills.contains(Fills::PHYSICAL) {
            self.field(GUEST_PHYSICAL_ADDRESS.id());
        }
    }
}

fn read(id: FieldId) -> u64 {
    vmread(id.encoding().0.into()).unwrap_or(0)
}

fn event(field: Field<u32>) -> InterruptionInfo {
    InterruptionInfo(read(field.id()) as u32)
}

/// Whether the SDM defines the length of an instruction for an exit (28.2.5 "Information for VM Exits Due to Instruction
/// Execution"): of exceptions, and of exits during the delivery of an event, for software's alone.
pub fn has_instruction_length(reason: ExitReason) -> bool {
    let is_by_software = |event: InterruptionInfo| event.is_valid() && event.needs_instruction_length();
    let is_exception = reason.without_modifiers() == ExitReason::EXCEPTION_OR_NMI;
    let fills = reason.info().map_or(Fills::empty(), |row| row.fills);
    let events = [EXIT_INTERRUPTION_INFO, IDT_VECTORING_INFO].map(event);
    fills.contains(Fills::LENGTH) && !is_exception || events.into_iter().any(is_by_software)
}

/// TR, SS, DS and ES, 16 bits each. FS and GS are in their bases, and CS is what the code runs with.
fn selectors() -> u64 {
    let (tr, ss, ds, es): (u64, u64, u64, u64);
    // SAFETY: reading the registers has no effect.
    unsafe {
        asm!(
            "str {0:r}", "mov {1:r}, ss", "mov {2:r}, ds", "mov {3:r}, es",
            out(reg) tr, out(reg) ss, out(reg) ds, out(reg) es,
            options(nomem, nostack, preserves_flags)
        );
    }
    tr & 0xffff | (ss & 0xffff) << 16 | (ds & 0xffff) << 32 | es << 48
}
