//! The registers of a unit: offsets and bits (VT-d, 11.4 "Register Descriptions").

/// Access to the registers of one unit, by their offsets.
pub trait Registers {
    /// A register of four bytes.
    fn read_u32(&self, offset: u64) -> u32;
    /// A register of eight bytes.
    fn read_u64(&self, offset: u64) -> u64;
    /// Writes a register of four bytes.
    fn write_u32(&mut self, offset: u64, value: u32);
    /// Writes a register of eight bytes.
    fn write_u64(&mut self, offset: u64, value: u64);
}

/// Offsets.
pub mod offset {
    /// Version.
    pub const VERSION: u64 = 0x00;
    /// Capability.
    pub const CAPABILITY: u64 = 0x08;
    /// Extended capability.
    pub const EXTENDED_CAPABILITY: u64 = 0x10;
    /// Global command.
    pub const COMMAND: u64 = 0x18;
    /// Global status.
    pub const STATUS: u64 = 0x1c;
    /// Root table address.
    pub const ROOT_TABLE: u64 = 0x20;
    /// Context command.
    pub const CONTEXT_COMMAND: u64 = 0x28;
    /// Fault status.
    pub const FAULT_STATUS: u64 = 0x34;
    /// Fault event control.
    pub const FAULT_CONTROL: u64 = 0x38;
    /// Protected memory enable.
    pub const PROTECTED_MEMORY: u64 = 0x64;
    /// Invalidation queue head.
    pub const QUEUE_HEAD: u64 = 0x80;
    /// Invalidation queue tail.
    pub const QUEUE_TAIL: u64 = 0x88;
    /// The last of the registers whose place is fixed and that this code uses, and its size.
    pub const FIXED_END: u64 = QUEUE_TAIL + 8;
    /// IOTLB invalidate, from the place that the extended capability register names.
    pub const IOTLB_INVALIDATE: u64 = 8;
}

/// Global command and global status have the same bits in the same places.
pub mod command {
    /// Translation.
    pub const TRANSLATION: u32 = 1 << 31;
    /// Set root table pointer.
    pub const SET_ROOT_TABLE: u32 = 1 << 30;
    /// Advanced fault logging, of units by VT-d before revision 5.
    pub const ADVANCED_FAULT_LOG: u32 = 1 << 28;
    /// Write-buffer flush.
    pub const FLUSH_WRITE_BUFFER: u32 = 1 << 27;
    /// Queued invalidation.
    pub const QUEUED_INVALIDATION: u32 = 1 << 26;
    /// Interrupt remapping.
    pub const INTERRUPT_REMAPPING: u32 = 1 << 25;
    /// Compatibility-format interrupts.
    pub const COMPATIBILITY_INTERRUPTS: u32 = 1 << 23;
    /// Bits that say what is on. The others start something once, and are written as 0 otherwise.
    pub const LASTING: u32 =
        TRANSLATION | ADVANCED_FAULT_LOG | QUEUED_INVALIDATION | INTERRUPT_REMAPPING | COMPATIBILITY_INTERRUPTS;
}

/// Context command.
pub mod context_command {
    /// Invalidate; set until it is done.
    pub const INVALIDATE: u64 = 1 << 63;
    /// All contexts.
    pub const GLOBAL: u64 = 1 << 61;
    /// What was invalidated; 0 is nothing.
    pub const DONE: u64 = 0b11 << 59;
}

/// IOTLB invalidate.
pub mod iotlb {
    /// Invalidate; set until it is done.
    pub const INVALIDATE: u64 = 1 << 63;
    /// All domains.
    pub const GLOBAL: u64 = 1 << 60;
    /// What was invalidated; 0 is nothing.
    pub const DONE: u64 = 0b11 << 57;
    /// Wait for reads that are under way.
    pub const DRAIN_READS: u64 = 1 << 49;
    /// Wait for writes that are under way.
    pub const DRAIN_WRITES: u64 = 1 << 48;
}

/// Fault status.
pub mod fault_status {
    /// Faults were lost, as all records were in use; cleared by writing 1.
    pub const OVERFLOW: u32 = 1 << 0;
    /// There are faults in the records.
    pub const PENDING: u32 = 1 << 1;
}

/// Fault event control: no interrupt.
pub const MASK_FAULT_EVENTS: u32 = 1 << 31;

/// A fault record, of 16 bytes.
pub mod fault_record {
    /// Its size.
    pub const BYTES: u64 = 16;
    /// In the upper half: the record is in use; cleared by writing 1.
    pub const IN_USE: u64 = 1 << 63;
    /// In the upper half: the device asked to read.
    pub const READ: u64 = 1 << 62;
}

/// Protected memory enable.
pub mod protected_memory {
    /// Protection is asked for.
    pub const ENABLE: u32 = 1 << 31;
    /// Protection is on.
    pub const IS_ON: u32 = 1 << 0;
}
