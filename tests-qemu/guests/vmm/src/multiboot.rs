//! Boots a multiboot 1 image that is a 64-bit ELF file and needs only a command line of its loader, as the minimal
//! guest hypervisor does.
//!
//! Reference: Multiboot Specification 0.6.96, 3.2 "Machine state" and 3.3 "Boot information format".

use std::path::Path;

use anyhow::{Context, Result, bail};
use guest_abi::NESTED_PREFIX;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs};
use kvm_ioctls::VcpuExit;
use protocol::EXIT_PORT;
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{Interrupts, Vm};
use crate::serial::{self, Serial};
use crate::{elf, report};

const MEMORY: u64 = 128 << 20;

const LOADER_MAGIC: u64 = 0x2bad_b002;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const INFO: u64 = 0x7000;
const INFO_COMMAND_LINE: u64 = INFO + 16;
const COMMAND_LINE: u64 = 0x8000;

const IA32_FEATURE_CONTROL: u32 = 0x3a;
const LOCKED_WITH_VMX: u64 = 0b101;

/// Runs the image in `file` until it ends the machine with code 0.
pub fn run(file: &Path, arguments: &str) -> Result<()> {
    let image = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut vm = Vm::new(MEMORY, Interrupts::InKernel)?;
    let rip = elf::load(&image, &vm.memory)?;
    vm.memory.write_obj(HAS_COMMAND_LINE, GuestAddress(INFO))?;
    vm.memory.write_obj(COMMAND_LINE as u32, GuestAddress(INFO_COMMAND_LINE))?;
    vm.memory.write_slice(format!("{arguments}\0").as_bytes(), GuestAddress(COMMAND_LINE))?;
    let cpuid = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    vm.vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let feature_control = kvm_msr_entry { index: IA32_FEATURE_CONTROL, data: LOCKED_WITH_VMX, ..Default::default() };
    let msrs = Msrs::from_entries(&[feature_control]).map_err(|error| anyhow::anyhow!("MSR list: {error:?}"))?;
    vm.vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
    vm.enter_protected_mode(kvm_regs { rip, rax: LOADER_MAGIC, rbx: INFO, ..Default::default() })?;
    serve(&mut vm)?;
    report::result("done", json!({ "of": "minimal" }));
    Ok(())
}

fn serve(vm: &mut Vm) -> Result<()> {
    let mut serial = Serial::default();
    loop {
        match vm.vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(port @ serial::BASE..=serial::LAST, data) => {
                if let Some(line) = data.first().and_then(|&byte| serial.write(port, byte)) {
                    println!("{NESTED_PREFIX}{line}");
                }
            }
            VcpuExit::IoIn(port @ serial::BASE..=serial::LAST, data) => data.fill(serial.read(port)),
            VcpuExit::IoOut(EXIT_PORT, data) => match data.iter().any(|&byte| byte != 0) {
                true => bail!("the image ended with {data:?}"),
                false => return Ok(()),
            },
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::Shutdown => bail!("the image met a triple fault"),
            exit => bail!("the image caused {exit:?}"),
        }
    }
}
