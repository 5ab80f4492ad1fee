//! Exceptions: `attempt!` tries an instruction that may fault, and gives its [`Outcome`].

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use shadow::fields::VM_INSTRUCTION_ERROR;
use shadow::registers::RFLAGS_RF;

use crate::apic;
use crate::cpu;
use crate::memory::{self, Table};
use crate::output::{power_off, print};
use crate::smp::TAKEN;

/// The address at which a fault continues; 0 if no fault is expected.
pub static RECOVERY: AtomicU64 = AtomicU64::new(0);
/// The RBX to continue with: inline assembly cannot declare RBX as clobbered, and the faulting code may have changed
/// it.
pub static RECOVERY_RBX: AtomicU64 = AtomicU64::new(0);
/// The stack pointer to continue with; 0 for that of the faulting instruction.
pub static RECOVERY_RSP: AtomicU64 = AtomicU64::new(0);
/// `1 << 31 | vector` of the fault; 0 if there was none.
static VECTOR: AtomicU32 = AtomicU32::new(0);
static ERROR_CODE: AtomicU32 = AtomicU32::new(0);
static CR2: AtomicU64 = AtomicU64::new(0);
static RESUMES: AtomicBool = AtomicBool::new(false);
/// RIP of the last fault or trap.
static RIP: AtomicU64 = AtomicU64::new(0);
/// The last interrupt or NMI, `1 << 31 | vector`.
static INTERRUPT: AtomicU32 = AtomicU32::new(0);

const HAPPENED: u32 = 1 << 31;
const NMI: u64 = 2;
const PF: u32 = 14;

/// The outcome of an instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The instruction ended with CF and ZF clear.
    Success,
    /// VMfailInvalid.
    FailInvalid,
    /// VMfailValid with this VM-instruction error.
    FailValid(u64),
    /// The instruction faulted.
    Fault {
        /// The vector.
        vector: u32,
        /// The error code; 0 if there is none.
        error_code: u32,
        /// CR2, for a page fault.
        cr2: u64,
        /// RFLAGS.RF is set in the frame, as it is for a fault and not for a trap.
        resumes: bool,
    },
}

impl Outcome {
    /// The outcome of the last attempt, from the flags after it.
    pub fn of(cf: u8, zf: u8) -> Self {
        let vector = VECTOR.swap(0, Relaxed);
        if vector & HAPPENED != 0 {
            let vector = vector & !HAPPENED;
            let cr2 = if vector == PF { CR2.load(Relaxed) } else { 0 };
            Self::Fault { vector, error_code: ERROR_CODE.load(Relaxed), cr2, resumes: RESUMES.load(Relaxed) }
        } else if cf != 0 {
            Self::FailInvalid
        } else if zf != 0 {
            Self::FailValid(cpu::vmread(VM_INSTRUCTION_ERROR.id().encoding().0.into()).unwrap_or(u64::MAX))
        } else {
            Self::Success
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Success => f.write_str("ok"),
            Self::FailInvalid => f.write_str("fail-invalid"),
            Self::FailValid(error) => write!(f, "fail-{error}"),
            Self::Fault { vector: PF, error_code, cr2, .. } => write!(f, "#PF({error_code:#x}) cr2={cr2:#x}"),
            Self::Fault { vector, error_code, .. } => write!(f, "#{vector}({error_code:#x})"),
        }?;
        if matches!(self, Self::Fault { resumes: false, .. }) { f.write_str(" trap") } else { Ok(()) }
    }
}

/// Executes an instruction; evaluates to its [`Outcome`]. A fault skips it.
#[macro_export]
macro_rules! attempt {
    ($($line:expr),+ $(; $($operands:tt)*)?) => {{
        let (cf, zf): (u8, u8);
        // SAFETY: a case may have the effects of its instruction; after a fault, execution continues behind the
        // instruction.
        unsafe {
            core::arch::asm!(
                "lea {scratch}, [rip + 22f]",
                "mov [rip + {recovery}], {scratch}",
                "mov [rip + {recovery_rbx}], rbx",
                "test rsp, rsp",
                $($line,)+
                "22: setc {cf}",
                "setz {zf}",
                "mov qword ptr [rip + {recovery}], 0",
                scratch = out(reg) _, cf = out(reg_byte) cf, zf = out(reg_byte) zf,
                recovery = sym $crate::fault::RECOVERY, recovery_rbx = sym $crate::fault::RECOVERY_RBX,
                $($($operands)*)?
            );
        }
        $crate::fault::Outcome::of(cf, zf)
    }};
}

/// The stack frame that the vectors push, from RBX up.
#[repr(C)]
struct Frame {
    rbx: u64,
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

#[unsafe(no_mangle)]
extern "C" fn handle_exception(frame: &mut Frame) {
    const RFLAGS_CF_ZF_TF_IF: u64 = 1 | 1 << 6 | 1 << 8 | 1 << 9;
    if frame.vector == NMI || frame.vector >= 32 {
        INTERRUPT.store(HAPPENED | frame.vector as u32, Relaxed);
        RIP.store(frame.rip, Relaxed);
        TAKEN.count(frame.vector as u8);
        if frame.vector >= 32 {
            apic::end_of_interrupt();
        }
        return;
    }
    let recovery = RECOVERY.swap(0, Relaxed);
    if recovery == 0 {
        let Frame { vector, error_code, rip, .. } = frame;
        print(format_args!("C-PANIC processor {}: exception {vector} ({error_code:#x}) at {rip:#x}", apic::id()));
        power_off();
    }
    VECTOR.store(HAPPENED | frame.vector as u32, Relaxed);
    ERROR_CODE.store(frame.error_code as u32, Relaxed);
    CR2.store(cpu::cr2(), Relaxed);
    RESUMES.store(frame.rflags & RFLAGS_RF != 0, Relaxed);
    RIP.store(frame.rip, Relaxed);
    frame.rip = recovery;
    frame.rbx = RECOVERY_RBX.load(Relaxed);
    frame.rflags &= !RFLAGS_CF_ZF_TF_IF;
    let rsp = RECOVERY_RSP.swap(0, Relaxed);
    if rsp != 0 {
        (frame.cs, frame.ss, frame.rsp) = (memory::CODE.into(), memory::DATA.into(), rsp);
    }
}

/// The RIP of the last fault or trap.
pub fn last_rip() -> u64 {
    RIP.load(Relaxed)
}

/// Opens a window for interrupts. Returns the vector of the interrupt that arrived.
pub fn take_interrupt() -> Option<u32> {
    INTERRUPT.store(0, Relaxed);
    // SAFETY: interrupts are only counted.
    unsafe { asm!("sti", "nop", "nop", "cli") };
    last_interrupt()
}

/// Unblocks NMIs by IRET: an exit leaves them blocked if the nested guest's handler or an NMI exit blocked them.
pub fn unblock_nmis() {
    // SAFETY: returns to the next instruction with the same stack and flags.
    unsafe {
        asm!(
            "mov {scratch}, rsp", "push 0x10", "push {scratch}", "pushfq", "push 8",
            "lea {scratch}, [rip + 22f]", "push {scratch}", "iretq", "22:",
            scratch = out(reg) _
        );
    }
}

/// Returns the vector of the last interrupt or NMI, and forgets it.
pub fn last_interrupt() -> Option<u32> {
    let vector = INTERRUPT.swap(0, Relaxed);
    (vector & HAPPENED != 0).then_some(vector & !HAPPENED)
}

/// Fills an IDT with gates to handlers that lie `stride` bytes apart.
pub fn fill_idt(idt: &Table<512>, first_handler: u64, stride: u64) {
    for vector in 0..256 {
        idt.set_gate(vector, first_handler + vector as u64 * stride, memory::CODE);
    }
}
