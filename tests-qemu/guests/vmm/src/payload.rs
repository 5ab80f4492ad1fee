//! Runs the bare-metal payload and checks its report.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use guest_abi::payload::{
    CHAIN, CHAIN_LENGTH, COUNTED_TOUCH_BASE, CPUID_LEAF, CPUID_SUBLEAVES, EVENT_PORT, EXIT_PORT, MMIO_ANSWER,
    MMIO_STORE, NOTHING, OPERATIONS, PIO_PORT, Part, REPEATS, SAMPLES_PORT, SLEEP_TICKS, Sample, TOUCH_BASE,
    TOUCH_STRIDE, TOUCHED_PAGES, WARM_UP, answer,
};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuExit};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::{Interrupts, Vm};
use crate::{elf, report};

const MEMORY: u64 = 192 << 20;

/// The frequency of KVM's APIC timer: a tick per nanosecond.
const APIC_TIMER_KHZ: u64 = 1_000_000;

/// The stack, below the payload's image. The calling convention assumes that a call has just pushed eight bytes.
const STACK_TOP: u64 = 0x20_0000 - 8;

/// CPUID.80000001H:EDX.
const LONG_MODE: u32 = 1 << 29;

/// CPUID.80000008H:EAX: 48 linear, 36 physical.
const ADDRESS_BITS: u32 = 48 << 8 | 36;

/// Runs the payload in `file`, with `counted_rounds` rounds for an emulator that counts. Fails unless each answer was
/// right.
pub fn run(file: &Path, counted_rounds: u64) -> Result<()> {
    let image = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    report::mark("payload-begin");
    let exits = exits(&image, counted_rounds)?;
    let (sleep, tsc_khz) = sleep(&image, counted_rounds)?;
    report::mark("payload-end");
    judge(&[exits, sleep].concat(), tsc_khz)
}

/// [`Part::EXITS`].
fn exits(image: &[u8], counted_rounds: u64) -> Result<Vec<Sample>> {
    let mut vm = Vm::new(MEMORY, Interrupts::Absent)?;
    for base in [TOUCH_BASE, COUNTED_TOUCH_BASE] {
        for n in 0..TOUCHED_PAGES as u32 {
            let page = GuestAddress(base + u64::from(n) * TOUCH_STRIDE);
            vm.memory.write_obj(answer(n), page)?;
        }
    }
    let event = EventFd::new(0).context("eventfd")?;
    let port = IoEventAddress::Pio(EVENT_PORT.into());
    vm.fd.register_ioevent(&event, &port, NoDatamatch).context("KVM_IOEVENTFD")?;
    vm.vcpu.set_cpuid2(&cpuid()?).context("KVM_SET_CPUID2")?;
    let samples = start(&mut vm, image, Part::EXITS, 0, counted_rounds)?;
    report::kvm_stats("payload");
    let events = event.read().context("eventfd")?;
    let expected = 2 * (WARM_UP as u64 + (1 + counted_rounds) * REPEATS as u64);
    ensure!(events == expected, "the eventfd was woken {events} times of {expected}");
    Ok(samples)
}

/// [`Part::SLEEP`]. Also returns the frequency of the TSC.
fn sleep(image: &[u8], counted_rounds: u64) -> Result<(Vec<Sample>, u64)> {
    let mut vm = Vm::new(MEMORY, Interrupts::InKernel)?;
    let cpuid = vm.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    vm.vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let tsc_khz = u64::from(vm.vcpu.get_tsc_khz().context("KVM_GET_TSC_KHZ")?);
    let sleep_ticks = u64::from(SLEEP_TICKS) * tsc_khz / APIC_TIMER_KHZ;
    Ok((start(&mut vm, image, Part::SLEEP, sleep_ticks, counted_rounds)?, tsc_khz))
}

/// Loads the payload and lets it do one part. A sleep takes `sleep_ticks` ticks of the TSC.
fn start(vm: &mut Vm, image: &[u8], part: Part, sleep_ticks: u64, counted_rounds: u64) -> Result<Vec<Sample>> {
    let rip = elf::load(image, &vm.memory)?;
    let (rdi, rsi, rdx) = (part.0, sleep_ticks, counted_rounds);
    vm.enter_long_mode(kvm_regs { rip, rsp: STACK_TOP, rdi, rsi, rdx, ..Default::default() })?;
    serve(vm)
}

/// The leaf that the payload asks for, and the leaves that a processor in 64-bit mode must have.
fn cpuid() -> Result<CpuId> {
    let answers = (0..CPUID_SUBLEAVES).map(|index| kvm_cpuid_entry2 {
        function: CPUID_LEAF,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: answer(index),
        ..Default::default()
    });
    let features = kvm_cpuid_entry2 { function: 0x8000_0001, edx: LONG_MODE, ..Default::default() };
    let address_sizes = kvm_cpuid_entry2 { function: 0x8000_0008, eax: ADDRESS_BITS, ..Default::default() };
    let entries: Vec<_> = answers.chain([features, address_sizes]).collect();
    CpuId::from_entries(&entries).map_err(|error| anyhow::anyhow!("CPUID table: {error:?}"))
}

/// Answers the payload's accesses until it is done.
fn serve(vm: &mut Vm) -> Result<Vec<Sample>> {
    let (mut port_input, mut mmio_input, mut samples_at) = (0, 0, 0);
    loop {
        match vm.vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(PIO_PORT, data) => port_input = dword(data)?,
            VcpuExit::IoIn(PIO_PORT, data) => data.copy_from_slice(&answer(port_input).to_le_bytes()),
            VcpuExit::MmioWrite(MMIO_STORE, data) => mmio_input = dword(data)?,
            VcpuExit::MmioRead(MMIO_ANSWER, data) => data.copy_from_slice(&answer(mmio_input).to_le_bytes()),
            VcpuExit::IoOut(SAMPLES_PORT, data) => samples_at = dword(data)?,
            VcpuExit::IoOut(EXIT_PORT, data) => {
                let count = dword(data)?;
                return (0..count).map(|index| sample(vm, samples_at, index)).collect();
            }
            VcpuExit::Shutdown => bail!("the payload met a triple fault"),
            exit => bail!("the payload caused {exit:?}, which nothing in it should"),
        }
    }
}

fn dword(data: &[u8]) -> Result<u32> {
    let bytes: [u8; 4] = data.try_into().context("the payload accesses dwords only")?;
    Ok(u32::from_le_bytes(bytes))
}

fn sample(vm: &Vm, base: u32, index: u32) -> Result<Sample> {
    let at = u64::from(base) + u64::from(index) * size_of::<Sample>() as u64;
    let word = |offset| vm.memory.read_obj::<u32>(GuestAddress(at + offset));
    let long = |offset| vm.memory.read_obj::<u64>(GuestAddress(at + offset));
    Ok(Sample {
        operation: word(0)?,
        right: word(4)?,
        minimum: long(8)?,
        percentile_1: long(16)?,
        median: long(24)?,
        percentile_99: long(32)?,
    })
}

/// Reports the properties of the TSC that the payload's readings show.
fn report_processor(samples: &[Sample], tsc_khz: u64) -> Result<()> {
    let median = |operation| samples.iter().find(|sample| sample.operation == operation).map(|sample| sample.median);
    let (nothing, chain) = median(NOTHING).zip(median(CHAIN)).context("the payload did not measure how it measures")?;
    report::result(
        "processor",
        json!({
            "tsc_khz": tsc_khz,
            "is_emulated": chain.saturating_sub(nothing).abs_diff(CHAIN_LENGTH) < CHAIN_LENGTH / 100,
            "ticks_of_nothing": nothing,
        }),
    );
    Ok(())
}

fn judge(samples: &[Sample], tsc_khz: u64) -> Result<()> {
    report_processor(samples, tsc_khz)?;
    let samples: Vec<&Sample> = samples.iter().filter(|sample| sample.operation < NOTHING).collect();
    ensure!(
        samples.len() == OPERATIONS.len(),
        "the payload reports {} operations of {}",
        samples.len(),
        OPERATIONS.len()
    );
    for sample in &samples {
        let name = OPERATIONS.get(sample.operation as usize).context("unknown operation")?;
        report::result(
            "payload",
            json!({
                "operation": name,
                "repeats": REPEATS,
                "right": sample.right,
                "minimum": sample.minimum,
                "percentile_1": sample.percentile_1,
                "median": sample.median,
                "percentile_99": sample.percentile_99,
            }),
        );
    }
    for (sample, name) in samples.iter().zip(OPERATIONS) {
        ensure!(sample.right as usize == REPEATS, "{name}: {} of {REPEATS} answers were right", sample.right);
    }
    report::result("done", json!({ "of": "payload" }));
    Ok(())
}
