//! A unit that does what VT-d says, as far as this crate uses it, and panics at what VT-d forbids; and memory for its
//! tables.

use std::cell::RefCell;
use std::rc::Rc;
use std::vec::Vec;

use super::registers::{
    Registers, command, context_command, fault_record, fault_status, iotlb, offset, protected_memory,
};

/// Offsets of the registers whose place a unit chooses.
pub const IOTLB: u64 = 0x228;
const RECORDS: u64 = 0x400;
/// The number of fault records.
pub const RECORD_COUNT: usize = 2;

/// Capabilities of a unit with 39 and 48 bits, all pages, and what makes work.
pub const CAPABILITY: u64 =
    0b0110 << 8 | 47 << 16 | 0b11 << 34 | (RECORDS / 16) << 24 | (RECORD_COUNT as u64 - 1) << 40 | 0b11 << 54 | 1 << 7;
/// Of the capabilities: protected memory regions.
pub const MEMORY_REGIONS: u64 = 0b11 << 5;
/// Of the capabilities: setting the root table invalidates all.
pub const INVALIDATES: u64 = 1 << 63;
/// Of the capabilities: the write buffer must be flushed.
pub const WRITE_BUFFER: u64 = 1 << 4;
/// Its extended capabilities: coherent walks.
pub const EXTENDED: u64 = 1 << 0 | (IOTLB / 16) << 8;

/// Pages of tables at an address.
#[derive(Clone, Debug)]
pub struct TableMemory {
    pub address: u64,
    pub pages: Vec<[u64; 512]>,
}

impl TableMemory {
    fn read(&self, address: u64) -> u64 {
        let offset = address.checked_sub(self.address).expect("a table within the memory for tables");
        self.pages[(offset / 4096) as usize][(offset % 4096 / 8) as usize]
    }
}

/// The state of a unit.
#[derive(Debug)]
pub struct State {
    pub version: u32,
    pub capability: u64,
    pub extended: u64,
    /// Global status.
    pub status: u32,
    /// The command bit, or the register, that never gets done.
    pub stuck: Option<u64>,
    /// Whether the registers of invalidation do nothing, as in units of major version 6.
    pub only_queues: bool,
    root_register: u64,
    root: u64,
    is_context_cache_stale: bool,
    is_iotlb_stale: bool,
    is_buffer_full: bool,
    pub protected_memory: u32,
    pub queue: [u64; 2],
    fault_status: u32,
    pub fault_control: u32,
    records: [[u64; 2]; RECORD_COUNT],
}

/// A unit; clones are the same one.
#[derive(Clone, Debug)]
pub struct FakeUnit(pub Rc<RefCell<State>>);

impl FakeUnit {
    /// One that does nothing yet.
    pub fn new(capability: u64, extended: u64) -> Self {
        Self(Rc::new(RefCell::new(State {
            version: 0x10,
            capability,
            extended,
            status: 0,
            stuck: None,
            only_queues: false,
            root_register: 0,
            root: 0,
            is_context_cache_stale: true,
            is_iotlb_stale: true,
            is_buffer_full: capability & WRITE_BUFFER != 0,
            protected_memory: 0,
            queue: [0; 2],
            fault_status: 0,
            fault_control: 0,
            records: [[0; 2]; RECORD_COUNT],
        })))
    }

    /// A transfer of a device. Returns the address that it gets to. A transfer that is blocked leaves a fault.
    pub fn transfer(&self, memory: &TableMemory, source: u16, address: u64, is_read: bool) -> Option<u64> {
        let mut state = self.0.borrow_mut();
        if state.status & command::TRANSLATION == 0 {
            return Some(address);
        }
        let found = state.walk(memory, source, address);
        if found.is_none() {
            state.note_fault(source, address, is_read);
        }
        found
    }
}

impl State {
    fn walk(&self, memory: &TableMemory, source: u16, address: u64) -> Option<u64> {
        let (bus, function) = (u64::from(source >> 8), u64::from(source & 0xff));
        let root = memory.read(self.root + 16 * bus);
        assert_eq!((root & 0xffe, memory.read(self.root + 16 * bus + 8)), (0, 0), "reserved bits of a root entry");
        let context = (root & !0xfff) + 16 * function;
        let [low, high] = [memory.read(context), memory.read(context + 8)];
        assert_eq!(low & 0xfff, 1, "present, faults reported, untranslated requests only");
        assert_ne!(high >> 8 & 0xffff, 0, "a domain that this unit keeps for itself");
        assert_eq!(high & !0xff_ff07, 0, "reserved bits of a context entry");
        let mut level = (high & 7) as u32 + 2;
        assert!(self.capability >> (8 + level - 2) & 1 != 0, "this unit does not walk {level} levels");
        let bits = (12 + 9 * level).min((self.capability >> 16 & 0x3f) as u32 + 1);
        if address >> bits != 0 {
            return None;
        }
        let mut table = low & !0xfff;
        loop {
            let bytes = 1_u64 << (12 + 9 * (level - 1));
            let entry = memory.read(table + 8 * (address / bytes % 512));
            if entry & 0b11 == 0 {
                return None;
            }
            assert_eq!(entry & 0xfff & !(1 << 7), 0b11, "readable and writable, and nothing else");
            let is_page = level == 1 || entry & 1 << 7 != 0;
            if !is_page {
                (table, level) = (entry & !0xfff, level - 1);
                continue;
            }
            assert!(level == 1 || level < 4 && self.capability >> (34 + level - 2) & 1 != 0, "no such large page");
            let page = entry & !0xfff;
            assert!(page.is_multiple_of(bytes), "reserved bits of a large page");
            return Some(page + address % bytes);
        }
    }

    fn note_fault(&mut self, source: u16, address: u64, is_read: bool) {
        if self.fault_status & fault_status::OVERFLOW != 0 {
            return;
        }
        let free = self.records.iter_mut().find(|[_, high]| high & fault_record::IN_USE == 0);
        let Some(record) = free else {
            self.fault_status |= fault_status::OVERFLOW;
            return;
        };
        let kind = if is_read { fault_record::READ | 6 << 32 } else { 5 << 32 };
        *record = [address & !0xfff, fault_record::IN_USE | kind | u64::from(source)];
        self.fault_status |= fault_status::PENDING;
    }

    fn command(&mut self, value: u32) {
        let lasting = (value ^ self.status) & command::LASTING;
        let once = value & !command::LASTING;
        assert_eq!(lasting.count_ones() + once.count_ones(), 1, "one command at a time: {value:#x}");
        let what = lasting | once;
        if self.stuck == Some(what.into()) {
            return;
        }
        self.status ^= lasting;
        match what {
            command::TRANSLATION if value & what != 0 => {
                assert!(self.status & command::SET_ROOT_TABLE != 0, "no root table");
                assert!(!self.is_context_cache_stale && !self.is_iotlb_stale && !self.is_buffer_full, "stale");
            }
            command::QUEUED_INVALIDATION => assert_eq!(self.queue[0], self.queue[1], "work is left in the queue"),
            command::SET_ROOT_TABLE => {
                assert_eq!(self.status & command::TRANSLATION, 0, "translation is on");
                (self.root, self.status) = (self.root_register, self.status | command::SET_ROOT_TABLE);
                let is_stale = self.capability & INVALIDATES == 0;
                (self.is_context_cache_stale, self.is_iotlb_stale) = (is_stale, is_stale);
            }
            command::FLUSH_WRITE_BUFFER => self.is_buffer_full = false,
            _ => (),
        }
    }

    fn is_stuck(&self, register: u64) -> bool {
        self.stuck == Some(register)
    }

    fn invalidate(&mut self, register: u64, value: u64) {
        assert_eq!(self.status & command::QUEUED_INVALIDATION, 0, "the queue is the only way while it is on");
        if self.only_queues {
            return;
        }
        if register == offset::CONTEXT_COMMAND {
            assert_eq!(value, context_command::INVALIDATE | context_command::GLOBAL);
            (self.is_context_cache_stale, self.is_iotlb_stale) = (false, true);
        } else {
            let drains = iotlb::DRAIN_READS | iotlb::DRAIN_WRITES;
            assert_eq!(value & !drains, iotlb::INVALIDATE | iotlb::GLOBAL);
            assert_eq!(value & drains != 0, self.capability >> 54 & 0b11 != 0, "drains what the unit can drain");
            self.is_iotlb_stale = false;
        }
    }
}

impl Registers for FakeUnit {
    fn read_u32(&self, offset: u64) -> u32 {
        let state = self.0.borrow();
        match offset {
            offset::VERSION => state.version,
            // A flush that never ends.
            offset::STATUS if state.is_stuck(command::FLUSH_WRITE_BUFFER.into()) => {
                state.status | command::FLUSH_WRITE_BUFFER
            }
            offset::STATUS => state.status,
            offset::FAULT_STATUS => state.fault_status,
            offset::FAULT_CONTROL => state.fault_control,
            offset::PROTECTED_MEMORY => state.protected_memory,
            _ => panic!("no register of four bytes at {offset:#x}"),
        }
    }

    fn read_u64(&self, offset: u64) -> u64 {
        let state = self.0.borrow();
        match offset {
            offset::CAPABILITY => state.capability,
            offset::EXTENDED_CAPABILITY => state.extended,
            offset::CONTEXT_COMMAND | IOTLB if state.is_stuck(offset) => 1 << 63,
            offset::CONTEXT_COMMAND | IOTLB if state.only_queues => 0,
            offset::CONTEXT_COMMAND => 1 << 59,
            IOTLB => 1 << 57,
            offset::QUEUE_HEAD => state.queue[0],
            offset::QUEUE_TAIL => state.queue[1],
            RECORDS.. => {
                let word = (offset - RECORDS) as usize / 8;
                state.records[word / 2][word % 2]
            }
            _ => panic!("no register of eight bytes at {offset:#x}"),
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        let mut state = self.0.borrow_mut();
        match offset {
            offset::COMMAND => state.command(value),
            offset::FAULT_CONTROL => state.fault_control = value,
            offset::FAULT_STATUS => state.fault_status &= !value,
            offset::PROTECTED_MEMORY => {
                let is_on = if state.is_stuck(offset) { protected_memory::IS_ON } else { value >> 31 };
                state.protected_memory = value & protected_memory::ENABLE | is_on;
            }
            RECORDS.. => {
                let record = (offset - RECORDS) as usize / 16;
                assert_eq!((offset % 16, value), (12, 1 << 31), "only this bit can be cleared");
                state.records[record][1] &= !fault_record::IN_USE;
                if state.records.iter().all(|[_, high]| high & fault_record::IN_USE == 0) {
                    state.fault_status &= !fault_status::PENDING;
                }
            }
            _ => panic!("no register of four bytes at {offset:#x}"),
        }
    }

    fn write_u64(&mut self, offset: u64, value: u64) {
        let mut state = self.0.borrow_mut();
        match offset {
            offset::ROOT_TABLE => {
                assert_eq!(value & 0xfff, 0, "tables as of old, not the scalable ones");
                state.root_register = value;
            }
            offset::CONTEXT_COMMAND | IOTLB => state.invalidate(offset, value),
            _ => panic!("no register of eight bytes at {offset:#x}"),
        }
    }
}
