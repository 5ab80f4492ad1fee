//! With the argument `sleep`, the image asks for the sleeping state S3, from which the firmware would wake the machine up
//! outside a host: itself, and by nested guests whose I/O instructions it lets through. Last it switches the machine off
//! in the same way. No case can: a bare machine sleeps.

use guest_abi::port::{inw, outb, outw};
use shadow::controls::Primary;
use shadow::fields::*;

use crate::code;
use crate::memory::IO_BITMAPS;
use crate::minimal::enter_vmx_operation;
use crate::output::print;
use crate::vm::Vm;

/// The argument.
pub const WORD: &str = "sleep";

/// Where the firmware of Bochs puts PM1a_STS and PM1a_CNT, and its values of SLP_TYP with SLP_EN.
const STATUS: u16 = 0xb000;
const CONTROL: u16 = 0xb004;
const S3: u16 = 1 << 10 | 1 << 13;
const S5: u16 = 1 << 13;

/// Asks, and ends the machine.
pub fn run() -> ! {
    let word = || inw(STATUS) & 0x8000;
    outw(CONTROL, S3);
    print(format_args!("{WORD}: the hypervisor goes on, wake status {:#x}", word()));
    outw(STATUS, 0x8000);
    print(format_args!("{WORD}: cleared, wake status {:#x}", word()));
    outb(CONTROL + 1, (S3 >> 8) as u8);
    print(format_args!("{WORD}: by one byte, wake status {:#x}", word()));
    outw(STATUS, 0x8000);
    print(format_args!("{WORD}: VMXON: {}", enter_vmx_operation()));
    for bitmaps in [false, true] {
        IO_BITMAPS.fill(0);
        let mut vm = Vm::new(code!("mov edx, 0xb004", "mov eax, 0x2400", "out dx, ax", "mov edx, 0xb000", "in ax, dx"));
        vm.clear(PRIMARY_CONTROLS, Primary::UNCONDITIONAL_IO_EXITING | Primary::USE_IO_BITMAPS);
        if bitmaps {
            vm.or(PRIMARY_CONTROLS, Primary::USE_IO_BITMAPS);
            vm.set(IO_BITMAP_A, IO_BITMAPS.address()).set(IO_BITMAP_B, IO_BITMAPS.address() + 0x1000);
        }
        let verdict = vm.run();
        let rax = vm.registers.rax & 0x8000;
        print(format_args!("{WORD}: a nested guest with bitmaps {bitmaps}: {verdict} wake status {rax:#x}"));
        outw(STATUS, 0x8000);
    }
    outw(CONTROL, S5);
    print(format_args!("C-PANIC the machine is still on"));
    crate::output::power_off()
}
