//! The processors of a virtual machine that runs Linux, and the devices that they share.

use std::io::ErrorKind;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use guest_abi::{CLOCK_PREFIX, NESTED_INIT, NESTED_PREFIX};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestMemoryMmap;

use crate::serial::{self, Serial};
use crate::{cpu, report};

const CMOS_DATA: u16 = 0x71;
/// The port at which a write with [`RESET_CPU`] resets the machine.
pub const RESET_CONTROL: u16 = 0xcf9;
/// See [`RESET_CONTROL`].
pub const RESET_CPU: u8 = 1 << 2;

const FEATURES_LEAF: u32 = 1;
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
/// CPUID.1:EDX: EBX holds the number of processors in a package.
const HTT: u32 = 1 << 28;

/// The CPUID that KVM supports, for processor `id` of `count`.
pub fn cpuid(kvm: &Kvm, id: u8, count: u8) -> Result<CpuId> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    if count == 1 {
        return Ok(cpuid);
    }
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            FEATURES_LEAF => {
                entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | u32::from(id) << 24;
                entry.edx |= HTT;
            }
            leaf if TOPOLOGY_LEAVES.contains(&leaf) => entry.edx = id.into(),
            _ => {}
        }
    }
    Ok(cpuid)
}

/// The state that all processors use.
#[derive(Debug)]
pub struct Machine {
    fd: VmFd,
    /// KVM uses this memory, so it must live as long as the last thread.
    _memory: GuestMemoryMmap,
    devices: Mutex<Devices>,
}

#[derive(Debug)]
struct Devices {
    began: Instant,
    serial: Serial,
    init_at: Option<u64>,
}

/// The TSC at the first line of the guest's init, if it has printed one.
pub type InitAt = Option<u64>;

impl Machine {
    /// The virtual machine behind `fd` with `memory`.
    pub fn new(fd: VmFd, memory: GuestMemoryMmap) -> Arc<Self> {
        Arc::new(Self {
            fd,
            _memory: memory,
            devices: Mutex::new(Devices { began: Instant::now(), serial: Serial::default(), init_at: None }),
        })
    }

    /// Runs each processor on a thread of its own. The first processor that ends also ends the machine. Threads end
    /// with the process.
    pub fn run(self: &Arc<Self>, processors: Vec<VcpuFd>) -> Result<InitAt> {
        let (sender, ends): (_, Receiver<Result<InitAt>>) = mpsc::channel();
        for processor in processors {
            let (machine, sender) = (Arc::clone(self), sender.clone());
            thread::spawn(move || {
                // The channel is closed if another processor has ended the machine.
                let _ = sender.send(machine.serve(processor));
            });
        }
        ends.recv().context("the machine has no processors")?
    }

    /// Runs a processor until it asks for a reset.
    fn serve(&self, mut processor: VcpuFd) -> Result<InitAt> {
        loop {
            let exit = match processor.run() {
                Ok(exit) => exit,
                // The processor waits for SIPI, or the call was interrupted.
                Err(error) => match std::io::Error::from(error).kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => continue,
                    _ => return Err(error).context("KVM_RUN"),
                },
            };
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let was_up = devices.serial.interrupt();
            match exit {
                VcpuExit::IoOut(port @ serial::BASE..=serial::LAST, data) => devices.write_serial(port, data),
                VcpuExit::IoIn(port @ serial::BASE..=serial::LAST, data) => data.fill(devices.serial.read(port)),
                VcpuExit::IoOut(RESET_CONTROL, [value]) if value & RESET_CPU != 0 => return Ok(devices.init_at),
                // A clock that reads as 0 and is never being updated.
                VcpuExit::IoIn(CMOS_DATA, data) => data.fill(0),
                VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(0xff),
                VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) => {}
                VcpuExit::Shutdown => bail!("the nested guest met a triple fault"),
                exit => bail!("the nested guest caused {exit:?}"),
            }
            // Sets the interrupt line to the UART's level.
            let is_up = devices.serial.interrupt();
            if is_up != was_up {
                self.fd.set_irq_line(serial::IRQ, is_up).context("KVM_IRQ_LINE")?;
            }
        }
    }
}

impl Devices {
    fn write_serial(&mut self, port: u16, data: &[u8]) {
        let Some(line) = data.first().and_then(|&byte| self.serial.write(port, byte)) else { return };
        if line.contains(NESTED_INIT) && self.init_at.is_none() {
            self.init_at = Some(cpu::tsc());
            cpu::count("nested-init");
        }
        println!("{NESTED_PREFIX}{line}");
        if line.contains(CLOCK_PREFIX) {
            report::clock(self.began.elapsed());
        }
    }
}
