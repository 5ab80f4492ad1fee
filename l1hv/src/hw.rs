//! The traits of `shadow` and `ept`, implemented on the real machine.

use core::fmt;

use boot::acpi::sleep::SleepControl;
use boot::cmdline::TripleFault;
use boot::stop::StopKind;
use ept::map::OutOfTables;
use ept::{Eptp01, Gpa, Hpa, PageSize};
use shadow::cpuid::CpuidView;
use shadow::exit::{ExitReason, IoAccess};
use shadow::hw::GuestMemory;
use shadow::mtrr::Mtrrs;
use shadow::nested::{self, Invept, Invvpid, Machine, Protection, Stop, WatchedMemory};
use shadow::permission::Access;
use shadow::watch::{MergedAs, ProcessorWritten, Watches};

use crate::arch::enter::GuestRegisters;
use crate::arch::vmx::{self, Vmcss};
use crate::arch::{apic, cpu, msr, on_behalf};
use crate::bios::DiskStart;
use crate::ept01::Ept01;
use crate::log::warn_of_repeatable;
use crate::mem::{GuestRam, HeldPages, HostRegion, PAGE_BYTES};
use crate::processor::{self, Processor, Requests};
use crate::shadow_fields::ShadowFields;
use crate::sleep;
use crate::stop::{StopReason, stop, stop_internal};
use crate::tables::TablePool;

/// A logical processor of the guest hypervisor, on a real one.
pub type Vcpu = nested::Vcpu<Hardware>;

/// The real processor, and the parts of the host that a virtual cpu refers to.
#[derive(Debug)]
pub struct Hardware {
    /// EPT01.
    pub ept01: &'static Ept01,
    /// The part of this processor that the others see, counters included.
    pub processor: &'static Processor,
    /// The guest hypervisor's view of CPUID.
    pub cpuid: &'static CpuidView,
    /// The fields that the guest hypervisor accesses without an exit.
    pub shadow_fields: &'static ShadowFields,
    /// The MTRRs of the guest hypervisor.
    pub mtrrs: Mtrrs,
    /// The registers that put the machine to sleep.
    pub sleep: &'static SleepControl,
    /// Whether a guest may have the counters printed: the option `stats`.
    pub prints_stats: bool,
    /// The effect of a triple fault: the option `triple-fault`.
    pub on_triple_fault: TripleFault,
    /// Whether VMCALL may be a hypercall: the option `hypercalls`.
    pub takes_hypercalls: bool,
    /// The disk that the guest has begun with, if it has.
    pub disk: Option<DiskStart>,
}

impl Machine for Hardware {
    type Registers = GuestRegisters;
    type Vmcss = Vmcss;
    type Memory = GuestPhysical;
    type Tables = TablePool;

    #[inline]
    fn invept(&self, what: Invept) {
        vmx::invept(what);
    }

    #[inline]
    fn invvpid(&self, what: Invvpid) {
        vmx::invvpid(what);
    }

    fn read_msr(&self, number: u32) -> Option<u64> {
        self.mtrrs.read(number).or_else(|| msr::try_read(number))
    }

    fn write_msr(&self, number: u32, value: u64) -> Option<()> {
        if Mtrrs::has(number) { self.mtrrs.write(number, value) } else { on_behalf::wrmsr(number, value).ok() }
    }

    fn access_port(&self, access: IoAccess, value: u32) -> u32 {
        sleep::access(self.sleep, access, value)
    }

    fn pkru(&self) -> u32 {
        cpu::pkru()
    }

    fn set_cr2(&self, address: u64) {
        on_behalf::set_cr2(address);
    }

    #[cold]
    fn note_task_switch_trap(&self) {
        on_behalf::note_task_switch_trap();
    }

    #[inline]
    fn ept01(&self) -> Eptp01 {
        self.ept01.root()
    }

    fn map_beyond(&self, tables: &mut TablePool, address: Gpa) -> Result<bool, OutOfTables> {
        self.ept01.writer().map_beyond(tables, address)
    }

    fn map_to_nothing(&self, address: Gpa) {
        self.ept01.writer().map_to_nothing(address);
    }

    fn protect(&self, tables: &mut TablePool, watches: &Watches, page: Gpa, wanted: bool) -> (usize, Protection) {
        let writer = self.ept01.writer();
        let was_protected = self.ept01.is_protected(page);
        let (slot, loser) = watches.assign(page);
        if let Some(loser) = loser
            && !processor::is_watched(loser)
        {
            writer.permit_writes(loser);
        }
        let protection = if !wanted {
            Protection::Impossible
        } else if was_protected {
            // The code that protected the page first has requested a flush already.
            Protection::Already(processor::last_flush())
        } else if writer.protect(tables, page).is_err() {
            Protection::Impossible
        } else if processor::is_written_by_one(page) {
            writer.permit_writes(page);
            Protection::Impossible
        } else {
            Protection::New(self.processor.request_flush_of_others())
        };
        (slot, protection)
    }

    fn all_have_flushed(&self, flush: u64) -> bool {
        processor::all_have_flushed(flush)
    }

    fn note_flush(&self, flush: u64) {
        self.processor.note_flush(flush);
    }

    fn take_kick(&self) -> bool {
        self.processor.take_kick()
    }

    fn request_nmi(&self) {
        self.processor.request(Requests::NMI);
    }

    fn waits_for_sipi(&self) -> bool {
        self.processor.waits_for_sipi()
    }

    fn send_init_to_self(&self) -> bool {
        apic::send_init_to_self()
    }

    #[inline]
    fn count_reflected(&self, reason: ExitReason) {
        self.processor.stats.reflect(reason);
    }

    fn count_field_access(&self, encoding: u64, access: Access) {
        self.shadow_fields.count(encoding, access);
    }

    fn warn(&self, line: fmt::Arguments<'_>) {
        warn_of_repeatable(line);
    }

    fn stop(&self, why: Stop) -> ! {
        match why {
            Stop::VmxAbort(reason) => {
                let number = reason as u32;
                let message = format_args!("VMX abort {number} ({reason:?}): the guest hypervisor's VMCS is at fault");
                stop(StopReason::new(StopKind::VmxAbort, message))
            }
            Stop::NoTables => {
                stop_internal!("no table is left for an EPT02: raise ept-tables=COUNT or host-memory=MIB")
            }
        }
    }
}

/// The guest hypervisor's physical memory. EPT01 is an identity map with a hole and pages that the host holds, and behind
/// them is one scratch page.
#[derive(Debug)]
pub struct GuestPhysical {
    ram: GuestRam,
    hole: HostRegion,
    held: &'static HeldPages,
    scratch: Hpa,
    ept01: &'static Ept01,
    /// Pages that the host has merged, by [`MergedAs`].
    watches: [Watches; MergedAs::COUNT],
    /// Pages that vmcs02 gives this processor to write to.
    written: &'static ProcessorWritten,
}

impl GuestPhysical {
    /// `scratch` is what the guest hypervisor finds wherever it looks into `hole` and at `held`; `processor` is where
    /// others see which pages this processor has merged.
    pub fn new(
        ram: GuestRam,
        hole: HostRegion,
        held: &'static HeldPages,
        scratch: Hpa,
        ept01: &'static Ept01,
        processor: &'static Processor,
    ) -> Self {
        let watches = processor.watched.each_ref().map(Watches::new);
        Self { ram, hole, held, scratch, ept01, watches, written: &processor.written }
    }
}

impl WatchedMemory for GuestPhysical {
    #[inline(always)]
    fn watches(&self, kind: MergedAs) -> &Watches {
        &self.watches[kind as usize]
    }

    fn unwatch(&self, address: Gpa) {
        if self.ept01.is_protected(address) {
            let page = address.align_down(PageSize::Size4K);
            let writer = self.ept01.writer();
            processor::strike(page);
            writer.permit_writes(page);
        }
    }

    fn written(&self) -> &ProcessorWritten {
        self.written
    }

    fn is_host(&self, address: Gpa) -> bool {
        self.hole.range().contains(&Hpa(address.0)) || self.held.touch(address.0, address.0.saturating_add(1))
    }
}

impl GuestMemory for GuestPhysical {
    fn read(&self, from: Gpa, to: &mut [u8]) {
        self.ram.read(Hpa(from.0), to);
    }

    fn write(&self, to: Gpa, from: &[u8]) {
        self.ram.write(Hpa(to.0), from);
        // The host's writes do not go through EPT01.
        let end = to.0.saturating_add(from.len() as u64);
        for page in (to.align_down(PageSize::Size4K).0..end).step_by(PAGE_BYTES as usize) {
            self.unwatch(Gpa(page));
        }
    }

    fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
        let is_done = self.ram.compare_exchange_u64(Hpa(at.0), seen, new);
        self.unwatch(at);
        is_done
    }

    fn translate(&self, address: Gpa) -> Hpa {
        let is_beyond = address >= self.ept01.limit();
        if is_beyond || self.is_host(address) { self.scratch + address.0 % PAGE_BYTES } else { Hpa(address.0) }
    }

    fn read_u64(&self, from: Gpa) -> u64 {
        if from.0.is_multiple_of(8) {
            return self.ram.read_u64(Hpa(from.0));
        }
        let mut bytes = [0; 8];
        self.ram.read(Hpa(from.0), &mut bytes);
        u64::from_le_bytes(bytes)
    }
}
