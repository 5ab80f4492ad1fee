//! The virtual APIC: register virtualization, x2APIC mode, virtual-interrupt delivery, the TPR threshold, posted
//! interrupts (SDM 30).

mod beside;
mod delivery;
mod posted;
mod registers;
mod threshold;
mod x2apic;

use core::fmt;

use shadow::controls::{Pin, Primary, Secondary};
use shadow::fields::*;

use super::entry_events::Delivered;
use crate::cpu::invept;
use crate::memory::{SPARE, VIRTUAL_APIC};
use crate::nested_paging::{LEAF, WINDOW, WINDOW_PT};
use crate::output::Suite;
use crate::vm::{Verdict, Vm};

/// The page of the window that EPT12 maps to the APIC-access page.
const PAGE: usize = 1;
/// The nested guest's address of the APIC-access page.
const APIC: u64 = WINDOW + PAGE as u64 * 4096;

const IF: u64 = 1 << 9;
const TPR: usize = 0x80;
const ISR: usize = 0x100;
const IRR: usize = 0x200;

/// Runs all cases.
pub fn run(suite: &mut Suite) {
    registers::run(suite);
    x2apic::run(suite);
    delivery::run(suite);
    threshold::run(suite);
    posted::run(suite);
    beside::run(suite);
}

/// The parts of the APIC that are virtualized besides the TPR.
#[derive(Clone, Copy)]
struct Mode {
    name: &'static str,
    controls: Secondary,
}

const NOTHING: Mode = Mode { name: "tpr", controls: Secondary::empty() };
const REGISTERS: Mode = Mode { name: "registers", controls: Secondary::APIC_REGISTER_VIRTUALIZATION };
const DELIVERY: Mode = Mode { name: "delivery", controls: Secondary::VIRTUAL_INTERRUPT_DELIVERY };
const BOTH: Mode = Mode { name: "both", controls: REGISTERS.controls.union(DELIVERY.controls) };
const MODES: [Mode; 4] = [NOTHING, REGISTERS, DELIVERY, BOTH];

impl Mode {
    /// Applies the mode, with an APIC-access page.
    fn accesses(self, vm: &mut Vm) {
        self.apply(vm, Secondary::VIRTUALIZE_APIC_ACCESSES);
        vm.set(APIC_ACCESS_ADDRESS, SPARE.address());
        vm.registers.rcx = APIC;
        WINDOW_PT.set(PAGE, SPARE.address() | LEAF);
        let _ = invept(2, [0; 2]);
    }

    /// Applies the mode, with "virtualize x2APIC mode".
    fn x2apic(self, vm: &mut Vm) {
        self.apply(vm, Secondary::VIRTUALIZE_X2APIC_MODE);
    }

    fn apply(self, vm: &mut Vm, access: Secondary) {
        vm.or(PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING);
        vm.or(PRIMARY_CONTROLS, Primary::USE_TPR_SHADOW);
        vm.or(SECONDARY_CONTROLS, self.controls | access);
    }
}

/// Sets the bit of a vector in the ISR or IRR of the virtual-APIC page.
fn set_vector(array: usize, vector: u8) {
    let (register, bit) = (array + usize::from(vector / 32) * 16, u32::from(vector % 32));
    VIRTUAL_APIC.set(register / 8, VIRTUAL_APIC.get(register / 8) | 1 << bit);
}

/// Sets RVI and SVI, and their bits in IRR and ISR; vector 0 stands for none.
fn status(vm: &mut Vm, requesting: u8, servicing: u8) {
    if requesting != 0 {
        set_vector(IRR, requesting);
    }
    if servicing != 0 {
        set_vector(ISR, servicing);
    }
    vm.set(GUEST_INTERRUPT_STATUS, u16::from(servicing) << 8 | u16::from(requesting));
}

/// Runs, and prints the verdict, the guest interrupt status and the nonzero parts of the virtual-APIC page.
fn case(suite: &mut Suite, name: impl fmt::Display, vm: &mut Vm) {
    let verdict = vm.run();
    print(suite, name, vm, verdict);
}

fn print(suite: &mut Suite, name: impl fmt::Display, vm: &Vm, verdict: Verdict) {
    let (status, rax) = (vm.get(GUEST_INTERRUPT_STATUS), vm.registers.rax);
    suite.case(name, format_args!("{} rax={rax:#x} status={status:#x}{}", Delivered(verdict), VirtualApic(|_| 0)));
}

/// Prints those quadwords of the virtual-APIC page that differ from a function of their index.
struct VirtualApic(fn(usize) -> u64);

impl fmt::Display for VirtualApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for index in 0..512 {
            let value = VIRTUAL_APIC.get(index);
            if value != (self.0)(index) {
                write!(f, " {:x}:{value:x}", index * 8)?;
            }
        }
        Ok(())
    }
}
