//! With the argument `vmx-abort-load` or `vmx-abort-store` the image does what no case can: its VM exit cannot load or
//! store an MSR, which is a VMX abort, the end of the processor (SDM 28.7 "VMX Aborts").

use shadow::fields::*;

use crate::apic;
use crate::code;
use crate::memory::MSR_AREAS;
use crate::minimal::enter_vmx_operation;
use crate::output::{power_off, print};
use crate::vm::Vm;

/// The arguments.
pub const LOAD: &str = "vmx-abort-load";
pub const STORE: &str = "vmx-abort-store";

/// IA32_VMX_BASIC: read-only.
const CANNOT_BE_LOADED: u64 = 0x480;
/// The APIC's id in x2APIC mode, in which RDMSR reads it.
const CANNOT_BE_STORED: u64 = 0x802;

/// An exit that cannot load an MSR: abort 4.
pub fn load() -> ! {
    enter(|vm| {
        MSR_AREAS.set(0x80, CANNOT_BE_LOADED);
        MSR_AREAS.set(0x81, 0);
        vm.set(EXIT_MSR_LOAD_COUNT, 1);
    })
}

/// An exit that cannot store an MSR: abort 1.
pub fn store() -> ! {
    apic::enter_x2apic_mode(0);
    enter(|vm| {
        MSR_AREAS.set(0, CANNOT_BE_STORED);
        vm.set(EXIT_MSR_STORE_COUNT, 1);
    })
}

/// Enters, and does not come back.
fn enter(prepare: impl FnOnce(&mut Vm)) -> ! {
    print(format_args!("VMXON: {}", enter_vmx_operation()));
    let mut vm = Vm::new(code!("nop"));
    prepare(&mut vm);
    let verdict = vm.run();
    print(format_args!("C-PANIC the VM exit came back: {verdict}"));
    power_off()
}
