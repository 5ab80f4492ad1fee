//! One unit: what it can do, taking it over, and what it reports.

use core::fmt;

use super::registers::{
    MASK_FAULT_EVENTS, Registers, command, context_command, fault_record, fault_status, iotlb, offset, protected_memory,
};

/// Polls until a unit counts as silent: a tenth of a second at least, as a read of a register takes 100 ns.
const POLLS: u32 = 1_000_000;

/// What a unit can do: its registers of version, capabilities and extended capabilities.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    version: u32,
    capability: u64,
    extended: u64,
}

impl Capabilities {
    const MEMORY_REGIONS: u64 = 0b11 << 5;
    const FLUSHES_WRITE_BUFFER: u64 = 1 << 4;
    const PAGES_2M: u64 = 1 << 34;
    const PAGES_1G: u64 = 1 << 35;
    const DRAINS_WRITES: u64 = 1 << 54;
    const DRAINS_READS: u64 = 1 << 55;
    const INVALIDATES_AT_SET_ROOT: u64 = 1 << 63;
    const COHERENT: u64 = 1 << 0;
    const INTERRUPT_REMAPPING_REQUIRED: u64 = 1 << 62;
    /// Supported widths: bit 1 for 39 bits and three levels, bit 2 for 48 and four, bit 3 for 57 and five.
    const WIDTHS: u64 = 0b1110 << 8;
    const MAXIMUM_WIDTH: u64 = 0x3f << 16;

    /// Those of registers that cannot be reached.
    pub const ABSENT: Self = Self { version: 0, capability: 0, extended: 0 };

    /// What [`Self::and`] starts with.
    pub(super) const ALL: Self = Self { version: u32::MAX, capability: u64::MAX, extended: u64::MAX };

    /// What both can do, as far as tables depend on it.
    pub(super) fn and(self, other: Self) -> Self {
        let width = (self.capability & Self::MAXIMUM_WIDTH).min(other.capability & Self::MAXIMUM_WIDTH);
        Self {
            version: self.version,
            capability: self.capability & other.capability & !Self::MAXIMUM_WIDTH | width,
            extended: self.extended & other.extended,
        }
    }

    /// Whether there is a unit: otherwise the bus gives zeros or ones.
    pub fn is_present(self) -> bool {
        ![0, u32::MAX].contains(&self.version) && ![0, u64::MAX].contains(&self.capability) && self.extended != u64::MAX
    }

    /// Whether it translates by tables that this code can build.
    pub const fn translates(self) -> bool {
        self.capability & Self::WIDTHS != 0
    }

    /// Whether it blocks the interrupts that it does not remap.
    pub const fn blocks_interrupts(self) -> bool {
        self.extended & Self::INTERRUPT_REMAPPING_REQUIRED != 0
    }

    /// The numbers of levels of tables that it walks: 3, 4, 5.
    pub fn levels(self) -> impl Iterator<Item = u32> {
        (3..=5).filter(move |level| self.capability & Self::WIDTHS & 1 << (8 + level - 2) != 0)
    }

    /// The width of addresses that devices can use.
    pub const fn address_bits(self) -> u32 {
        (self.capability >> 16 & 0x3f) as u32 + 1
    }

    /// The highest level with pages: 3 for 1 GiB, 2 for 2 MiB, 1 for 4 KiB.
    pub const fn leaf_level(self) -> u32 {
        match (self.capability & Self::PAGES_1G != 0, self.capability & Self::PAGES_2M != 0) {
            (true, true) => 3,
            (_, true) => 2,
            _ => 1,
        }
    }

    /// Whether its walks see what is in the processors' caches.
    pub const fn is_coherent(self) -> bool {
        self.extended & Self::COHERENT != 0
    }

    /// The size of its registers, as far as this code uses them.
    pub fn register_bytes(self) -> u64 {
        const PAGE: u64 = 4096;
        let (first, count) = self.fault_records();
        let end = (first + count * fault_record::BYTES).max(self.iotlb() + 16).max(offset::FIXED_END);
        end.next_multiple_of(PAGE)
    }

    /// The offset of the first fault record, and their number.
    const fn fault_records(self) -> (u64, u64) {
        ((self.capability >> 24 & 0x3ff) * 16, (self.capability >> 40 & 0xff) + 1)
    }

    /// The offset of the IOTLB's registers.
    const fn iotlb(self) -> u64 {
        (self.extended >> 8 & 0x3ff) * 16
    }

    const fn has(self, capability: u64) -> bool {
        self.capability & capability != 0
    }
}

/// A unit has not done what this names, or not in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Silent(pub &'static str);

/// A transfer that a unit has blocked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Bus, device and function.
    pub source: u16,
    /// The page that it aimed at.
    pub page: u64,
    /// Whether it would have read, not written.
    pub is_read: bool,
    /// VT-d, 7.1.3 "Fault Conditions and Remapping Hardware Behavior for Various Requests".
    pub reason: u8,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, page, is_read, reason } = self;
        let (bus, device, function) = (source >> 8, source >> 3 & 0x1f, source & 7);
        let what = if *is_read { "read" } else { "write" };
        write!(f, "a {what} of device {bus:02x}:{device:02x}.{function} at {page:#x} (fault reason {reason:#x})")
    }
}

/// A unit.
#[derive(Debug)]
pub struct Unit<R> {
    registers: R,
    capabilities: Capabilities,
}

impl<R: Registers> Unit<R> {
    /// The unit with these registers.
    pub fn new(registers: R) -> Self {
        let capabilities = Capabilities {
            version: registers.read_u32(offset::VERSION),
            capability: registers.read_u64(offset::CAPABILITY),
            extended: registers.read_u64(offset::EXTENDED_CAPABILITY),
        };
        Self { registers, capabilities }
    }

    /// What it can do.
    pub const fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Makes it translate by the tables of `root_table`, whatever the firmware has left it doing. Interrupts are not
    /// remapped afterwards. Only for a unit that [`Capabilities::translates`], and once the tables are in memory.
    ///
    /// # Errors
    ///
    /// The unit does not answer in time.
    pub fn turn_on(&mut self, root_table: u64) -> Result<(), Silent> {
        let fault_control = self.registers.read_u32(offset::FAULT_CONTROL);
        self.registers.write_u32(offset::FAULT_CONTROL, fault_control | MASK_FAULT_EVENTS);
        self.switch(command::TRANSLATION, false, "switch off the firmware's translation")?;
        self.switch(command::INTERRUPT_REMAPPING, false, "switch off the firmware's remapping of interrupts")?;
        self.end_queue()?;
        self.switch(command::ADVANCED_FAULT_LOG, false, "switch off the firmware's log of faults")?;
        if self.capabilities.has(Capabilities::FLUSHES_WRITE_BUFFER) {
            self.start(command::FLUSH_WRITE_BUFFER);
            self.wait_for_status(command::FLUSH_WRITE_BUFFER, 0, "flush the write buffer")?;
        }
        self.registers.write_u64(offset::ROOT_TABLE, root_table);
        self.start(command::SET_ROOT_TABLE);
        self.wait_for_status(command::SET_ROOT_TABLE, command::SET_ROOT_TABLE, "set the root table")?;
        if !self.capabilities.has(Capabilities::INVALIDATES_AT_SET_ROOT) {
            self.invalidate()?;
        }
        self.switch(command::TRANSLATION, true, "switch translation on")?;
        self.end_protected_memory()?;
        self.faults(|_| ());
        Ok(())
    }

    /// Reports each transfer that it has blocked since the last call. Returns whether there were more than it could
    /// note.
    pub fn faults(&mut self, mut report: impl FnMut(Fault)) -> bool {
        let status = self.registers.read_u32(offset::FAULT_STATUS);
        if status == u32::MAX || status & (fault_status::PENDING | fault_status::OVERFLOW) == 0 {
            return false;
        }
        let (first, count) = self.capabilities.fault_records();
        for record in (0..count).map(|number| first + number * fault_record::BYTES) {
            let high = self.registers.read_u64(record + 8);
            if high & fault_record::IN_USE == 0 {
                continue;
            }
            report(Fault {
                source: high as u16,
                page: self.registers.read_u64(record) & !0xfff,
                is_read: high & fault_record::READ != 0,
                reason: (high >> 32) as u8,
            });
            self.registers.write_u32(record + 12, (fault_record::IN_USE >> 32) as u32);
        }
        let has_overflowed = status & fault_status::OVERFLOW != 0;
        if has_overflowed {
            self.registers.write_u32(offset::FAULT_STATUS, fault_status::OVERFLOW);
        }
        has_overflowed
    }

    /// Switches one thing on or off, if it is not so already.
    fn switch(&mut self, what: u32, on: bool, name: &'static str) -> Result<(), Silent> {
        let lasting = self.lasting();
        let wanted = if on { what } else { 0 };
        if lasting & what != wanted {
            self.registers.write_u32(offset::COMMAND, lasting & !what | wanted);
        }
        self.wait_for_status(what, wanted, name)
    }

    /// Starts what is done once.
    fn start(&mut self, what: u32) {
        let lasting = self.lasting();
        self.registers.write_u32(offset::COMMAND, lasting | what);
    }

    fn lasting(&self) -> u32 {
        self.registers.read_u32(offset::STATUS) & command::LASTING
    }

    fn wait_for_status(&self, mask: u32, value: u32, name: &'static str) -> Result<(), Silent> {
        wait(name, || self.registers.read_u32(offset::STATUS) & mask == value)
    }

    /// Ends queued invalidation, beside which the registers that [`Self::invalidate`] uses have no effect.
    fn end_queue(&mut self) -> Result<(), Silent> {
        const NAME: &str = "finish the firmware's queue of invalidations";
        if self.lasting() & command::QUEUED_INVALIDATION == 0 {
            return Ok(());
        }
        wait(NAME, || self.registers.read_u64(offset::QUEUE_HEAD) == self.registers.read_u64(offset::QUEUE_TAIL))?;
        self.switch(command::QUEUED_INVALIDATION, false, NAME)
    }

    /// Invalidates the context cache, and then the IOTLB, which is filled from it.
    fn invalidate(&mut self) -> Result<(), Silent> {
        let context = context_command::INVALIDATE | context_command::GLOBAL;
        self.invalidate_by(offset::CONTEXT_COMMAND, context, context_command::DONE, "invalidate the context cache")?;
        let drains =
            [(Capabilities::DRAINS_READS, iotlb::DRAIN_READS), (Capabilities::DRAINS_WRITES, iotlb::DRAIN_WRITES)];
        let drains = drains.iter().filter(|(capability, _)| self.capabilities.has(*capability));
        let all = drains.fold(iotlb::INVALIDATE | iotlb::GLOBAL, |all, (_, drain)| all | drain);
        let register = self.capabilities.iotlb() + offset::IOTLB_INVALIDATE;
        self.invalidate_by(register, all, iotlb::DONE, "invalidate the IOTLB")
    }

    /// Writes to a register of invalidation, whose highest bit is set until it is done.
    fn invalidate_by(&mut self, register: u64, what: u64, done: u64, name: &'static str) -> Result<(), Silent> {
        const IS_PENDING: u64 = 1 << 63;
        self.registers.write_u64(register, what);
        wait(name, || self.registers.read_u64(register) & IS_PENDING == 0)?;
        if self.registers.read_u64(register) & done == 0 { Err(Silent(name)) } else { Ok(()) }
    }

    /// Ends the firmware's protection of memory by ranges, which applies to translated addresses, too.
    fn end_protected_memory(&mut self) -> Result<(), Silent> {
        if !self.capabilities.has(Capabilities::MEMORY_REGIONS) {
            return Ok(());
        }
        let enable = self.registers.read_u32(offset::PROTECTED_MEMORY);
        if enable & protected_memory::ENABLE != 0 {
            self.registers.write_u32(offset::PROTECTED_MEMORY, enable & !protected_memory::ENABLE);
        }
        wait("open the firmware's protected memory", || {
            self.registers.read_u32(offset::PROTECTED_MEMORY) & protected_memory::IS_ON == 0
        })
    }
}

fn wait(name: &'static str, is_done: impl Fn() -> bool) -> Result<(), Silent> {
    if (0..POLLS).any(|_| is_done()) { Ok(()) } else { Err(Silent(name)) }
}
