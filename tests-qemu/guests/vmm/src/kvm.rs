//! A virtual machine, whose first processor starts in 64-bit mode or in protected mode.
#![allow(unsafe_code, reason = "KVM is told where the guest's memory is")]

use anyhow::{Context, Result};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Three pages below 4 GiB that KVM may use on processors without unrestricted guest, and another page for its identity
/// map.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
/// Four page directories: 4 GiB.
const PAGE_DIRECTORIES: u64 = 0xb000;
const PAGE_SIZE: u64 = 0x1000;

/// Selectors that the Linux boot protocol asks for.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

const CR0_PG: u64 = 1 << 31;
const CR0_PE_ET_NE_PG: u64 = 1 | 1 << 4 | 1 << 5 | CR0_PG;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;

/// Interrupt hardware of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    /// PIC, IOAPIC, local APIC and PIT in KVM.
    InKernel,
    /// None.
    Absent,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    pub kvm: Kvm,
    pub fd: VmFd,
    /// The first processor.
    pub vcpu: VcpuFd,
    pub memory: GuestMemoryMmap,
}

impl Vm {
    /// A machine with `bytes` of memory from address 0.
    pub fn new(bytes: u64, interrupts: Interrupts) -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let fd = kvm.create_vm().context("KVM_CREATE_VM")?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        fd.set_tss_address(TSS_ADDRESS).context("KVM_SET_TSS_ADDR")?;
        if interrupts == Interrupts::InKernel {
            fd.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            fd.create_pit2(pit).context("KVM_CREATE_PIT2")?;
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes as usize)])?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: bytes,
            userspace_addr: memory.get_host_address(GuestAddress(0))?.addr() as u64,
            flags: 0,
        };
        // SAFETY: the mapping covers the region, has no other user, and lives in `Vm` as long as the machine.
        unsafe { fd.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        let vcpu = fd.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        Ok(Self { kvm, fd, vcpu, memory })
    }

    /// Puts the processor into 64-bit mode with 4 GiB mapped one to one.
    pub fn enter_long_mode(&self, registers: kvm_regs) -> Result<()> {
        self.write_tables()?;
        let mut sregs = self.vcpu.get_sregs()?;
        sregs.cs = segment(CODE_SELECTOR, 0xb, CodeSize::Long);
        let data = segment(DATA_SELECTOR, 0x3, CodeSize::Legacy);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 31;
        sregs.cr0 = CR0_PE_ET_NE_PG;
        sregs.cr3 = PML4;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME_LMA;
        self.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let registers = kvm_regs { rflags: RFLAGS_FIXED, ..registers };
        self.vcpu.set_regs(&registers).context("KVM_SET_REGS")
    }

    /// Puts the processor into flat 32-bit protected mode without paging.
    pub fn enter_protected_mode(&self, registers: kvm_regs) -> Result<()> {
        let mut sregs = self.vcpu.get_sregs()?;
        sregs.cs = segment(CODE_SELECTOR, 0xb, CodeSize::Legacy);
        let data = segment(DATA_SELECTOR, 0x3, CodeSize::Legacy);
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cr0 = CR0_PE_ET_NE_PG & !CR0_PG;
        self.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let registers = kvm_regs { rflags: RFLAGS_FIXED, ..registers };
        self.vcpu.set_regs(&registers).context("KVM_SET_REGS")
    }

    fn write_tables(&self) -> Result<()> {
        let entry = |address, value: u64| self.memory.write_obj(value, GuestAddress(address));
        entry(PML4, PDPT | PRESENT_WRITABLE)?;
        for directory in 0..4 {
            let table = PAGE_DIRECTORIES + directory * PAGE_SIZE;
            entry(PDPT + directory * 8, table | PRESENT_WRITABLE)?;
            for index in 0..512 {
                let frame = (directory << 30) | (index << 21);
                entry(table + index * 8, frame | LARGE_PAGE | PRESENT_WRITABLE)?;
            }
        }
        // Null, null, 64-bit code, flat data.
        for (index, descriptor) in [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].into_iter().enumerate() {
            entry(GDT + index as u64 * 8, descriptor)?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CodeSize {
    Long,
    Legacy,
}

fn segment(selector: u16, type_: u8, size: CodeSize) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(size == CodeSize::Long),
        db: u8::from(size == CodeSize::Legacy),
        ..Default::default()
    }
}
