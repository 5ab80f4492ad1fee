//! A multiboot 1 kernel that starts and ends as test images of other projects do.
//!
//! * It is linked at 4 MiB, asks its loader for nothing, and takes the memory up to `mem_upper` as its own.
//! * It resets the local APIC, wakes every other processor with INIT and SIPI, and switches to x2APIC mode.
//! * One module holds lines `NAME=VALUE`; the words of the command line choose what is tried.
//! * It talks over COM1, which it programs itself, and ends with a dword to port f4H, then `Shutdown` to port 8900H.
//!
//! Lines on COM1: `test image: WHAT: RESULT`. The words of the command line after the file's name: `vmx` enters and
//! leaves VMX operation, `fail` ends with code 3, `triple-fault` with a triple fault.

#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "the kernel consists of privileged instructions")]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;

use guest_abi::port::{inb, outb, outl, outw};
use protocol::{EXIT_PORT, SHUTDOWN_PORT, SHUTDOWN_TEXT};

global_asm!(include_str!("start.S"), options(att_syntax));

const COM1: u16 = 0x3f8;
const LOADER_MAGIC: u32 = 0x2bad_b002;
const MIB: u64 = 1 << 20;

/// Item of QEMU's fw_cfg that holds the number of processors.
const NB_CPUS: u16 = 5;

const IA32_APIC_BASE: u32 = 0x1b;
const APIC: u64 = 0xfee0_0000;

/// Offsets in the loader's information (Multiboot Specification 0.6.96, 3.3).
mod info {
    pub const FLAGS: u64 = 0;
    pub const MEM_UPPER: u64 = 8;
    pub const COMMAND_LINE: u64 = 16;
    pub const MODULE_COUNT: u64 = 20;
    pub const MODULES: u64 = 24;
    pub const MAP_LENGTH: u64 = 44;
    pub const MAP: u64 = 48;
    pub const HAS_MAP: u32 = 1 << 6;
}

#[unsafe(no_mangle)]
extern "C" fn test_image_main(magic: u32, info: u64) -> ! {
    init_com1();
    say("loader", format_args!("{}", magic == LOADER_MAGIC));
    let arguments = text_at(read(info + info::COMMAND_LINE).into());
    let (name, words) = arguments.split_once(' ').unwrap_or((arguments, ""));
    say("named by its file", format_args!("{}", name.starts_with('/')));
    say("arguments", format_args!("{words}"));
    say("processors", format_args!("{}", firmware_configuration(NB_CPUS)));
    environment(info);
    memory(info);
    local_apic();
    for word in words.split(' ').filter(|word| !word.is_empty()) {
        match word {
            "vmx" => vmx(),
            "fail" => exit(3),
            "triple-fault" => triple_fault(),
            _ => say("unknown word", format_args!("{word}")),
        }
    }
    exit(0)
}

/// The first word of an item.
fn firmware_configuration(item: u16) -> u16 {
    const SELECTOR: u16 = 0x510;
    const DATA: u16 = 0x511;
    outw(SELECTOR, item);
    u16::from_le_bytes([inb(DATA), inb(DATA)])
}

/// A dword of physical memory.
fn read(address: u64) -> u32 {
    // SAFETY: all memory below 4 GiB is mapped to itself.
    unsafe { core::ptr::with_exposed_provenance::<u32>(address as usize).read_volatile() }
}

fn write(address: u64, value: u32) {
    // SAFETY: as for `read`; the callers name devices and memory without other users.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(address as usize).write_volatile(value) }
}

/// The bytes from `start` up to `end`.
fn bytes(start: u64, end: u64) -> &'static [u8] {
    // SAFETY: as for `read`; the loader's strings and modules do not change.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(start as usize), (end - start) as usize) }
}

fn text_at(address: u64) -> &'static str {
    let end = (address..).find(|&at| bytes(at, at + 1) == [0]).unwrap_or(address);
    core::str::from_utf8(bytes(address, end)).unwrap_or("not UTF-8")
}

/// Prints the lines of the only module.
fn environment(info: u64) {
    let count = read(info + info::MODULE_COUNT);
    say("modules", format_args!("{count}"));
    if count == 1 {
        let module = u64::from(read(info + info::MODULES));
        let content = bytes(read(module).into(), read(module + 4).into());
        for line in core::str::from_utf8(content).unwrap_or("not UTF-8").lines() {
            say("environment", format_args!("{line}"));
        }
    }
}

/// Checks that memory between this image and `mem_upper`, which counts from 1 MiB, can be written, and that the map
/// calls it usable.
fn memory(info: u64) {
    let top = u64::from(read(info + info::MEM_UPPER)) * 1024;
    say("at least 256 MiB", format_args!("{}", top >= 256 * MIB));
    let is_ours = |address: u64| {
        write(address, 0x1234_5678);
        write(address + 4, 0);
        read(address) == 0x1234_5678
    };
    say("memory", format_args!("{}", (32 * MIB..top).step_by(MIB as usize).all(is_ours) && is_ours(top - 8)));
    if read(info + info::FLAGS) & info::HAS_MAP != 0 {
        let map = u64::from(read(info + info::MAP));
        let end = map + u64::from(read(info + info::MAP_LENGTH));
        say("map covers it", format_args!("{}", map_covers(map, end, top)));
    }
}

/// Whether one usable region of the map contains the addresses from 32 MiB to `top`.
fn map_covers(mut entry: u64, end: u64, top: u64) -> bool {
    const USABLE: u32 = 1;
    while entry < end {
        let quad = |offset| u64::from(read(entry + offset)) | u64::from(read(entry + offset + 4)) << 32;
        let (start, length, kind) = (quad(4), quad(12), read(entry + 20));
        if kind == USABLE && start <= 32 * MIB && start + length >= top {
            return true;
        }
        entry += u64::from(read(entry)) + 4;
    }
    false
}

fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading these MSRs has no effect.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high) };
    u64::from(high) << 32 | u64::from(low)
}

fn wrmsr(msr: u32, value: u64) {
    // SAFETY: no code here depends on the written values.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) };
}

unsafe extern "C" {
    static startup_code: u8;
    static startup_code_end: u8;
}

/// Switches the local APIC off and on again, sends INIT and SIPI to all other processors, and enters x2APIC mode.
fn local_apic() {
    const ENABLE: u64 = 1 << 11;
    const X2APIC: u64 = 1 << 10;
    const SPURIOUS: u64 = 0xf0;
    const ICR: u64 = 0x300;
    const INIT_ALL_BUT_SELF: u32 = 0xc4500;
    const SIPI_ALL_BUT_SELF: u32 = 0xc4600;
    const X2APIC_ID: u32 = 0x802;
    for port in [0x21, 0xa1] {
        outb(port, 0xff);
    }
    let base = rdmsr(IA32_APIC_BASE) & !(ENABLE | X2APIC);
    wrmsr(IA32_APIC_BASE, base);
    wrmsr(IA32_APIC_BASE, base | ENABLE);
    write(APIC + SPURIOUS, 0x1ff);
    say("APIC version", format_args!("{:#x}", read(APIC + 0x30) & 0xff));
    let code = bytes((&raw const startup_code).addr() as u64, (&raw const startup_code_end).addr() as u64);
    for (address, chunk) in (0..).step_by(4).zip(code.chunks(4)) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        write(address, u32::from_le_bytes(word));
    }
    write(APIC + ICR, INIT_ALL_BUT_SELF);
    write(APIC + ICR, SIPI_ALL_BUT_SELF);
    wrmsr(IA32_APIC_BASE, base | ENABLE | X2APIC);
    say("x2APIC ID", format_args!("{}", rdmsr(X2APIC_ID)));
}

unsafe extern "C" {
    static vmxon_region: u8;
    static vmcs_region: u8;
}

/// VMXON, VMCLEAR, VMPTRLD, VMXOFF: prints whether each succeeds.
fn vmx() {
    const IA32_FEATURE_CONTROL: u32 = 0x3a;
    const IA32_VMX_BASIC: u32 = 0x480;
    const CR4_VMXE: u64 = 1 << 13;
    say("IA32_FEATURE_CONTROL", format_args!("{:#x}", rdmsr(IA32_FEATURE_CONTROL)));
    let (vmxon, vmcs) = ((&raw const vmxon_region).addr() as u64, (&raw const vmcs_region).addr() as u64);
    for region in [vmxon, vmcs] {
        write(region, rdmsr(IA32_VMX_BASIC) as u32 & 0x7fff_ffff);
    }
    macro_rules! succeeds {
        ($instruction:literal $(, $operand:expr)?) => {{
            let failed: u8;
            // SAFETY: the regions are this function's own.
            unsafe { asm!($instruction, "setbe {failed}", failed = out(reg_byte) failed, $(in("rdx") $operand)?) };
            say($instruction, format_args!("{}", failed == 0));
        }};
    }
    // SAFETY: setting VMXE has no other effect.
    unsafe { asm!("mov {0}, cr4", "or {0}, {1}", "mov cr4, {0}", out(reg) _, in(reg) CR4_VMXE) };
    succeeds!("vmxon [rdx]", &raw const vmxon);
    succeeds!("vmclear [rdx]", &raw const vmcs);
    succeeds!("vmptrld [rdx]", &raw const vmcs);
    succeeds!("vmxoff");
}

/// Causes a triple fault: an exception without a handler.
fn triple_fault() -> ! {
    #[repr(C, packed)]
    struct NoTable(u16, u64);
    say("triple fault", format_args!("now"));
    let no_table = NoTable(0, 0);
    // SAFETY: the machine ends here.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const no_table, options(noreturn)) }
}

/// Ends the machine, with an exit code if the machine has a port for that.
fn exit(code: u32) -> ! {
    outl(EXIT_PORT, code);
    for &byte in SHUTDOWN_TEXT {
        outb(SHUTDOWN_PORT, byte);
    }
    loop {
        core::hint::spin_loop();
    }
}

/// Programs COM1: 115200 baud, 8 bits, no FIFO, no interrupts.
fn init_com1() {
    const DIVISOR_LATCH: u8 = 0x80;
    let line_control = inb(COM1 + 3);
    outb(COM1 + 3, line_control | DIVISOR_LATCH);
    for (register, value) in [(0, 1), (1, 0), (3, 3), (1, 0), (2, 0), (4, 3)] {
        outb(COM1 + register, value);
    }
}

fn say(what: &str, result: fmt::Arguments<'_>) {
    // Writing to a port cannot fail.
    let _ = writeln!(Com1, "test image: {what}: {result}");
}

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const HOLDING_REGISTER_EMPTY: u8 = 1 << 5;
        for byte in text.bytes() {
            while inb(COM1 + 5) & HOLDING_REGISTER_EMPTY == 0 {}
            outb(COM1, byte);
        }
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say("panic", format_args!("{info}"));
    exit(1)
}
