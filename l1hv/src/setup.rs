//! Everything that the run loop works with, allocated once.

use boot::cmdline::Options;
use boot::memory_map::RegionKind;
use boot::stop::StopKind;
use ept::entry::Features;
use ept::map::{OutOfTables, map_range};
use ept::nested::NestedPaging;
use ept::table::TableMemory;
use ept::{Entry, Eptp, Hpa, Levels, MemoryType, PageSize, Rights};
use shadow::caps::ept_vpid;
use shadow::check::HostMode;
use shadow::controls::Secondary;
use shadow::fields::FIELD_COUNT;
use shadow::host_load::HostImage;
use shadow::index::FieldTable;
use shadow::insn::VmxOperation;
use shadow::merge::{MSR_AREA_ENTRIES, MsrEntry};
use shadow::msr::{BITMAP_BYTES, HOST_INTERCEPTS};
use shadow::permission::Permissions;
use shadow::sync::SyncSets;
use shadow::{FieldSet, VmxCaps};

use crate::arch::enter::GuestRegisters;
use crate::arch::vmx::VmcsPair;
use crate::arch::{msr, on_behalf};
use crate::boot_flow::{HostSetup, stop_host_memory};
use crate::exit::control_register_masks;
use crate::hw::{GuestPhysical, TablePool};
use crate::mem::{HostPages, HostRegion, PAGE_BYTES, PhysAllocator};
use crate::nested::Onward;
use crate::shadow_fields::{Accesses, Profile, ShadowFields};
use crate::stats::Stats;
use crate::stop::{StopReason, stop, stop_internal};
use crate::vcpu::{Level, MergedBitmap, MsrArea, Nested, Vcpu};
use crate::vmcs_setup;

/// Builds the virtual cpu and enters VMX operation.
pub fn build(setup: HostSetup<'_>) -> &'static mut Vcpu {
    let HostSetup { options, host_region, memory_map, mut allocator, guest_ram, segments, entry } = setup;
    let caps = VmxCaps::read(read_capability, on_behalf::physical_address_bits());
    let all_offered = caps.offered();
    let offered = match options.vmcs_shadowing {
        true => all_offered,
        false => all_offered.without_secondary(Secondary::VMCS_SHADOWING),
    };
    let offers_shadowing = offered.has_secondary(Secondary::VMCS_SHADOWING);
    let mut vmcs = enter_vmx(&mut allocator, &caps);
    let scratch_page = pages(&mut allocator, 1);
    let scratch = scratch_page.phys();
    // Where nobody answers, a read gives ones.
    scratch_page.into_bytes().fill(0xff);
    let msr_bitmap01 = pages(&mut allocator, 1);
    let msr_bitmap01_address = msr_bitmap01.phys();
    msr_bitmap01.into_bytes().copy_from_slice(&HOST_INTERCEPTS);
    let (shadow_fields, bitmaps) = shadow_fields(&mut allocator, &options, &caps, &offered);
    let nested = Nested {
        eptp02: Eptp(0),
        ept12: None,
        converts_violations: false,
        vpid12: 0,
        short_entry: false,
        short_exit: false,
        host_image: HostImage::default(),
        host_mode: HostMode::Legacy,
        operand_mask: u64::MAX,
        violation: None,
        displaced: None,
        entering: false,
        entry_load_count: 0,
        loading_host_msrs: false,
        exit_store_count: 0,
        paging: NestedPaging::new(nested_features(&caps, &offered)),
        msr_bitmaps: core::array::from_fn(|_| merged_bitmap(&mut allocator)),
        msr_bitmap_slot: 0,
        onward: offers_shadowing.then(|| onward(&mut allocator, &mut vmcs, shadow_fields.table)),
        entry_load: msr_area(&mut allocator),
        exit_store: msr_area(&mut allocator),
        exit_load: msr_area(&mut allocator),
    };
    let vcpu_pages = pages(&mut allocator, (size_of::<Vcpu>() as u64).div_ceil(PAGE_BYTES));
    let table_pages = options.ept_tables.map_or(u64::MAX, u64::from).min(allocator.free_pages());
    let mut tables = TablePool::new(pages(&mut allocator, table_pages));
    let ept01 = match build_ept01(&mut tables, &caps, &memory_map, host_region, scratch) {
        Ok(root) if tables.budget() - tables.in_use() >= NestedPaging::LEAST_TABLES => root,
        _ => stop_few_tables(table_pages),
    };
    log::debug!("{table_pages} pages for EPT tables, {} of them for EPT01", tables.in_use());

    let vcpu = vcpu_pages.into_value(Vcpu {
        registers: GuestRegisters::new(),
        vmcs,
        level: Level::GuestHypervisor,
        offered_fields: offered.fields(),
        sync_sets: SyncSets::new(&offered, shadow_fields.permissions().live()),
        shadow_fields,
        vmx: VmxOperation::new(&offered),
        nested: Nested { eptp02: ept01, ..nested },
        memory: GuestPhysical::new(guest_ram, host_region, scratch),
        tables,
        ept01,
        init_blocked: false,
        stats: Stats::new(),
        prints_stats: options.stats,
        takes_hypercalls: options.hypercalls,
        caps,
        offered,
    });
    let masks = control_register_masks(vcpu);
    let mut vmcs02 = vcpu.vmcs.vmcs02();
    vmcs_setup::host_state(&mut vmcs02, &segments, &vcpu.registers);
    let (load, store) = (vcpu.nested.entry_load.address, vcpu.nested.exit_store.address);
    let bitmap = vcpu.nested.msr_bitmaps[0].address;
    vmcs_setup::constants02(&mut vmcs02, &vcpu.caps, ept01, bitmap, load, store);
    let mut vmcs01 = vcpu.vmcs.vmcs01();
    vmcs_setup::host_state(&mut vmcs01, &segments, &vcpu.registers);
    vmcs_setup::controls01(&mut vmcs01, &vcpu.caps, ept01, msr_bitmap01_address);
    vmcs_setup::bitmaps01(&mut vmcs01, &vcpu.caps, bitmaps);
    vmcs_setup::load_area01(&mut vmcs01, vcpu.nested.exit_load.address);
    vmcs_setup::guest_state01(&mut vmcs01, &mut vcpu.registers, entry, masks);
    vcpu
}

/// What the guest hypervisor may access without an exit, and where vmcs01's VMREAD and VMWRITE bitmaps are. Reflecting an exit that vmcs02
/// did not take needs VMWRITE to exit information.
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
    let profile: Option<&'static mut Profile> = options.profile.then(|| {
        let count = (size_of::<Profile>() as u64).div_ceil(PAGE_BYTES);
        pages(allocator, count).into_value([Accesses::default(); FIELD_COUNT])
    });
    let bitmaps = [pages(allocator, 1), pages(allocator, 1)];
    let addresses = [bitmaps[0].phys(), bitmaps[1].phys()];
    let bitmaps = bitmaps.map(HostPages::into_bytes);
    (ShadowFields::new(permissions, [all, short], bitmaps, profile), addresses)
}

fn pages(allocator: &mut PhysAllocator, count: u64) -> HostPages {
    match allocator.alloc_pages(count) {
        Ok(pages) => pages,
        Err(error) => stop_host_memory(&error),
    }
}

fn stop_few_tables(count: u64) -> ! {
    let message = format_args!(
        "{count} tables are not enough for the EPT of the machine and one of a nested guest: raise ept-tables=COUNT or host-memory=MIB, or leave them out"
    );
    stop(StopReason::new(StopKind::LowMemory, message))
}

/// VMCS shadowing offered onward.
fn onward(allocator: &mut PhysAllocator, vmcs: &mut VmcsPair, offered: &FieldTable) -> &'static mut Onward {
    let link02 = vmcs.add_linked(pages(allocator, 1));
    let hidden = pages(allocator, 1).into_bytes();
    Onward::fill_hidden(&vmcs.vmcs01(), offered, hidden);
    let mut bitmaps = || core::array::from_fn(|_| merged_bitmap(allocator));
    let bitmaps = [bitmaps(), bitmaps()];
    pages(allocator, 1).into_value(Onward::new(link02, hidden, bitmaps))
}

fn msr_area(allocator: &mut PhysAllocator) -> MsrArea {
    let bytes = MSR_AREA_ENTRIES * size_of::<MsrEntry>();
    let pages = pages(allocator, bytes as u64 / PAGE_BYTES);
    let address = pages.phys();
    MsrArea { address, entries: pages.into_value([MsrEntry::default(); MSR_AREA_ENTRIES]) }
}

fn merged_bitmap(allocator: &mut PhysAllocator) -> MergedBitmap {
    let pages = pages(allocator, BITMAP_BYTES as u64 / PAGE_BYTES);
    MergedBitmap { address: pages.phys(), bytes: pages.into_bytes() }
}

fn read_capability(number: u32) -> u64 {
    match msr::try_read(number) {
        Some(value) => value,
        None => stop_internal!("the processor promises VMX capability MSR {number:#x} and does not have it"),
    }
}

fn enter_vmx(allocator: &mut PhysAllocator, caps: &VmxCaps) -> VmcsPair {
    let revision = caps.basic as u32 & 0x7fff_ffff;
    let mut page = || pages(allocator, 1);
    on_behalf::start_vmx(page(), page(), page(), revision, caps)
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

/// EPT01: identity, memory write-back and devices uncacheable, with one scratch page behind the host's region.
///
/// The scratch page is plain memory that belongs to nobody, all ones until a guest writes to it: whatever the guest hypervisor does to the region reaches nothing of the
/// host's, causes no exit and costs one table for each 2 MiB.
fn build_ept01(
    tables: &mut TablePool,
    caps: &VmxCaps,
    map: &boot::memory_map::MemoryMap,
    hole: HostRegion,
    scratch: Hpa,
) -> Result<Eptp, OutOfTables> {
    const LOW_END: u64 = 1 << 32;
    let largest = if caps.ept_vpid & ept_vpid::PAGE_1G != 0 { PageSize::Size1G } else { PageSize::Size2M };
    let root = Eptp::new(tables.allocate().ok_or(OutOfTables)?.0, Levels::Four);
    let identity = |kind: MemoryType| move |address, size| Entry::leaf(address, size, Rights::ALL, kind, false);
    let mut next = 0;
    let end = map.memory_end().max(LOW_END).next_multiple_of(PageSize::Size2M.bytes());
    for region in map.regions() {
        let (start, stop) = (region.start.next_multiple_of(PAGE_BYTES), region.end & !(PAGE_BYTES - 1));
        let is_memory = region.kind != RegionKind::RESERVED;
        if !is_memory || start >= stop || start < next {
            continue;
        }
        map_range(tables, root, next, start, largest, identity(MemoryType::UNCACHEABLE))?;
        map_range(tables, root, start, stop, largest, identity(MemoryType::WRITE_BACK))?;
        next = stop;
    }
    map_range(tables, root, next, end, largest, identity(MemoryType::UNCACHEABLE))?;
    map_range(tables, root, hole.start.0, hole.end.0, PageSize::Size4K, |_, size| {
        Entry::leaf(scratch.0, size, Rights::ALL, MemoryType::WRITE_BACK, false)
    })?;
    Ok(root)
}
