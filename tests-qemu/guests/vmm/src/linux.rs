//! Boots a bzImage by the 64-bit boot protocol and follows its console.
//!
//! Offsets are those of Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_ioctls::VcpuExit;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{Interrupts, Vm};
use crate::serial::{self, Serial};
use crate::{cpu, report};

/// What the nested guest's init prints first.
const INIT_LINE: &str = "L1HV-NESTED-INIT";

const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const LOW_MEMORY_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
const ENTRY_64: u64 = 0x200;

const E820_ENTRIES: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const SETUP_HEADER_LENGTH: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const TYPE_OF_LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_ADDRESS: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const EXTENDED_LOAD_FLAGS: usize = 0x236;
const PREFERRED_ADDRESS: usize = 0x258;
const E820_TABLE: usize = 0x2d0;

const SECTOR: usize = 512;
const UNKNOWN_LOADER: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u8 = 1;
const E820_RAM: u32 = 1;

const CMOS_DATA: u16 = 0x71;
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;

/// Boots `kernel` with `initrd` in `memory` bytes; fails unless its init said so and then asked for a reset.
pub fn run(memory: u64, kernel: &Path, initrd: &Path, arguments: &str) -> Result<()> {
    let read = |file: &Path| std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    let (kernel, initrd) = (read(kernel)?, read(initrd)?);
    let mut vm = Vm::new(memory, Interrupts::InKernel)?;
    let load_address = load(&vm, memory, &kernel, &initrd, arguments)?;
    let cpuid = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    vm.vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    vm.enter_long_mode(kvm_regs { rip: load_address + ENTRY_64, rsi: ZERO_PAGE, ..Default::default() })?;
    report::mark("nested-begin");
    let began = cpu::tsc();
    let init_at = serve(&mut vm)?;
    report::mark("nested-end");
    report::kvm_stats("linux");
    let init_at = init_at.context("the nested guest asked for a reset before its init ran")?;
    report::result("linux", json!({ "ticks_to_init": init_at - began }));
    report::result("done", json!({ "of": "linux" }));
    Ok(())
}

/// Puts kernel, initrd, command line and zero page into memory; returns the kernel's address.
fn load(vm: &Vm, memory: u64, kernel: &[u8], initrd: &[u8], arguments: &str) -> Result<u64> {
    ensure!(kernel.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS"), "not a bzImage");
    ensure!(kernel[EXTENDED_LOAD_FLAGS] & KERNEL_64 != 0, "the kernel has no 64-bit entry point");
    let setup_sectors = match kernel[SETUP_HEADER] {
        0 => 4,
        count => usize::from(count),
    };
    let body = kernel.get((setup_sectors + 1) * SECTOR..).context("truncated bzImage")?;
    let preferred: [u8; 8] = kernel[PREFERRED_ADDRESS..PREFERRED_ADDRESS + 8].try_into()?;
    let load_address = u64::from_le_bytes(preferred);
    let initrd_address = (memory - initrd.len() as u64) & !0xfff;

    let mut page = [0_u8; 4096];
    let header_end = HEADER_MAGIC + usize::from(kernel[SETUP_HEADER_LENGTH]);
    page[SETUP_HEADER..header_end].copy_from_slice(&kernel[SETUP_HEADER..header_end]);
    page[TYPE_OF_LOADER] = UNKNOWN_LOADER;
    page[LOAD_FLAGS] |= LOADED_HIGH;
    let mut put = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(RAMDISK_ADDRESS, initrd_address as u32);
    put(RAMDISK_SIZE, initrd.len() as u32);
    put(COMMAND_LINE_POINTER, COMMAND_LINE as u32);
    for (index, (base, end)) in [(0, LOW_MEMORY_END), (HIGH_MEMORY, memory)].into_iter().enumerate() {
        let entry = E820_TABLE + index * 20;
        put(entry, base as u32);
        put(entry + 8, (end - base) as u32);
        put(entry + 16, E820_RAM);
    }
    page[E820_ENTRIES] = 2;

    vm.memory.write_slice(&page, GuestAddress(ZERO_PAGE))?;
    vm.memory.write_slice(format!("{arguments}\0").as_bytes(), GuestAddress(COMMAND_LINE))?;
    vm.memory.write_slice(initrd, GuestAddress(initrd_address))?;
    vm.memory.write_slice(body, GuestAddress(load_address))?;
    Ok(load_address)
}

/// Runs the guest until it asks for a reset; returns the TSC when its init spoke.
fn serve(vm: &mut Vm) -> Result<Option<u64>> {
    let mut serial = Serial::default();
    let mut init_at = None;
    loop {
        let was_up = serial.interrupt();
        match vm.vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(port @ serial::BASE..=serial::LAST, data) => {
                if let Some(line) = data.first().and_then(|&byte| serial.write(port, byte)) {
                    if line.contains(INIT_LINE) && init_at.is_none() {
                        init_at = Some(cpu::tsc());
                        cpu::count("nested-init");
                    }
                    println!("nested: {line}");
                }
            }
            VcpuExit::IoIn(port @ serial::BASE..=serial::LAST, data) => data.fill(serial.read(port)),
            VcpuExit::IoOut(RESET_CONTROL, [value]) if value & RESET_CPU != 0 => return Ok(init_at),
            // A clock that is never being updated, at the epoch of its choice.
            VcpuExit::IoIn(CMOS_DATA, data) => data.fill(0),
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::Shutdown => bail!("the nested guest met a triple fault"),
            exit => bail!("the nested guest caused {exit:?}"),
        }
        sync_interrupt(vm, was_up, &serial)?;
    }
}

/// Brings the interrupt line to where the UART has it.
fn sync_interrupt(vm: &Vm, was_up: bool, serial: &Serial) -> Result<()> {
    if serial.interrupt() != was_up {
        vm.fd.set_irq_line(serial::IRQ, serial.interrupt()).context("KVM_IRQ_LINE")?;
    }
    Ok(())
}
