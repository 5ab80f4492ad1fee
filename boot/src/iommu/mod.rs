//! Units that remap the devices' memory accesses (Intel Virtualization Technology for Directed I/O, revision 5.10, November
//! 2025; "VT-d" in what follows), used for one purpose: no device reaches the host's memory.
//!
//! ```text
//!   DMAR, capabilities of each unit -> Plan -> tables -> Unit::turn_on, then Unit::faults
//!
//!   root table, 256 buses   ──all──>  context table, 256 functions  ──all──>  second-stage tables
//!                                                                             identity, but for what is withheld
//! ```
//!
//! All devices share one set of tables, which never changes. Withheld are the host's region, the registers of the units
//! themselves, and the addresses that interrupts are sent to. Requests that a device says are translated already are
//! blocked, as every context entry asks for.
//!
//! Interrupts are not remapped: the guest hypervisor owns the interrupt controllers, and can send its processors any
//! interrupt that a device can. It programs its devices as on a machine without units, so that their interrupts would be
//! blocked if they were.

mod map;
mod registers;
mod unit;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use core::fmt;
use core::ops::Range;

use arrayvec::ArrayVec;

use crate::acpi::TableError;
use crate::acpi::dmar::{Dmar, ListedUnit, MAX_RESERVED, MAX_UNITS};
use crate::memory_map::{MemoryMap, RegionKind, overlap};

use map::Map;
pub use map::TableArea;
pub use registers::Registers;
pub use unit::{Capabilities, Fault, Silent, Unit};

const FOUR_GIB: u64 = 1 << 32;

/// The addresses that interrupts are sent to. VT-d, 3.15 "Handling Requests to Interrupt Address Range": no table may lead
/// there.
const INTERRUPTS: Range<u64> = 0xfee0_0000..0xfef0_0000;

/// Why the units are of no use. Unless it says otherwise, none has been touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// The firmware names none.
    NoUnit,
    /// The firmware's table of them cannot be read.
    Table(TableError),
    /// The registers at this address are where the host cannot reach them or must not.
    Misplaced(u64),
    /// There is no unit at this address.
    Absent(u64),
    /// The unit at this address does not translate.
    NoTranslation(u64),
    /// The unit at this address lets no interrupt through that it does not remap.
    OnlyRemappedInterrupts(u64),
    /// Only remapped interrupts reach all of the machine's processors: the guest needs the units.
    NeededByGuest,
    /// The units have no width of addresses in common that reaches all memory.
    Width,
    /// The unit at this address has not done what it was told. Units before it are on.
    Silent(u64, Silent),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoUnit => f.write_str(
                "the firmware names no IOMMU: if the machine has one, enable \"VT-d\" in the firmware's settings",
            ),
            Self::Table(error) => write!(f, "the firmware's table of IOMMUs (DMAR) is damaged: {error}"),
            Self::Misplaced(at) => write!(f, "the registers of the IOMMU at {at:#x} lie in memory or beyond 4 GiB"),
            Self::Absent(at) => write!(f, "the firmware names an IOMMU at {at:#x}, and there is none"),
            Self::NoTranslation(at) => write!(f, "the IOMMU at {at:#x} translates no addresses"),
            Self::OnlyRemappedInterrupts(at) => {
                write!(f, "the IOMMU at {at:#x} blocks interrupts that are not remapped")
            }
            Self::NeededByGuest => f.write_str(
                "only through an IOMMU do interrupts reach the processors (APIC ids above 254, or x2APIC mode that cannot be left): it is the guest hypervisor's",
            ),
            Self::Width => f.write_str("the IOMMUs have no width of addresses in common that reaches all memory"),
            Self::Silent(at, Silent(what)) => write!(f, "the IOMMU at {at:#x} does not obey: {what}"),
        }
    }
}

impl core::error::Error for Unusable {}

impl From<TableError> for Unusable {
    fn from(error: TableError) -> Self {
        Self::Table(error)
    }
}

/// The use of the units, as far as it is known before the host has its region.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The address of the firmware's table.
    pub table: u64,
    /// The pages of each unit's registers, and its PCI segment.
    pub units: ArrayVec<(Range<u64>, u16), MAX_UNITS>,
    /// Memory that devices access for the firmware: no place for the host's region.
    pub reserved: ArrayVec<Range<u64>, MAX_RESERVED>,
    /// Whether the units see what processors have written without a write-back of caches.
    pub is_coherent: bool,
    partial_segment: Option<u16>,
    map: Map,
}

impl Plan {
    /// The plan for the units of `dmar`, each with the capabilities that `read` finds, on a machine with this memory and
    /// addresses of so many bits.
    ///
    /// # Errors
    ///
    /// The first unit, or else the first lack of all units, because of which devices would reach the host.
    pub fn new(
        dmar: &Dmar,
        memory: &MemoryMap,
        physical_bits: u32,
        mut read: impl FnMut(&ListedUnit) -> Capabilities,
    ) -> Result<Self, Unusable> {
        let mut units = ArrayVec::new();
        let mut common = Capabilities::ALL;
        for unit in &dmar.units {
            let at = unit.registers.start;
            let is_memory = |registers: &Range<u64>| {
                let kinds = memory.regions().iter().filter(|region| region.kind != RegionKind::RESERVED);
                kinds.map(|region| region.start..region.end).any(|range| overlap(&range, registers))
            };
            let is_misplaced = |registers: &Range<u64>| registers.end > FOUR_GIB || is_memory(registers);
            if is_misplaced(&unit.registers) {
                return Err(Unusable::Misplaced(at));
            }
            let capabilities = read(unit);
            if !capabilities.is_present() {
                return Err(Unusable::Absent(at));
            }
            if !capabilities.translates() {
                return Err(Unusable::NoTranslation(at));
            }
            if capabilities.blocks_interrupts() {
                return Err(Unusable::OnlyRemappedInterrupts(at));
            }
            let registers = at..unit.registers.end.max(at + capabilities.register_bytes());
            if is_misplaced(&registers) {
                return Err(Unusable::Misplaced(at));
            }
            common = common.and(capabilities);
            units.push((registers, unit.segment));
        }
        if units.is_empty() {
            return Err(Unusable::NoUnit);
        }
        let bits = dmar.address_bits.min(physical_bits);
        let mut map = Map::new(common, memory.memory_end().max(FOUR_GIB), bits).ok_or(Unusable::Width)?;
        map.withhold(INTERRUPTS);
        units.iter().for_each(|(registers, _)| map.withhold(registers.clone()));
        let is_whole = |segment| dmar.units.iter().any(|unit| unit.includes_all && unit.segment == segment);
        let partial_segment = dmar.units.iter().map(|unit| unit.segment).find(|&segment| !is_whole(segment));
        let Dmar { table, reserved, .. } = dmar.clone();
        Ok(Self { table, units, reserved, is_coherent: common.is_coherent(), partial_segment, map })
    }

    /// The most pages that the tables take, wherever the host's region will be.
    pub fn pages(&self) -> u64 {
        const ROOT_AND_CONTEXT: u64 = 2;
        // The region takes a table for each of its ends that lies within a page of 1 GiB.
        const AROUND_THE_REGION: u64 = 2;
        ROOT_AND_CONTEXT + self.map.tables() + AROUND_THE_REGION
    }

    /// Writes the tables, which withhold `host`, too, into [`Self::pages`] pages of zeros. Returns the address of the root
    /// table.
    pub fn build(&self, host: Range<u64>, area: TableArea<'_>) -> u64 {
        let mut map = self.map.clone();
        map.withhold(host);
        area.build(&map)
    }

    /// A PCI segment whose devices no unit remaps unless the firmware lists them. There may be no other devices.
    pub const fn partial_segment(&self) -> Option<u16> {
        self.partial_segment
    }

    /// The width of the addresses that devices can use.
    pub fn address_bits(&self) -> u32 {
        self.map.address_bits()
    }
}
