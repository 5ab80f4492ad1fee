//! Starts the machine's processors: each enters VMX operation and waits there, in its guest's wait-for-SIPI state,
//! until the guest starts it.

use core::sync::atomic::{AtomicBool, Ordering};

use boot::acpi::{self, Processors, TableError};
use boot::entry::ROLL_CALL_MOST;
use boot::multiboot::BootInfo;
use boot::stop::StopKind;
use ept::Hpa;
use spin::Mutex;

use crate::arch::apic::{self, Ipi};
use crate::arch::phys::BootMemory;
use crate::arch::timer::wait_milliseconds;
use crate::arch::trampoline::TrampolinePage;
use crate::arch::{cpu, gdt, roll_call};
use crate::host::{HostSetup, Start, check_processor};
use crate::mem::{HostPages, PAGE_BYTES, PhysAllocator, stack_end};
use crate::processor::{self, Processor};
use crate::run;
use crate::setup::{self, Shared, VcpuBuilder, VcpuMemory};
use crate::stop::{StopReason, stop, stop_internal};

/// All that a processor needs to start beside its memory and its stack: its descriptor tables, and two regions to ask
/// for its VMCS fields with.
const PAGES_TO_START: u64 = gdt::AREA_PAGES + 2;

/// Where a SIPI can start a processor.
const LOW_MEMORY: core::ops::Range<u64> = 0x1000..0xa_0000;

/// The machine's processors by their APIC ids, the one that this runs on first: those that the firmware lists, and those
/// that answer. A guest can start both kinds, and would start those outside the host that the host does not hold.
pub fn find_processors(acpi_rsdp: Option<u64>, boot_info: &BootInfo) -> Processors {
    let own = cpu::apic_id();
    let listed = acpi::processors(&BootMemory, acpi_rsdp);
    let answered = call_roll(boot_info);
    if !matches!(listed, Ok(Some(_))) && answered.is_none() && cpu::is_one_of_several() {
        stop_unless_held(format_args!(
            "the firmware's list of processors is missing or unusable, and nothing else tells which there are"
        ));
    }
    let listed = match listed {
        Ok(listed) => listed.unwrap_or_default(),
        Err(error @ TableError::TooManyProcessors) => stop_unless_held(format_args!("{error}")),
        Err(error) => {
            log::warn!("the firmware's list of processors is unusable: {error}: l1hv holds those that answer");
            Processors::new()
        }
    };
    let answered = answered.unwrap_or_default();
    for id in answered.iter().filter(|id| !listed.contains(id)) {
        log::warn!("the processor with APIC id {id} is in no list of the firmware's: l1hv holds it, too");
    }
    acpi::union(own, &listed, answered).unwrap_or_else(|error| stop_unless_held(format_args!("{error}")))
}

/// The other processors, as they say themselves. `None` if they cannot be asked.
fn call_roll(boot_info: &BootInfo) -> Option<Processors> {
    let page = boot_info.memory_map.find_highest(PAGE_BYTES, PAGE_BYTES, LOW_MEMORY, &boot_info.module_ranges())?;
    let found = roll_call::call(Hpa(page.start))?;
    let ids = &found.ids[..ROLL_CALL_MOST.min(found.come as usize)];
    log::debug!("{} other processors answer", found.come);
    let listed = Processors::try_from(ids);
    Some(listed.unwrap_or_else(|_| stop_unless_held(format_args!("{} processors answer", found.come))))
}

fn stop_unless_held(why: core::fmt::Arguments<'_>) -> ! {
    let message = format_args!(
        "{why}, so that a guest could start one outside l1hv: disable processors in the firmware's settings"
    );
    stop(StopReason::new(StopKind::Processors, message))
}

/// Takes over from the boot and never returns.
pub fn launch(setup: HostSetup<'_>, allocator: PhysAllocator) -> ! {
    let mut builder = VcpuBuilder::new(&setup, allocator, PAGES_TO_START);
    let HostSetup { segments, start: first, .. } = setup;
    let processors = builder.processors;
    processor::publish(processors);
    let Some((own, others)) = processors.split_first() else { stop_internal!("there is no processor") };
    let segments = gdt::move_boot_processor(segments, own);
    let memory = builder.next_memory();
    if !others.is_empty() {
        start(others, &mut builder, &setup);
    }
    let vcpu = setup::build(builder.shared, memory, own, &segments, first);
    match others.len() {
        0 => log::info!("the guest hypervisor starts"),
        _ => log::info!("the guest hypervisor starts on {} processors", processors.len()),
    }
    crate::log::show_on_screen(false);
    run::run(vcpu)
}

/// The parts that a starting processor needs.
struct StartingProcessor {
    processor: &'static Processor,
    area: HostPages,
    regions: [HostPages; 2],
    shared: &'static Shared,
    memory: VcpuMemory,
}

/// The parts for the processor that starts next.
static NEXT: Mutex<Option<StartingProcessor>> = Mutex::new(None);
/// Whether the processor that was started last is about to run its guest.
static IS_READY: AtomicBool = AtomicBool::new(false);

/// Starts one processor after the other (SDM Volume 3A, 10.4.4.1 "Typical BSP Initialization Sequence").
fn start(others: &'static [Processor], builder: &mut VcpuBuilder, setup: &HostSetup<'_>) {
    const START_TIMEOUT_MILLISECONDS: u16 = 1000;
    if !builder.shared.can_wait_for_sipi() {
        let message = format_args!(
            "VMX of this machine lacks the wait-for-SIPI activity state (IA32_VMX_MISC bit 8): give the machine one processor"
        );
        stop(StopReason::new(StopKind::Processors, message));
    }
    let Some(page) = setup.memory_map.find_highest(PAGE_BYTES, PAGE_BYTES, LOW_MEMORY, &[]) else {
        let message = format_args!("no page below 640 KiB is free to start processors with: use other firmware");
        stop(StopReason::new(StopKind::LowMemory, message));
    };
    let trampoline = TrampolinePage::install(&setup.guest_ram, Hpa(page.start), setup.tables.start_root, arrive);
    for processor in others {
        send(processor, Ipi::Init);
    }
    wait_milliseconds(10);
    for (number, processor) in others.iter().enumerate() {
        trampoline.prepare(stack_end(number));
        IS_READY.store(false, Ordering::SeqCst);
        *NEXT.lock() = Some(StartingProcessor {
            processor,
            area: builder.pages(gdt::AREA_PAGES),
            regions: [builder.pages(1), builder.pages(1)],
            shared: builder.shared,
            memory: builder.next_memory(),
        });
        let is_ready = || {
            wait_milliseconds(1);
            IS_READY.load(Ordering::SeqCst)
        };
        send(processor, Ipi::Startup(trampoline.vector()));
        let has_arrived = is_ready() || NEXT.lock().is_none();
        if !has_arrived {
            send(processor, Ipi::Startup(trampoline.vector()));
        }
        if !(0..START_TIMEOUT_MILLISECONDS).any(|_| is_ready()) {
            stop_without(processor);
        }
    }
}

fn send(processor: &Processor, ipi: Ipi) {
    if !apic::send(processor.apic_id(), ipi) {
        stop_without(processor);
    }
}

/// Stops, because a guest could start this processor outside the host's control.
fn stop_without(processor: &Processor) -> ! {
    let message = format_args!(
        "the processor with APIC id {} does not start: disable it in the firmware's settings",
        processor.apic_id()
    );
    stop(StopReason::new(StopKind::Processors, message))
}

/// A processor that [`start`] has started arrives here.
extern "sysv64" fn arrive() -> ! {
    let Some(StartingProcessor { processor, area, regions, shared, memory }) = NEXT.lock().take() else {
        cpu::halt_forever()
    };
    let segments = gdt::init_on(area, processor);
    check_processor();
    if !setup::capabilities_agree(shared, regions) {
        let message = format_args!(
            "the processor with APIC id {} has other VMX capabilities than the boot processor: disable it in the firmware's settings",
            processor.apic_id()
        );
        stop(StopReason::new(StopKind::Processors, message));
    }
    let vcpu = setup::build(shared, memory, processor, &segments, Start::WaitForSipi);
    IS_READY.store(true, Ordering::SeqCst);
    run::run(vcpu)
}
