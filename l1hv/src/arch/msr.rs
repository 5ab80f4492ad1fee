//! Model-specific registers.

use core::arch::asm;

use super::fixup::fallible;

/// The processor refused the access with a general-protection exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GpFault;

/// Reads an MSR; `None` if the processor has no MSR of this number.
pub fn try_read(msr: u32) -> Option<u64> {
    let (low, high): (u32, u32);
    let fault: u8;
    // SAFETY: reading an MSR has no effect on memory, and execution resumes after the instruction if it faults.
    unsafe {
        asm!(
            fallible!("rdmsr"),
            "setc {fault}",
            fault = out(reg_byte) fault,
            in("ecx") msr,
            inout("eax") 0 => low,
            inout("edx") 0 => high,
            options(nomem, nostack)
        );
    }
    (fault == 0).then_some(u64::from(high) << 32 | u64::from(low))
}

/// Writes an MSR, or says that the processor refused.
///
/// # Safety
///
/// If the processor accepts the value, the change does not affect the host's paging, segments or code.
pub unsafe fn try_write(msr: u32, value: u64) -> Result<(), GpFault> {
    let fault: u8;
    // SAFETY: the caller's promise; execution resumes after the instruction if it faults.
    unsafe {
        asm!(
            fallible!("wrmsr"),
            "setc {fault}",
            fault = out(reg_byte) fault,
            in("ecx") msr,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            options(nostack)
        );
    }
    if fault == 0 { Ok(()) } else { Err(GpFault) }
}
