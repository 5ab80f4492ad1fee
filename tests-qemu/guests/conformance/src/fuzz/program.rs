//! A program of a guest hypervisor: a mode of its nested guest, and steps.

use core::fmt;

use shadow::encoding::Encoding;
use shadow::fields::FieldId;
use shadow::index::lookup;

use super::areas::{Area, Entry};
use super::modes::Mode;
use super::snippets::SNIPPETS;

/// The most steps of a program: as many as a mask has bits.
pub const MOST_STEPS: usize = 64;

/// A page of the image that VMX instructions take for a VMCS region or VMXON region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Region {
    /// The VMCS that each program begins with.
    First,
    /// The other one.
    Second,
    /// The VMXON region.
    Vmxon,
    /// A page without a revision identifier.
    Other,
}

/// The operand of an instruction that takes the address of a region.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The page.
    pub region: Region,
    /// Bits of the address that are inverted.
    pub inverted: u64,
}

/// General registers of a nested guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct General {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
}

/// What a VM entry executes.
#[derive(Clone, Copy, Debug)]
pub struct Entering {
    /// The snippet that RIP is set to; otherwise the nested guest continues behind the instruction that exited.
    pub snippet: Option<u8>,
    /// Its registers.
    pub registers: General,
    /// VMLAUNCH where VMRESUME is right, and the other way round.
    pub is_wrong: bool,
    /// The preemption timer expires at once.
    pub has_no_time: bool,
}

/// An instruction of the hypervisor without operands, which exits whatever the controls say, or is undefined.
#[derive(Clone, Copy, Debug)]
pub enum Instruction {
    /// INVD.
    Invd,
    /// WBINVD.
    Wbinvd,
    /// VMCALL, which fails outside a nested guest.
    Vmcall,
    /// VMFUNC, which no hypervisor may execute.
    Vmfunc,
    /// GETSEC of the capabilities.
    Getsec,
}

/// A step.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// VMWRITE.
    Write(FieldId, u64),
    /// VMWRITE by an encoding that need not exist.
    WriteBy(u32, u64),
    /// VMREAD by an encoding that need not exist.
    Read(u32),
    /// VMPTRLD.
    Load(Operand),
    /// VMCLEAR.
    Clear(Operand),
    /// VMPTRLD, VMCLEAR or VMXON by an address.
    AtAddress(u8, u64),
    /// VMPTRST.
    Store,
    /// VMXON.
    On(Operand),
    /// VMXOFF.
    Off,
    /// INVEPT.
    Invept(u64, [u64; 2]),
    /// INVVPID.
    Invvpid(u64, [u64; 2]),
    /// Bits of an entry of EPT12's page table are inverted.
    Ept(usize, u64),
    /// Bits of an entry of the nested guest's page table are inverted.
    GuestTable(usize, u64),
    /// A bit of the MSR bitmap is inverted.
    MsrBit(usize),
    /// A bit of an I/O bitmap is inverted.
    PortBit(usize),
    /// An entry of an MSR area.
    MsrArea(Area, usize, Entry),
    /// A word of the virtual-APIC page.
    VirtualApic(usize, u64),
    /// Revision identifier and shadow indicator of the second VMCS region.
    Revision(u64),
    /// An NMI to this processor.
    Nmi,
    /// An interrupt to this processor, which blocks interrupts.
    Interrupt(u8),
    /// WRMSR of the hypervisor.
    Wrmsr(u32, u64),
    /// RDMSR of the hypervisor.
    Rdmsr(u32),
    /// MOV to CR0 with bits inverted.
    Cr0(u64),
    /// MOV to CR4 with bits inverted.
    Cr4(u64),
    /// MOV to DR7.
    Dr7(u64),
    /// XSETBV.
    Xsetbv(u32, u64),
    /// CPUID of a leaf whose answer l1hv leaves as it is.
    Cpuid(u32),
    /// Loads GDTR and IDTR.
    Tables,
    /// An instruction without operands.
    Instruction(Instruction),
    /// VMLAUNCH or VMRESUME.
    Enter(Entering),
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.region)?;
        if self.inverted != 0 { write!(f, " ^ {:#x}", self.inverted) } else { Ok(()) }
    }
}

struct Named(u32);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match lookup(Encoding(self.0)) {
            Some(id) => write!(f, "{id:?} ({:#x})", self.0),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write(id, value) => write!(f, "VMWRITE {id:?}, {value:#x}"),
            Self::WriteBy(encoding, value) => write!(f, "VMWRITE {}, {value:#x}", Named(*encoding)),
            Self::Read(encoding) => write!(f, "VMREAD {}", Named(*encoding)),
            Self::Load(operand) => write!(f, "VMPTRLD {operand}"),
            Self::Clear(operand) => write!(f, "VMCLEAR {operand}"),
            Self::AtAddress(which, address) => {
                write!(f, "{} {address:#x}", ["VMPTRLD", "VMCLEAR", "VMXON"][usize::from(*which)])
            }
            Self::Store => write!(f, "VMPTRST"),
            Self::On(operand) => write!(f, "VMXON {operand}"),
            Self::Off => write!(f, "VMXOFF"),
            Self::Invept(kind, descriptor) => write!(f, "INVEPT {kind:#x}, {descriptor:#x?}"),
            Self::Invvpid(kind, descriptor) => write!(f, "INVVPID {kind:#x}, {descriptor:#x?}"),
            Self::Ept(index, bits) => write!(f, "EPT12 entry {index} ^ {bits:#x}, INVEPT"),
            Self::GuestTable(index, bits) => write!(f, "entry {index} of the guest's page table ^ {bits:#x}, INVVPID"),
            Self::MsrBit(bit) => write!(f, "MSR bitmap bit {bit:#x} inverted"),
            Self::PortBit(bit) => write!(f, "I/O bitmap bit {bit:#x} inverted"),
            Self::MsrArea(area, index, Entry { msr, value }) => write!(f, "{area:?}[{index}] = {msr:#x}: {value:#x}"),
            Self::VirtualApic(offset, value) => write!(f, "virtual APIC {:#x} = {value:#x}", offset * 8),
            Self::Revision(bits) => write!(f, "revision of Second ^ {bits:#x}"),
            Self::Nmi => write!(f, "NMI"),
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#x}"),
            Self::Wrmsr(msr, value) => write!(f, "WRMSR {msr:#x}, {value:#x}"),
            Self::Rdmsr(msr) => write!(f, "RDMSR {msr:#x}"),
            Self::Cr0(bits) => write!(f, "CR0 ^ {bits:#x}"),
            Self::Cr4(bits) => write!(f, "CR4 ^ {bits:#x}"),
            Self::Dr7(value) => write!(f, "DR7 = {value:#x}"),
            Self::Xsetbv(register, value) => write!(f, "XSETBV {register:#x}, {value:#x}"),
            Self::Cpuid(leaf) => write!(f, "CPUID {leaf:#x}"),
            Self::Tables => write!(f, "LGDT, LIDT"),
            Self::Instruction(instruction) => write!(f, "{instruction:?}"),
            Self::Enter(entering) => write!(f, "{entering}"),
        }
    }
}

impl fmt::Display for Entering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { snippet, registers: General { rax, rcx, rdx }, is_wrong, has_no_time } = self;
        f.write_str(if *is_wrong { "enter by the wrong instruction" } else { "enter" })?;
        match snippet {
            Some(snippet) => write!(f, " at \"{}\"", SNIPPETS[usize::from(*snippet)].0)?,
            None => write!(f, " behind the last exit")?,
        }
        write!(f, ", rax={rax:#x} rcx={rcx:#x} rdx={rdx:#x}")?;
        if *has_no_time { write!(f, ", preemption timer 0") } else { Ok(()) }
    }
}

/// A program.
pub struct Program {
    /// The mode of the nested guest.
    pub mode: Mode,
    steps: [Step; MOST_STEPS],
    count: usize,
}

impl Program {
    /// A program without steps.
    pub fn new(mode: Mode) -> Self {
        Self { mode, steps: [Step::Store; MOST_STEPS], count: 0 }
    }

    /// Adds a step, if there is room.
    pub fn push(&mut self, step: Step) {
        if self.count < MOST_STEPS {
            self.steps[self.count] = step;
            self.count += 1;
        }
    }

    /// All steps.
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.count]
    }
}
