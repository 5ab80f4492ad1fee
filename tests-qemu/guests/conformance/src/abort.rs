//! With the argument `vmx-abort`, the image does what no case can: its VM exit cannot load an MSR, which is a VMX
//! abort, the end of the processor (SDM 28.7 "VMX Aborts").

use shadow::fields::*;

use crate::code;
use crate::memory::MSR_AREAS;
use crate::minimal::enter_vmx_operation;
use crate::output::{power_off, print};
use crate::vm::Vm;

/// The argument.
pub const WORD: &str = "vmx-abort";

/// IA32_VMX_BASIC: read-only.
const CANNOT_BE_LOADED: u64 = 0x480;

/// Enters, and does not come back.
pub fn run() -> ! {
    print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
    let mut vm = Vm::new(code!("nop"));
    MSR_AREAS.set(0x80, CANNOT_BE_LOADED);
    MSR_AREAS.set(0x81, 0);
    vm.set(EXIT_MSR_LOAD_COUNT, 1);
    let verdict = vm.run();
    print(format_args!("C-PANIC the VM exit came back: {verdict}"));
    power_off()
}
