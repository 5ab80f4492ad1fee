//! Boots a bzImage by the 64-bit boot protocol and follows its console.
//!
//! Offsets are those of Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_regs;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{Interrupts, Vm};
use crate::processors::{self, Machine, RESET_CONTROL, RESET_CPU};
use crate::{acpi, cpu, report};

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

/// Size of the virtual machine.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Bytes of memory.
    pub memory: u64,
    /// Processors. A machine with one processor has no ACPI tables.
    pub processors: u8,
}

/// Boots `kernel` with `initrd`. Fails unless its init has printed its line and then asked for a reset.
pub fn run(size: Size, kernel: &Path, initrd: &Path, arguments: &str) -> Result<()> {
    let Size { memory, processors } = size;
    let read = |file: &Path| std::fs::read(file).with_context(|| format!("cannot read {}", file.display()));
    let (kernel, initrd) = (read(kernel)?, read(initrd)?);
    let vm = Vm::new(memory, Interrupts::InKernel)?;
    let load_address = load(&vm, memory, &kernel, &initrd, arguments)?;
    if processors > 1 {
        acpi::write(&vm.memory, processors, (RESET_CONTROL, RESET_CPU))?;
    }
    let others = (1..processors).map(|id| vm.fd.create_vcpu(id.into()).context("KVM_CREATE_VCPU"));
    let others = others.collect::<Result<Vec<_>>>()?;
    for (id, vcpu) in std::iter::once(&vm.vcpu).chain(&others).enumerate() {
        let cpuid = processors::cpuid(&vm.kvm, id as u8, processors)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    }
    vm.enter_long_mode(kvm_regs { rip: load_address + ENTRY_64, rsi: ZERO_PAGE, ..Default::default() })?;
    report::mark("nested-begin");
    let began = cpu::tsc();
    let machine = Machine::new(vm.fd, vm.memory);
    let init_at = machine.run(std::iter::once(vm.vcpu).chain(others).collect())?;
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
