//! Everything that the run loops work with, allocated once: state that all processors share, and state of each
//! processor.

use arrayvec::ArrayVec;
use boot::acpi::sleep::SleepControl;
use boot::cmdline::{Options, TripleFault};
use boot::stop::StopKind;
use ept::entry::Features;
use ept::nested::NestedPaging;
use ept::{Gpa, Hpa, PageSize};
use shadow::caps::{Policy, ept_vpid};
use shadow::check::HostMode;
use shadow::controls::{Control, Primary, Secondary};
use shadow::cpuid::CpuidView;
use shadow::event::WAIT_FOR_SIPI;
use shadow::fields::FIELD_COUNT;
use shadow::host_load::TRAPPED_MSRS;
use shadow::index::FieldTable;
use shadow::insn::VmxOperation;
use shadow::merge::{MSR_AREA_ROOM, MsrEntry};
use shadow::mitigations::Mitigations;
use shadow::msr::{BITMAP_BYTES, HOST_INTERCEPTS, IA32_MTRRCAP, intercept_writes};
use shadow::mtrr::Mtrrs;
use shadow::nested::control_registers::masks;
use shadow::nested::held_ports::{HeldPorts, MOST_PORTS};
use shadow::nested::write_traps::kept_at_first;
use shadow::nested::{MsrArea, MsrAreas, Nested, NestedEpt, NestedShadowing, Running, VmcsPair};
use shadow::permission::Permissions;
use shadow::sync::SyncSets;
use shadow::watch::{MergedBitmap, SLOTS};
use shadow::{FieldId, FieldSet, VmxCaps};

use crate::arch::enter::GuestRegisters;
use crate::arch::gdt::HostSegments;
use crate::arch::vmx::Vmcss;
use crate::arch::{cpu, host_state, msr, on_behalf};
use crate::bios::DiskStart;
use crate::ept01::{Ept01, Withheld};
use crate::exit::{start_in_real_mode, wait_for_start};
use crate::host::{HostSetup, Start, stop_host_memory};
use crate::hw::{GuestPhysical, Hardware, Vcpu};
use crate::mem::{GuestRam, HeldPages, HostPages, HostRegion, PAGE_BYTES, PhysAllocator, heap};
use crate::processor::Processor;
use crate::shadow_fields::{AccessCounters, Profile, ShadowFields};
use crate::stop::{StopReason, stop};
use crate::tables::{TableArea, TablePool};
use crate::vmcs_setup;

/// The state that all virtual cpus share.
#[derive(Debug)]
pub struct Shared {
    caps: VmxCaps,
    offered: VmxCaps,
    cpuid: CpuidView,
    prints_stats: bool,
    on_triple_fault: TripleFault,
    takes_hypercalls: bool,
    disk: Option<DiskStart>,
    mitigations: Mitigations,
    /// VM-exit MSR-load area of all vmcs02s.
    exit_load02: (Hpa, u32),
    guest_ram: GuestRam,
    host_region: HostRegion,
    held: HeldPages,
    scratch: Hpa,
    msr_bitmaps01: [Hpa; 2],
    field_bitmaps: [Hpa; 2],
    shadow_fields: ShadowFields,
    ept01: Ept01,
    sleep: SleepControl,
    /// The host's I/O bitmaps, if it looks at ports.
    io_bitmaps: Option<[Hpa; 2]>,
}

/// Allocates the shared state, and then the memory of one virtual cpu after the other.
#[derive(Debug)]
pub struct VcpuBuilder {
    /// The shared state.
    pub shared: &'static Shared,
    /// The processors, the boot processor first.
    pub processors: &'static [Processor],
    allocator: PhysAllocator,
    tables: TableArea,
    /// The number of processors for which memory has been handed out.
    handed_out: usize,
    boot: Option<VcpuMemory>,
}

impl VcpuBuilder {
    /// The builder for the processors of `setup`. Each of them but the boot processor needs `pages_to_start` besides
    /// its memory.
    pub fn new(setup: &HostSetup<'_>, mut allocator: PhysAllocator, pages_to_start: u64) -> Self {
        let HostSetup { options, host_region, memory_map, guest_ram, held, apic_ids, .. } = setup;
        let processors = apic_ids.len();
        let caps = read_capabilities([pages(&mut allocator, 1), pages(&mut allocator, 1)]);
        if let Some(id) = caps.missing_essential() {
            stop_without_field(id);
        }
        let shadowing = [Control::Secondary(Secondary::VMCS_SHADOWING)];
        let withheld = if options.vmcs_shadowing { &[][..] } else { &shadowing };
        let offered = caps.offered(&Policy { withheld, ..Policy::EVERYTHING });
        let scratch_page = pages(&mut allocator, 1);
        let scratch = scratch_page.phys();
        // The page reads as ones, as a bus without a device does.
        scratch_page.into_bytes().fill(0xff);
        let msr_bitmaps01 = [&[][..], &TRAPPED_MSRS].map(|trapped| {
            let page = pages(&mut allocator, 1);
            let address = page.phys();
            let bitmap = page.into_bytes();
            bitmap.copy_from_slice(&HOST_INTERCEPTS);
            intercept_writes(bitmap, trapped);
            address
        });
        let mitigations = mitigations(options);
        let exit_load02 = exit_load02(&mut allocator, &mitigations);
        let (shadow_fields, field_bitmaps) = shadow_fields(&mut allocator, options, &caps, &offered);
        let io_bitmaps = io_bitmaps(&mut allocator, &setup.sleep, &caps);
        heap::init(pages(&mut allocator, (processors * NestedPaging::HEAP_BYTES).div_ceil(PAGE_BYTES as usize) as u64));
        let list = pages(&mut allocator, ((processors * size_of::<Processor>()) as u64).div_ceil(PAGE_BYTES));
        let place = pages(&mut allocator, (size_of::<Shared>() as u64).div_ceil(PAGE_BYTES));

        let free_before = allocator.free_pages();
        let boot = VcpuPages::allocate(&mut allocator, &offered, io_bitmaps.is_some());
        let for_others = (processors as u64 - 1) * (free_before - allocator.free_pages() + pages_to_start);
        let free = allocator.free_pages().saturating_sub(for_others);
        let table_pages = options.ept_tables.map_or(u64::MAX, u64::from).min(free);
        let tables = TableArea::new(pages(&mut allocator, table_pages));
        let mut pool = tables.pool(0, processors);
        let largest = if caps.ept_vpid & ept_vpid::PAGE_1G != 0 { PageSize::Size1G } else { PageSize::Size2M };
        let limit = Gpa(1 << caps.physical_bits);
        let withheld = Withheld { region: *host_region, held, scratch };
        let ept01 = match Ept01::build(tables, &mut pool, largest, memory_map, withheld, limit) {
            Ok(ept01) if pool.budget() - pool.in_use() >= NestedPaging::LEAST_TABLES => ept01,
            _ => stop_few_tables(table_pages),
        };
        log::debug!("{table_pages} pages for EPT tables, {} of them for EPT01", pool.in_use());
        let shared = place.into_value(Shared {
            cpuid: CpuidView::new(&caps, cpu::cpuid),
            caps,
            offered,
            prints_stats: options.stats,
            on_triple_fault: options.triple_fault,
            takes_hypercalls: options.hypercalls,
            disk: setup.disk,
            mitigations,
            exit_load02,
            guest_ram: guest_ram.clone(),
            host_region: *host_region,
            held: held.clone(),
            scratch,
            msr_bitmaps01,
            field_bitmaps,
            shadow_fields,
            ept01,
            sleep: setup.sleep.clone(),
            io_bitmaps,
        });
        let boot = Some(VcpuMemory { pages: boot, tables: pool });
        let processors = list.into_values(apic_ids.iter().copied().map(Processor::new));
        Self { shared, processors, allocator, tables, handed_out: 0, boot }
    }

    /// The memory of the next processor's virtual cpu; the boot processor's comes first.
    pub fn next_memory(&mut self) -> VcpuMemory {
        let number = self.handed_out;
        self.handed_out += 1;
        self.boot.take().unwrap_or_else(|| VcpuMemory {
            pages: VcpuPages::allocate(&mut self.allocator, &self.shared.offered, self.shared.io_bitmaps.is_some()),
            tables: self.tables.pool(number, self.processors.len()),
        })
    }

    /// Pages for another use.
    pub fn pages(&mut self, count: u64) -> HostPages {
        pages(&mut self.allocator, count)
    }
}

/// The memory of one processor's virtual cpu.
#[derive(Debug)]
pub struct VcpuMemory {
    pages: VcpuPages,
    tables: TablePool,
}

#[derive(Debug)]
struct VcpuPages {
    vcpu: HostPages,
    vmxon: HostPages,
    vmcs01: HostPages,
    vmcs02: HostPages,
    msr_bitmaps: [HostPages; SLOTS],
    entry_load: HostPages,
    exit_load: HostPages,
    shadowing: Option<ShadowingPages>,
    ports: Option<PortPages>,
}

#[derive(Debug)]
struct PortPages {
    value: HostPages,
    bitmaps: [[HostPages; SLOTS]; 2],
}

#[derive(Debug)]
struct ShadowingPages {
    value: HostPages,
    shadow02: HostPages,
    hidden: HostPages,
    bitmaps: [[HostPages; SLOTS]; 2],
}

impl VcpuPages {
    fn allocate(allocator: &mut PhysAllocator, offered: &VmxCaps, holds_ports: bool) -> Self {
        const AREA_PAGES: u64 = ((MSR_AREA_ROOM * size_of::<MsrEntry>()) as u64).div_ceil(PAGE_BYTES);
        const BITMAP_PAGES: u64 = BITMAP_BYTES as u64 / PAGE_BYTES;
        let mut take = |count| pages(allocator, count);
        let bitmaps = |take: &mut dyn FnMut(u64) -> HostPages| core::array::from_fn(|_| take(BITMAP_PAGES));
        let offers_shadowing = offered.has_secondary(Secondary::VMCS_SHADOWING);
        Self {
            vcpu: take((size_of::<Vcpu>() as u64).div_ceil(PAGE_BYTES)),
            vmxon: take(1),
            vmcs01: take(1),
            vmcs02: take(1),
            msr_bitmaps: bitmaps(&mut take),
            entry_load: take(AREA_PAGES),
            exit_load: take(AREA_PAGES),
            shadowing: offers_shadowing.then(|| ShadowingPages {
                value: take((size_of::<NestedShadowing>() as u64).div_ceil(PAGE_BYTES)),
                shadow02: take(1),
                hidden: take(1),
                bitmaps: [bitmaps(&mut take), bitmaps(&mut take)],
            }),
            ports: holds_ports.then(|| PortPages {
                value: take((size_of::<HeldPorts>() as u64).div_ceil(PAGE_BYTES)),
                bitmaps: [bitmaps(&mut take), bitmaps(&mut take)],
            }),
        }
    }
}

impl Shared {
    /// Whether a guest's processor can wait for its SIPI in VMX non-root operation.
    pub const fn can_wait_for_sipi(&self) -> bool {
        self.caps.has_activity(WAIT_FOR_SIPI)
    }
}

/// Whether this processor has the same VMX capabilities as the one that made `shared`. The pages are as for
/// [`read_capabilities`].
pub fn capabilities_agree(shared: &Shared, regions: [HostPages; 2]) -> bool {
    read_capabilities(regions) == shared.caps
}

/// Enters VMX operation, and builds the virtual cpu of the processor that executes this.
pub fn build(
    shared: &'static Shared,
    memory: VcpuMemory,
    processor: &'static Processor,
    segments: &HostSegments,
    start: Start,
) -> &'static mut Vcpu {
    let Shared { caps, offered, shadow_fields, .. } = shared;
    let VcpuMemory { pages, tables } = memory;
    let VcpuPages { vmxon, vmcs01, vmcs02, shadowing, .. } = pages;
    let revision = caps.basic as u32 & 0x7fff_ffff;
    on_behalf::stop_tracing();
    let mut vmcs = on_behalf::start_vmx(vmxon, vmcs01, vmcs02, revision, caps);
    let ept01 = shared.ept01.root();
    let cache = NestedPaging::new(nested_features(caps, offered));
    let [entry_load, host_load] = [pages.entry_load, pages.exit_load].map(msr_area);
    let mut nested = Nested::new(
        kept_at_first(caps),
        NestedEpt::new(ept01, cache),
        pages.msr_bitmaps.map(merged_bitmap),
        MsrAreas::new(entry_load, host_load, &shared.mitigations),
        shadowing.map(|pages| build_shadowing(pages, &mut vmcs, shadow_fields.table)),
    );
    nested.ports = pages.ports.zip(shared.io_bitmaps).map(|(pages, host)| {
        let merged = pages.bitmaps.map(|bitmaps| bitmaps.map(merged_bitmap));
        pages.value.into_value(HeldPorts::new(shared.sleep.ports().collect(), host, merged))
    });
    let vcpu = pages.vcpu.into_value(Vcpu {
        registers: GuestRegisters::new(),
        vmcs,
        running: Running::GuestHypervisor,
        offered_fields: offered.fields(),
        live_fields: shadow_fields.live,
        field_table: shadow_fields.table,
        quick_table: shadow_fields.quick_table,
        sync_sets: SyncSets::new(offered, &shadow_fields.live),
        vmx: VmxOperation::new(offered),
        mode: HostMode::Legacy,
        nested,
        memory: GuestPhysical::new(
            shared.guest_ram.clone(),
            shared.host_region,
            &shared.held,
            shared.scratch,
            &shared.ept01,
            processor,
        ),
        tables,
        msr_bitmaps01: shared.msr_bitmaps01,
        undo: None,
        init_blocked: false,
        caps: caps.clone(),
        offered: offered.clone(),
        machine: Hardware {
            ept01: &shared.ept01,
            processor,
            cpuid: &shared.cpuid,
            shadow_fields,
            mtrrs: Mtrrs::new(msr::try_read(IA32_MTRRCAP).unwrap_or(0), caps.physical_bits),
            sleep: &shared.sleep,
            prints_stats: shared.prints_stats,
            on_triple_fault: shared.on_triple_fault,
            takes_hypercalls: shared.takes_hypercalls,
            disk: shared.disk,
        },
    });
    initialize_vmcss(vcpu, shared, segments);
    let masks = masks(vcpu);
    match start {
        Start::Entry(entry) => {
            vmcs_setup::guest_state01(vcpu.vmcs.vmcs01(), &mut vcpu.registers, entry, masks);
            processor.set_waits_for_sipi(false);
        }
        Start::RealMode(segment, offset) => {
            start_in_real_mode(vcpu, segment, offset);
            processor.set_waits_for_sipi(false);
        }
        Start::WaitForSipi => wait_for_start(vcpu),
    }
    vcpu
}

fn initialize_vmcss(vcpu: &mut Vcpu, shared: &Shared, segments: &HostSegments) {
    let masks = masks(vcpu);
    let ept01 = shared.ept01.root();
    set_host_state(vcpu, segments);
    let vmcs02 = vcpu.vmcs.vmcs02();
    let bitmap = vcpu.nested.msr_bitmaps[0].address;
    vmcs_setup::constants02(vmcs02, &vcpu.caps, ept01, bitmap, &vcpu.nested.areas, shared.exit_load02);
    let vmcs01 = vcpu.vmcs.vmcs01();
    vmcs_setup::controls01(vmcs01, &vcpu.caps, ept01, shared.msr_bitmaps01[0]);
    if let Some(bitmaps) = shared.io_bitmaps {
        vmcs_setup::io_bitmaps01(vmcs01, bitmaps);
    }
    vmcs_setup::bitmaps01(vmcs01, &vcpu.caps, shared.field_bitmaps);
    vmcs_setup::load_area01(vmcs01, vcpu.nested.areas.host_load.address);
    vmcs_setup::power_up01(vmcs01, masks);
}

#[allow(unsafe_code, reason = "joins a processor's registers and its VMCSs")]
fn set_host_state(vcpu: &mut Vcpu, segments: &HostSegments) {
    // SAFETY: the virtual cpu is at its final place, and the run loop uses its registers and its VMCSs together.
    unsafe {
        host_state::write(vcpu.vmcs.vmcs02(), segments, &vcpu.registers);
        host_state::write(vcpu.vmcs.vmcs01(), segments, &vcpu.registers);
    }
}

/// The fields that the guest hypervisor may access without an exit, and the addresses of the vmcs01s' VMREAD and
/// VMWRITE bitmaps. To reflect an exit that vmcs02 did not take, the host must be able to VMWRITE exit information.
fn shadow_fields(
    allocator: &mut PhysAllocator,
    options: &Options<'_>,
    caps: &VmxCaps,
    offered: &VmxCaps,
) -> (ShadowFields, [Hpa; 2]) {
    let possible = caps.has_secondary(Secondary::VMCS_SHADOWING) && caps.vmwrite_any();
    if options.vmcs_shadowing && !possible {
        log::info!("the processor has no VMCS shadowing that can be used: VMREAD and VMWRITE are emulated");
    }
    let mut permissions = match options.vmcs_shadowing && possible {
        true => Permissions::widest(offered),
        false => Permissions::without_shadowing(&offered.fields()),
    };
    if let Err(error) = permissions.apply(options.shadow) {
        stop(StopReason::new(StopKind::BadOption, format_args!("option \"shadow={}\": {error}", options.shadow)));
    }
    let mut table = |fields: &FieldSet| -> &'static FieldTable {
        pages(allocator, size_of::<FieldTable>() as u64 / PAGE_BYTES).into_value(FieldTable::of(fields))
    };
    let all = table(&offered.fields());
    let short = if options.profile { table(&FieldSet::EMPTY) } else { all };
    let profile: Option<&'static Profile> = options.profile.then(|| {
        let place = pages(allocator, (size_of::<Profile>() as u64).div_ceil(PAGE_BYTES));
        &*place.into_value([const { AccessCounters::new() }; FIELD_COUNT])
    });
    let (addresses, bitmaps) = two_bitmaps(allocator);
    (ShadowFields::new(permissions, [all, short], bitmaps, profile), addresses)
}

/// Bitmaps that make accesses to the registers exit that put the machine to sleep.
fn io_bitmaps(allocator: &mut PhysAllocator, sleep: &SleepControl, caps: &VmxCaps) -> Option<[Hpa; 2]> {
    let ports: ArrayVec<u16, MOST_PORTS> = sleep.ports().collect();
    if ports.is_empty() || !caps.may_be_1(Control::Primary(Primary::USE_IO_BITMAPS)) {
        return None;
    }
    let (addresses, bitmaps) = two_bitmaps(allocator);
    HeldPorts::intercept(&ports, bitmaps);
    Some(addresses)
}

/// Bitmaps of a page each: where they are, and their bytes.
fn two_bitmaps(allocator: &mut PhysAllocator) -> ([Hpa; 2], [&'static mut [u8]; 2]) {
    let bitmaps = [pages(allocator, 1), pages(allocator, 1)];
    ([bitmaps[0].phys(), bitmaps[1].phys()], bitmaps.map(HostPages::into_bytes))
}

fn mitigations(options: &Options<'_>) -> Mitigations {
    let mitigations = if options.mitigations { Mitigations::of(&cpu::speculation()) } else { Mitigations::NONE };
    log::info!("mitigations of speculation: {mitigations}");
    mitigations
}

fn exit_load02(allocator: &mut PhysAllocator, mitigations: &Mitigations) -> (Hpa, u32) {
    let page = pages(allocator, 1);
    let address = page.phys();
    let entries = page.into_values(mitigations.at_exit().iter().copied());
    (address, entries.len() as u32)
}

fn pages(allocator: &mut PhysAllocator, count: u64) -> HostPages {
    match allocator.alloc_pages(count) {
        Ok(pages) => pages,
        Err(error) => stop_host_memory(&error),
    }
}

fn stop_few_tables(count: u64) -> ! {
    let message = format_args!(
        "{count} tables are not enough for the EPT of the machine and one of a nested guest on each processor: raise ept-tables=COUNT or host-memory=MIB, or leave them out"
    );
    stop(StopReason::new(StopKind::LowMemory, message))
}

fn stop_without_field(id: FieldId) -> ! {
    let message =
        format_args!("VMX of this machine lacks the field {id:?}: use a processor, or a hypervisor below, that has it");
    stop(StopReason::new(StopKind::NoVmxFeature, message))
}

/// VMCS shadowing for hypervisors that run as nested guests.
fn build_shadowing(pages: ShadowingPages, vmcs: &mut Vmcss, offered: &FieldTable) -> &'static mut NestedShadowing {
    let shadow02 = vmcs.add_shadow02(pages.shadow02);
    let hidden = pages.hidden.into_bytes();
    let vmcs01 = vmcs.vmcs01();
    NestedShadowing::fill_hidden(|encoding| vmcs01.has_encoding(encoding), offered, hidden);
    let bitmaps = pages.bitmaps.map(|bitmaps| bitmaps.map(merged_bitmap));
    pages.value.into_value(NestedShadowing::new(shadow02, hidden, bitmaps))
}

fn msr_area(pages: HostPages) -> MsrArea {
    let address = pages.phys();
    MsrArea { address, entries: pages.into_value([MsrEntry::default(); MSR_AREA_ROOM]) }
}

fn merged_bitmap(pages: HostPages) -> MergedBitmap {
    MergedBitmap { address: pages.phys(), bytes: pages.into_bytes() }
}

/// The VMX capabilities of this processor, by its capability MSRs and by VMREAD. To try VMREAD, it enters VMX operation
/// with the two regions.
fn read_capabilities([vmxon, vmcs]: [HostPages; 2]) -> VmxCaps {
    let caps = VmxCaps::read(read_capability, on_behalf::physical_address_bits(), on_behalf::linear_address_bits());
    let known = on_behalf::known_fields(vmxon, vmcs, &caps);
    let caps = caps.with_fields(&known);
    for id in caps.missing.iter() {
        log::debug!("this machine's VMX has no field {id:?}");
    }
    caps
}

fn read_capability(number: u32) -> u64 {
    match msr::try_read(number) {
        Some(value) => value,
        None => {
            let message = format_args!(
                "this machine's VMX promises the capability MSR {number:#x} and does not have it: use a processor, or a hypervisor below, that has it"
            );
            stop(StopReason::new(StopKind::NoVmxFeature, message))
        }
    }
}

fn nested_features(caps: &VmxCaps, offered: &VmxCaps) -> Features {
    Features {
        advanced_violation: caps.ept_vpid & ept_vpid::ADVANCED_VIOLATION != 0,
        physical_bits: offered.physical_bits,
        execute_only: offered.ept_vpid & ept_vpid::EXECUTE_ONLY != 0,
        page_2m: offered.ept_vpid & ept_vpid::PAGE_2M != 0,
        page_1g: offered.ept_vpid & ept_vpid::PAGE_1G != 0,
    }
}
