//! I/O instructions: unconditional exiting and the bitmaps (SDM 26.1.3, 25.6.4).

use shadow::controls::Primary;
use shadow::fields::*;

use super::case;
use super::others::user;
use crate::code;
use crate::memory::IO_BITMAPS;
use crate::output::Suite;
use crate::vm::Vm;

/// Runs all cases. Ports: 0x80, which only debug cards use, and ports around the end of the port space.
pub fn run(suite: &mut Suite) {
    let instructions: &[(&str, u64)] = &[
        ("in-8-imm", code!("in al, 0x80")),
        ("in-16-imm", code!("in ax, 0x80")),
        ("in-32-imm", code!("in eax, 0x80")),
        ("out-8-imm", code!("out 0x80, al")),
        ("out-32-imm", code!("out 0x80, eax")),
        ("in-8", code!("mov edx, 0x80", "in al, dx")),
        ("in-16", code!("mov edx, 0x80", "in ax, dx")),
        ("out-16", code!("mov edx, 0x80", "out dx, ax")),
        ("out-32", code!("mov edx, 0x80", "out dx, eax")),
        ("insb", code!("mov edx, 0x80", "lea rdi, [rsp - 64]", "insb")),
        ("insd", code!("mov edx, 0x80", "lea rdi, [rsp - 64]", "insd")),
        ("rep-insw", code!("mov edx, 0x80", "lea rdi, [rsp - 64]", "mov ecx, 3", "rep insw")),
        ("rep-insw-zero", code!("mov edx, 0x80", "lea rdi, [rsp - 64]", "xor ecx, ecx", "rep insw")),
        ("outsb", code!("mov edx, 0x80", "lea rsi, [rsp - 64]", "outsb")),
        ("outsb-fs", code!("mov edx, 0x80", "lea rsi, [rsp - 64]", ".byte 0x64", "outsb")),
        ("outsb-address-32", code!("mov edx, 0x80", "lea rsi, [rsp - 64]", ".byte 0x67", "outsb")),
        ("rep-outsd", code!("mov edx, 0x80", "lea rsi, [rsp - 64]", "mov ecx, 2", "rep outsd")),
        ("outsb-non-canonical", code!("mov edx, 0x80", "mov rsi, 0x800000000000", "outsb")),
        ("outsb-not-mapped", code!("mov edx, 0x80", "mov rsi, 0x1c0000000", "outsb")),
    ];
    for &(name, code) in instructions {
        case(suite, format_args!("{name}-off"), code, |_| ());
        case(suite, format_args!("{name}-unconditional"), code, unconditional);
        case(suite, format_args!("{name}-bitmap-clear"), code, |vm| {
            unconditional(vm);
            with_bitmaps(vm);
        });
        // The bits of the bytes that the access touches, and of the bytes beside them.
        for port in 0x7f..0x85_usize {
            case(suite, format_args!("{name}-bitmap-{port:#x}"), code, |vm| {
                with_bitmaps(vm);
                set_bit(port);
            });
        }
        case(suite, format_args!("{name}-cpl-3"), code, |vm| {
            unconditional(vm);
            user(vm);
        });
        case(suite, format_args!("{name}-iopl-3-cpl-3"), code, |vm| {
            unconditional(vm);
            user(vm);
            vm.or(GUEST_RFLAGS, 3 << 12);
        });
    }
    edges(suite);
}

fn unconditional(vm: &mut Vm) {
    vm.or(PRIMARY_CONTROLS, Primary::UNCONDITIONAL_IO_EXITING);
}

fn with_bitmaps(vm: &mut Vm) {
    vm.or(PRIMARY_CONTROLS, Primary::USE_IO_BITMAPS);
}

fn set_bit(port: usize) {
    IO_BITMAPS.set(port / 64, IO_BITMAPS.get(port / 64) | 1 << (port % 64));
}

/// Accesses across the two bitmaps, and across the end of the port space.
fn edges(suite: &mut Suite) {
    let ports = [0x7ffe, 0x7fff, 0x8000, 0xfffd, 0xfffe, 0xffff];
    for port in ports {
        for (width, code) in [(1, code!("in al, dx")), (2, code!("in ax, dx")), (4, code!("in eax, dx"))] {
            for bit in [None, Some(0), Some(0x7fff), Some(0x8000), Some(0xffff)] {
                let name = format_args!("edge-{port:#x}-width-{width}-bit-{bit:x?}");
                case(suite, name, code, |vm| {
                    with_bitmaps(vm);
                    vm.registers.rdx = port;
                    if let Some(bit) = bit {
                        set_bit(bit);
                    }
                });
            }
        }
    }
}
