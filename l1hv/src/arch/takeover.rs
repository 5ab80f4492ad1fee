//! Taking the machine over from the boot loader: the host's region, the move into it, the modules, the guest's image.
//!
//! [`BootInfo`] alone says which memory is free. It comes from the loader, which the host trusts.

use core::ops::Range;

use arrayvec::ArrayVec;
use boot::acpi::dmar::MAX_RESERVED;
use boot::guest::{self, GuestEntry, GuestInput, GuestModule, LoadError};
use boot::iommu::Plan;
use boot::layout::{self, LayoutError};
use boot::memory_map::{MemoryMap, TooManyRegions};
use boot::multiboot::{BootInfo, MAX_MODULES};
use ept::{Hpa, PageSize};

use super::relocate::{self, image, image_parts, loaded_image};
use super::{cpu, phys};
use crate::mem::{
    GuestRam, HeldPages, HostMap, HostRegion, HostTables, OutOfHostMemory, PAGE_BYTES, PhysAllocator, build_host_tables,
};

/// Why the takeover failed.
pub enum TakeoverError {
    /// The memory cannot be divided as needed.
    Layout(LayoutError),
    /// The memory map with the host's region is too long.
    Map(TooManyRegions),
    /// The host's region is too small.
    HostMemory(OutOfHostMemory),
}

impl From<LayoutError> for TakeoverError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl From<TooManyRegions> for TakeoverError {
    fn from(error: TooManyRegions) -> Self {
        Self::Map(error)
    }
}

impl From<OutOfHostMemory> for TakeoverError {
    fn from(error: OutOfHostMemory) -> Self {
        Self::HostMemory(error)
    }
}

/// The machine after the takeover: the host runs in its region, and the rest belongs to the guest.
pub struct Takeover {
    /// The host's memory.
    pub region: HostRegion,
    /// The free pages of the host's memory.
    pub allocator: PhysAllocator,
    /// All other memory.
    pub guest_ram: GuestRam,
    /// Pages of devices that are the host's.
    pub held: HeldPages,
    /// The machine's memory, with what the host takes of it reserved.
    pub memory_map: MemoryMap,
    /// The host's page tables.
    pub tables: HostTables,
    /// The modules' present addresses, in the loader's order.
    modules: ArrayVec<Range<u64>, MAX_MODULES>,
}

/// Moves the host into a region of its own and the modules out of the guest's way. `low` is memory that the host uses,
/// though it is the guest's. Called once.
///
/// # Errors
///
/// There is not enough memory.
pub fn take_over(
    boot_info: &BootInfo,
    processors: usize,
    host_memory_mib: Option<u32>,
    iommu: Option<&Plan>,
    low: Option<Range<u64>>,
) -> Result<Takeover, TakeoverError> {
    let bytes =
        layout::host_region_bytes(&boot_info.memory_map, processors, iommu.map_or(0, Plan::pages), host_memory_mib);
    let mut taken: ArrayVec<Range<u64>, { MAX_MODULES + 1 + MAX_RESERVED }> =
        boot_info.modules.iter().map(|module| module.range.clone()).collect();
    taken.push(loaded_image());
    taken.extend(iommu.iter().flat_map(|plan| plan.reserved.iter().cloned()));
    let range = layout::host_region(&boot_info.memory_map, bytes, &taken)?;
    let region = HostRegion { start: Hpa(range.start), end: Hpa(range.end) };
    let mut memory_map = boot_info.memory_map.with_reserved(range)?;
    if let Some(low) = low {
        memory_map = memory_map.with_reserved(low)?;
    }

    // SAFETY: the region is free memory below 4 GiB, hence in the boot code's direct map, and this is the only
    // allocator.
    let mut allocator = unsafe { PhysAllocator::new(region) };
    let held = HeldPages::new(iommu.iter().flat_map(|plan| plan.units.iter().map(|(registers, _)| registers.clone())));
    let tables = move_host(&mut allocator, &memory_map, processors - 1, &held)?;
    let modules = stage_modules(boot_info, &memory_map, region)?;
    // SAFETY: the region holds all of the host's memory: the image, its stack and tables, and the allocator's pages.
    let guest_ram = unsafe { GuestRam::new(region.range()) };
    Ok(Takeover { region, allocator, guest_ram, held, memory_map, tables, modules })
}

/// The end of the direct map, which covers all memory, and the devices below 4 GiB.
fn wanted_direct_map_end(map: &MemoryMap) -> Hpa {
    const FOUR_GIB: u64 = 1 << 32;
    Hpa(map.memory_end().max(FOUR_GIB).next_multiple_of(PageSize::Size1G.bytes()))
}

fn move_host(
    allocator: &mut PhysAllocator,
    map: &MemoryMap,
    stacks: usize,
    held: &HeldPages,
) -> Result<HostTables, OutOfHostMemory> {
    let image = image();
    let target = allocator.alloc_pages((image.end - image.start) / PAGE_BYTES)?.phys();
    let end = wanted_direct_map_end(map);
    let page = if cpu::has_1gib_pages() { PageSize::Size1G } else { PageSize::Size2M };
    let map = HostMap {
        direct_map_end: end,
        direct_page: page,
        image: &image,
        image_start: target,
        parts: &image_parts(),
        stacks,
        held,
    };
    let tables = build_host_tables(allocator, &map)?;
    // SAFETY: `target` was just allocated with the image's size, the tables map what `relocate` asks for, and from here
    // on the host uses only the image's virtual addresses and the direct map.
    unsafe { relocate::relocate(target, tables.root, end) };
    Ok(tables)
}

fn stage_modules(
    boot_info: &BootInfo,
    map: &MemoryMap,
    region: HostRegion,
) -> Result<ArrayVec<Range<u64>, MAX_MODULES>, LayoutError> {
    let mut modules = boot_info.module_ranges();
    for step in layout::stage(map, &modules, region.start.0)? {
        // SAFETY: both ranges are memory below 4 GiB, in the direct map; the destination is usable memory outside the
        // region.
        unsafe { phys::copy(Hpa(step.from), Hpa(step.to), step.length) };
        modules[step.module] = step.to..step.to + step.length;
    }
    Ok(modules)
}

impl Takeover {
    /// Copies the guest's image and its boot data into its memory. Returns the guest's initial state.
    ///
    /// # Errors
    ///
    /// The image cannot be loaded, or the host is out of memory.
    pub fn load_guest(&mut self, boot_info: &BootInfo, acpi_rsdp: Option<u64>) -> Result<GuestEntry, LoadGuestError> {
        let scratch = self.allocator.alloc_pages(guest::SCRATCH_BYTES as u64 / PAGE_BYTES)?.into_bytes();
        let staged = boot_info.modules.iter().zip(&self.modules);
        let modules: ArrayVec<GuestModule<'_>, MAX_MODULES> = staged
            .map(|(module, range)| GuestModule {
                address: range.start,
                // SAFETY: the module is in the direct map. The plan below writes only to ranges that overlap no module,
                // and the slices end with this function, before the guest runs.
                bytes: unsafe { phys::slice(range.clone()) },
                string: boot_info.module_string(module),
                arguments: boot_info.module_arguments(module),
            })
            .collect();
        let Some((&image, others)) = modules.split_first() else { return Err(LoadGuestError::NoImage) };
        let input = GuestInput {
            image,
            modules: others,
            memory_map: &self.memory_map,
            is_efi: boot_info.is_efi,
            boot_device: boot_info.boot_device,
            framebuffer: boot_info.framebuffer,
            loader_name: boot_info.loader_name(),
            acpi_rsdp,
        };
        let plan = guest::plan(&input, scratch)?;
        for range in &plan.zeros {
            self.guest_ram.zero(Hpa(range.start), range.end - range.start);
        }
        for copy in &plan.copies {
            log::debug!("guest: {:#x} bytes at {}", copy.bytes.len(), copy.to);
            // EPT01 is an identity map.
            self.guest_ram.write(Hpa(copy.to.0), copy.bytes);
        }
        Ok(plan.entry)
    }
}

/// Why the guest was not loaded.
pub enum LoadGuestError {
    /// There are no modules.
    NoImage,
    /// The image is at fault.
    Image(LoadError),
    /// The host's region is too small.
    HostMemory(OutOfHostMemory),
}

impl From<LoadError> for LoadGuestError {
    fn from(error: LoadError) -> Self {
        Self::Image(error)
    }
}

impl From<OutOfHostMemory> for LoadGuestError {
    fn from(error: OutOfHostMemory) -> Self {
        Self::HostMemory(error)
    }
}
