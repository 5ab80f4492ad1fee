//! The guest hypervisor's own paging: from its linear addresses to its physical ones (SDM Volume 3A, chapter 4
//! "Paging").
//!
//! Operands of VMX instructions are translated here, and what a task switch accesses. All of them are data accesses.

use crate::hw::GuestMemory;
use crate::msr::Access;
use crate::outcome::{FAULT_KEY, FAULT_PRESENT, FAULT_RESERVED, FAULT_USER, FAULT_WRITE, Fault};
use crate::registers::*;
use ept::Gpa;

/// The mode of an access (SDM Volume 3A, 4.6 "Access Rights").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum AccessMode {
    /// CPL is below 3, or the access is an implicit one, to a system structure.
    #[default]
    Supervisor,
    /// CPL is 3.
    User,
}

/// The registers that decide how linear addresses are translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// RFLAGS, for AC under SMAP.
    pub rflags: u64,
    /// Physical-address width.
    pub physical_bits: u32,
    /// PKRU, for CR4.PKE.
    pub pkru: u32,
    /// IA32_PKRS, for CR4.PKS.
    pub pkrs: u32,
    /// The mode of the accesses.
    pub mode: AccessMode,
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// How one paging mode lays out its tables.
struct Layout {
    /// Levels walked in memory, from this one down to 1.
    levels: u32,
    /// Base-2 logarithm of the entries in a table.
    index_bits: u32,
    /// Whether entries are eight bytes.
    wide: bool,
}

impl Paging {
    fn layout(&self) -> Layout {
        let wide = self.cr4 & CR4_PAE != 0;
        let levels = match (self.efer & EFER_LMA != 0, wide) {
            (true, _) if self.cr4 & CR4_LA57 != 0 => 5,
            (true, _) => 4,
            (false, true) => 3,
            (false, false) => 2,
        };
        Layout { levels, index_bits: if wide { 9 } else { 10 }, wide }
    }

    /// Translates the address of a byte. Accessed and dirty flags are set as the processor sets them. An entry that
    /// another processor changes meanwhile keeps that change, and the walk begins anew.
    ///
    /// # Errors
    ///
    /// The page fault, or the general-protection fault of an address that is not canonical. DEVIATION: a page fault,
    /// too, where entries change again and again, as from a translation that another processor has just taken away.
    pub fn translate(&self, memory: &impl GuestMemory, linear: u64, access: Access) -> Result<Gpa, Fault> {
        const MOST_WALKS: usize = 16;
        if self.cr0 & CR0_PG == 0 {
            return Ok(Gpa(linear & 0xffff_ffff));
        }
        for _ in 0..MOST_WALKS {
            if let Some(translated) = self.walk(memory, linear, access)? {
                return Ok(translated);
            }
        }
        Err(self.fault(linear, access, 0))
    }

    /// Walks the tables once. Nothing if an entry whose flags were to be set has changed since it was read.
    fn walk(&self, memory: &impl GuestMemory, linear: u64, access: Access) -> Result<Option<Gpa>, Fault> {
        let layout = self.layout();
        let mut rights = WRITABLE | USER;
        let mut table = match layout.levels {
            3 => self.cr3 & 0xffff_ffe0,
            2 => self.cr3 & 0xffff_f000,
            _ => self.cr3 & self.address_bits(),
        };
        for level in (1..=layout.levels).rev() {
            let shift = 12 + layout.index_bits * (level - 1);
            let width = if level == 3 && layout.levels == 3 { 2 } else { layout.index_bits };
            let index = linear >> shift & ((1 << width) - 1);
            let at = Gpa(table + index * if layout.wide { 8 } else { 4 });
            let entry = if layout.wide { memory.read_u64(at) } else { memory.read_u32(at).into() };
            if entry & PRESENT == 0 {
                return Err(self.fault(linear, access, 0));
            }
            if entry & self.reserved(&layout, level, entry) != 0 {
                return Err(self.fault(linear, access, FAULT_PRESENT | FAULT_RESERVED));
            }
            let is_pdpte = layout.levels == 3 && level == 3;
            if !is_pdpte {
                rights &= entry;
            }
            if level == 1 || self.is_large(&layout, level, entry) {
                self.check_key(linear, access, rights, entry)?;
                self.check_rights(linear, access, rights)?;
                let dirty = if matches!(access, Access::Write) { DIRTY } else { 0 };
                let are_set = set_flags(memory, &layout, at, entry, ACCESSED | dirty);
                return Ok(are_set.then(|| self.page_address(&layout, level, entry, shift, linear)));
            }
            if !is_pdpte && !set_flags(memory, &layout, at, entry, ACCESSED) {
                return Ok(None);
            }
            table = if layout.wide { entry & self.address_bits() } else { entry & 0xffff_f000 };
        }
        unreachable!("level 1 always ends a walk")
    }

    fn address_bits(&self) -> u64 {
        ((1 << self.physical_bits) - 1) & !0xfff
    }

    fn is_large(&self, layout: &Layout, level: u32, entry: u64) -> bool {
        entry & LARGE != 0
            && match (layout.levels, level) {
                (2, 2) => self.cr4 & CR4_PSE != 0,
                (_, 2) => true,
                (4 | 5, 3) => true,
                _ => false,
            }
    }

    fn reserved(&self, layout: &Layout, level: u32, entry: u64) -> u64 {
        if !layout.wide {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            return if self.is_large(layout, level, entry) { 1 << 21 } else { 0 };
        }
        let beyond = ((1 << 52) - 1) & !((1u64 << self.physical_bits) - 1);
        let no_execute = if self.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        if layout.levels == 3 && level == 3 {
            return beyond | 0xfff0_0000_0000_01e6;
        }
        let high = if layout.levels == 3 { 0x7ff0_0000_0000_0000 } else { 0 };
        let size = match level {
            4 | 5 => LARGE,
            2 | 3 if entry & LARGE != 0 => ((1 << (12 + 9 * (level - 1))) - 1) & !0x1fff,
            _ => 0,
        };
        beyond | no_execute | high | size
    }

    fn check_rights(&self, linear: u64, access: Access, rights: u64) -> Result<(), Fault> {
        let smap = self.cr4 & CR4_SMAP != 0 && self.rflags & RFLAGS_AC == 0;
        let is_users = rights & USER != 0;
        let is_forbidden = match self.mode {
            AccessMode::Supervisor => smap && is_users,
            AccessMode::User => !is_users,
        };
        let read_only = matches!(access, Access::Write) && self.obeys_write_protection() && rights & WRITABLE == 0;
        if is_forbidden || read_only { Err(self.fault(linear, access, FAULT_PRESENT)) } else { Ok(()) }
    }

    /// Whether read-only pages cannot be written.
    fn obeys_write_protection(&self) -> bool {
        self.cr0 & CR0_WP != 0 || self.mode == AccessMode::User
    }

    /// The protection key of a page in IA-32e mode (SDM Volume 3A, 4.6.2 "Protection Keys"): PKRU holds the rights to
    /// user-mode pages, also for supervisor-mode accesses; IA32_PKRS those to supervisor-mode pages.
    fn check_key(&self, linear: u64, access: Access, rights: u64, entry: u64) -> Result<(), Fault> {
        const ACCESS_DISABLE: u32 = 1 << 0;
        const WRITE_DISABLE: u32 = 1 << 1;
        let (enabled, register) = if rights & USER != 0 { (CR4_PKE, self.pkru) } else { (CR4_PKS, self.pkrs) };
        if self.efer & EFER_LMA == 0 || self.cr4 & enabled == 0 {
            return Ok(());
        }
        let key = entry >> 59 & 0xf;
        let disabled = register >> (2 * key);
        let obeys = matches!(access, Access::Write) && self.obeys_write_protection();
        let write_disabled = obeys && disabled & WRITE_DISABLE != 0;
        if disabled & ACCESS_DISABLE != 0 || write_disabled {
            return Err(self.fault(linear, access, FAULT_PRESENT | FAULT_KEY));
        }
        Ok(())
    }

    fn page_address(&self, layout: &Layout, level: u32, entry: u64, shift: u32, linear: u64) -> Gpa {
        let offset = (1u64 << shift) - 1;
        let frame = match (layout.wide, level) {
            (true, _) => entry & self.address_bits(),
            (false, 1) => entry & 0xffff_f000,
            (false, _) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
        };
        Gpa(frame & !offset | linear & offset)
    }

    fn fault(&self, linear: u64, access: Access, code: u32) -> Fault {
        let write = if matches!(access, Access::Write) { FAULT_WRITE } else { 0 };
        let user = if self.mode == AccessMode::User { FAULT_USER } else { 0 };
        Fault::Page { address: linear, error_code: code | write | user }
    }

    /// The address so many bytes further on. Linear addresses wrap around, at 4 GiB outside IA-32e mode. Compatibility
    /// mode is not of interest: VMX instructions and task switches fault in it.
    fn following(&self, linear: u64, bytes: usize) -> u64 {
        let mask = if self.efer & EFER_LMA != 0 { u64::MAX } else { 0xffff_ffff };
        linear.wrapping_add(bytes as u64) & mask
    }

    /// Copies an operand in, page by page.
    ///
    /// # Errors
    ///
    /// The fault of the first byte that faults.
    pub fn read(&self, memory: &impl GuestMemory, linear: u64, to: &mut [u8]) -> Result<(), Fault> {
        let in_first = bytes_in_page(linear).min(to.len());
        let (first, second) = to.split_at_mut(in_first);
        let first_at = self.translate(memory, linear, Access::Read)?;
        if !second.is_empty() {
            let second_at = self.translate(memory, self.following(linear, in_first), Access::Read)?;
            memory.read(second_at, second);
        }
        memory.read(first_at, first);
        Ok(())
    }

    /// Copies an operand out: nothing is written if any byte of it faults.
    ///
    /// # Errors
    ///
    /// The fault of the first byte that faults.
    pub fn write(&self, memory: &impl GuestMemory, linear: u64, from: &[u8]) -> Result<(), Fault> {
        let in_first = bytes_in_page(linear).min(from.len());
        let (first, second) = from.split_at(in_first);
        let first_at = self.translate(memory, linear, Access::Write)?;
        if !second.is_empty() {
            let second_at = self.translate(memory, self.following(linear, in_first), Access::Write)?;
            memory.write(second_at, second);
        }
        memory.write(first_at, first);
        Ok(())
    }
}

fn bytes_in_page(linear: u64) -> usize {
    4096 - (linear & 0xfff) as usize
}

/// Sets flags in an entry that was read as `entry`. Returns whether they are set; not if the entry has changed.
fn set_flags(memory: &impl GuestMemory, layout: &Layout, at: Gpa, entry: u64, flags: u64) -> bool {
    if entry & flags == flags {
        return true;
    }
    if layout.wide {
        return memory.compare_exchange_u64(at, entry, entry | flags);
    }
    // The other half of the word is another entry.
    let word_at = Gpa(at.0 & !7);
    let shift = 8 * (at.0 & 7);
    let word = memory.read_u64(word_at);
    word >> shift & 0xffff_ffff == entry && memory.compare_exchange_u64(word_at, word, word | flags << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeMemory;
    use ept::Hpa;
    use std::cell::RefCell;
    use std::vec::Vec;

    const LONG: Paging = Paging {
        cr0: CR0_PG | CR0_WP | 1,
        cr3: 0x1000,
        cr4: CR4_PAE,
        efer: EFER_LMA | EFER_NXE,
        rflags: 2,
        physical_bits: 39,
        pkru: 0,
        pkrs: 0,
        mode: AccessMode::Supervisor,
    };

    /// Maps linear 0 to 0x5000 (user, writable), 0x1000 to 0x6000 (supervisor, read-only), 0x20_0000 to a 2-MiB page at
    /// 0.
    fn tables() -> FakeMemory {
        let memory = FakeMemory::new(0x20_0000);
        for (at, entry) in
            [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x3008, 0x83), (0x4000, 0x5007), (0x4008, 0x6001)]
        {
            memory.write_u64(Gpa(at), entry);
        }
        memory
    }

    #[test]
    fn a_four_level_walk_ends_at_the_page_and_sets_accessed_and_dirty() {
        let memory = tables();
        assert_eq!(LONG.translate(&memory, 0x123, Access::Write), Ok(Gpa(0x5123)));
        assert_eq!(memory.read_u64(Gpa(0x4000)), 0x5067);
        assert_eq!(memory.read_u64(Gpa(0x1000)), 0x2027);
        assert_eq!(LONG.translate(&memory, 0x20_1234, Access::Read), Ok(Gpa(0x1234)));
        assert_eq!(memory.read_u64(Gpa(0x3008)), 0xa3);
    }

    /// Memory in which an entry changes right after it was read.
    struct Racing {
        memory: FakeMemory,
        at: Gpa,
        /// What it changes to; at last, to itself.
        values: RefCell<Vec<u64>>,
    }

    impl GuestMemory for Racing {
        fn read(&self, from: Gpa, to: &mut [u8]) {
            self.memory.read(from, to);
            if from == self.at
                && let Some(value) = self.values.borrow_mut().pop()
            {
                self.memory.write_u64(from, value);
            }
        }

        fn write(&self, to: Gpa, from: &[u8]) {
            self.memory.write(to, from);
        }

        fn compare_exchange_u64(&self, at: Gpa, seen: u64, new: u64) -> bool {
            self.memory.compare_exchange_u64(at, seen, new)
        }

        fn translate(&self, address: Gpa) -> Hpa {
            self.memory.translate(address)
        }
    }

    #[test]
    fn an_entry_that_another_processor_clears_during_the_walk_stays_clear() {
        let racing = |values| Racing { memory: tables(), at: Gpa(0x4000), values: RefCell::new(values) };
        let cleared = racing(std::vec![0]);
        let fault = Err(Fault::Page { address: 0x123, error_code: 2 });
        assert_eq!(LONG.translate(&cleared, 0x123, Access::Write), fault);
        assert_eq!(cleared.memory.read_u64(Gpa(0x4000)), 0);
        let moved = racing(std::vec![0x7007]);
        assert_eq!(LONG.translate(&moved, 0x123, Access::Write), Ok(Gpa(0x7123)));
        assert_eq!(moved.memory.read_u64(Gpa(0x4000)), 0x7067);
        let restless = racing((0..1000).map(|number| number << 12 | 7).collect());
        assert_eq!(LONG.translate(&restless, 0x123, Access::Write), fault);
    }

    #[test]
    fn an_entry_of_four_bytes_gets_its_flags_and_its_neighbour_none() {
        let memory = FakeMemory::new(0x10000);
        memory.write_u32(Gpa(0x1000), 0x2003);
        memory.write_u64(Gpa(0x2000), 0x7003 << 32 | 0x6003);
        let legacy = Paging { cr4: CR4_PSE, efer: 0, ..LONG };
        assert_eq!(legacy.translate(&memory, 0x1234, Access::Write), Ok(Gpa(0x7234)));
        assert_eq!((memory.read_u64(Gpa(0x2000)), memory.read_u32(Gpa(0x1000))), (0x7063 << 32 | 0x6003, 0x2023));
    }

    #[test]
    fn faults_carry_the_error_code_of_the_access() {
        let memory = tables();
        let fault = |linear, access| LONG.translate(&memory, linear, access).unwrap_err();
        assert_eq!(fault(0x2000, Access::Read), Fault::Page { address: 0x2000, error_code: 0 });
        assert_eq!(fault(0x1008, Access::Write), Fault::Page { address: 0x1008, error_code: 3 });
        memory.write_u64(Gpa(0x4010), 1 << 45 | 7);
        assert_eq!(fault(0x2000, Access::Read), Fault::Page { address: 0x2000, error_code: 9 });
    }

    #[test]
    fn write_protection_needs_cr0_wp_and_smap_needs_ac_clear() {
        let memory = tables();
        let no_wp = Paging { cr0: CR0_PG | 1, ..LONG };
        assert_eq!(no_wp.translate(&memory, 0x1000, Access::Write), Ok(Gpa(0x6000)));
        let smap = Paging { cr4: LONG.cr4 | CR4_SMAP, ..LONG };
        assert!(smap.translate(&memory, 0, Access::Read).is_err());
        assert!(smap.translate(&memory, 0x1000, Access::Read).is_ok());
        assert!(Paging { rflags: RFLAGS_AC, ..smap }.translate(&memory, 0, Access::Read).is_ok());
    }

    #[test]
    fn a_user_mode_access_needs_a_user_page_and_obeys_write_protection_always() {
        let memory = tables();
        let user = Paging { mode: AccessMode::User, cr0: CR0_PG | 1, cr4: LONG.cr4 | CR4_SMAP, ..LONG };
        assert!(user.translate(&memory, 0, Access::Write).is_ok());
        let fault = |address, error_code| Err(Fault::Page { address, error_code });
        assert_eq!(user.translate(&memory, 0x1000, Access::Read), fault(0x1000, 5));
        assert_eq!(user.translate(&memory, 0x2000, Access::Write), fault(0x2000, 6));
        memory.write_u64(Gpa(0x4000), 0x5005);
        assert_eq!(user.translate(&memory, 0, Access::Write), fault(0, 7));
        assert!(user.translate(&memory, 0, Access::Read).is_ok());
    }

    #[test]
    fn protection_keys_are_of_the_page_and_a_supervisor_is_no_exception() {
        let memory = tables();
        // User page with key 1, supervisor page with key 2.
        memory.write_u64(Gpa(0x4000), 1 << 59 | 0x5007);
        memory.write_u64(Gpa(0x4008), 2 << 59 | 0x6003);
        let keys = Paging { cr4: LONG.cr4 | CR4_PKE | CR4_PKS, ..LONG };
        let outcome = |paging: Paging, linear, access| paging.translate(&memory, linear, access).map(|_| ());
        let fault = |address, error_code| Err(Fault::Page { address, error_code });
        let no_write = Paging { pkru: 2 << 2, pkrs: 0, ..keys };
        assert_eq!(outcome(no_write, 0, Access::Write), fault(0, 0x23));
        assert_eq!(outcome(no_write, 0, Access::Read), Ok(()));
        assert_eq!(outcome(Paging { cr0: CR0_PG | 1, ..no_write }, 0, Access::Write), Ok(()));
        assert_eq!(outcome(Paging { cr4: LONG.cr4, ..no_write }, 0, Access::Write), Ok(()));
        assert_eq!(outcome(no_write, 0x1000, Access::Write), Ok(()), "PKRU is for user-mode pages");
        let no_access = Paging { pkru: 0, pkrs: 1 << 4, ..keys };
        assert_eq!(outcome(no_access, 0x1000, Access::Read), fault(0x1000, 0x21));
        assert_eq!(outcome(no_access, 0, Access::Read), Ok(()), "PKRS is for supervisor-mode pages");
    }

    #[test]
    fn thirty_two_bit_and_pae_tables_are_walked() {
        let memory = FakeMemory::new(0x10000);
        memory.write_u32(Gpa(0x1000 + 4), 0x40_0083);
        memory.write_u32(Gpa(0x1000), 0x2003);
        memory.write_u32(Gpa(0x2004), 0x7003);
        let legacy = Paging { cr4: CR4_PSE, efer: 0, ..LONG };
        assert_eq!(legacy.translate(&memory, 0x40_1234, Access::Read), Ok(Gpa(0x40_1234)));
        assert_eq!(legacy.translate(&memory, 0x1234, Access::Read), Ok(Gpa(0x7234)));
        memory.write_u64(Gpa(0x3020), 0x4001);
        memory.write_u64(Gpa(0x4000), 0x5003);
        memory.write_u64(Gpa(0x5008), 0x8003);
        let pae = Paging { cr3: 0x3020, efer: 0, ..LONG };
        assert_eq!(pae.translate(&memory, 0x1010, Access::Write), Ok(Gpa(0x8010)));
        assert_eq!(memory.read_u64(Gpa(0x3020)), 0x4001, "a PDPTE has no accessed flag");
    }

    #[test]
    fn an_operand_across_pages_is_written_whole_or_not_at_all() {
        let memory = tables();
        assert!(LONG.write(&memory, 0xffc, &[1; 8]).is_err());
        assert_eq!(memory.read_u32(Gpa(0x5ffc)), 0);
        let mut bytes = [9; 8];
        LONG.read(&memory, 0xffc, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
    }

    #[test]
    fn an_operand_at_the_end_of_the_address_space_goes_on_at_its_beginning() {
        let fault = Fault::Page { address: 0, error_code: 0 };
        let memory = tables();
        // The last PML4 entry leads to tables whose last page is mapped.
        for (at, entry) in [(0x1ff8, 0x8007), (0x8ff8, 0x9007), (0x9ff8, 0xa007), (0xaff8, 0xb007), (0x1000, 0)] {
            memory.write_u64(Gpa(at), entry);
        }
        let mut bytes = [9; 16];
        assert_eq!(LONG.read(&memory, u64::MAX - 7, &mut bytes), Err(fault));
        memory.write_u64(Gpa(0x1000), 0x2007);
        memory.write_u64(Gpa(0x5000), 7);
        LONG.read(&memory, u64::MAX - 7, &mut bytes).unwrap();
        assert_eq!(bytes[8..], [7, 0, 0, 0, 0, 0, 0, 0]);

        memory.write_u32(Gpa(0xcffc), 0x83);
        let legacy = Paging { cr3: 0xc000, cr4: CR4_PSE, efer: 0, ..LONG };
        assert_eq!(legacy.read(&memory, 0xffff_fff8, &mut bytes), Err(fault));
    }
}
