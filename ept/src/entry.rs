//! An EPT entry (SDM 29.3.2 "EPT Translation Mechanism", Tables 29-1 to 29-7).

use core::marker::PhantomData;

use crate::addr::Address;
use crate::{Hpa, PageSize};

/// Access rights, each at its bit of an entry: bits 2:0, and bit 10 with mode-based execute control.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rights(u64);

impl Rights {
    /// No access.
    pub const NONE: Self = Self(0);
    /// Data reads.
    pub const READ: Self = Self(1);
    /// Data writes.
    pub const WRITE: Self = Self(2);
    /// Instruction fetches; with mode-based execute control, only those from supervisor-mode linear addresses.
    pub const EXECUTE: Self = Self(4);
    /// Fetches from user-mode linear addresses, with mode-based execute control.
    pub const USER_EXECUTE: Self = Self(1 << 10);
    /// Reads, writes and fetches.
    pub const ALL: Self = Self(7);

    /// The rights in bits 2:0 of an exit qualification or of an entry; other bits are dropped.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits & 7)
    }

    /// The rights as bits of an entry.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Rights in both sets.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Rights in either set.
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// These rights without some others.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of `other` are among these.
    pub const fn contain(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Whether mode-based execute control for EPT is on, represented as the set of rights that an entry can then grant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExecuteControl(Rights);

impl ExecuteControl {
    /// Bit 2 of an entry decides for all; bit 10 is ignored.
    pub const UNIFORM: Self = Self(Rights::ALL);
    /// Bit 2 decides for supervisor-mode linear addresses, bit 10 for user-mode ones.
    pub const BY_MODE: Self = Self(Rights::ALL.or(Rights::USER_EXECUTE));

    /// All rights that an entry can grant.
    pub const fn all(self) -> Rights {
        self.0
    }

    /// Converts rights of a table without mode-based execute control: the right to fetch becomes the right in both
    /// modes.
    pub const fn widen(self, uniform: Rights) -> Rights {
        const TO_USER: u32 = Rights::USER_EXECUTE.0.trailing_zeros() - Rights::EXECUTE.0.trailing_zeros();
        Rights(uniform.0 | uniform.0 << TO_USER & Rights::USER_EXECUTE.0 & self.0.0)
    }
}

/// An EPT memory type: bits 5:3 of a leaf. Values 2, 3 and 7 are reserved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryType(pub u8);

impl MemoryType {
    /// Uncacheable.
    pub const UNCACHEABLE: Self = Self(0);
    /// Write-combining.
    pub const WRITE_COMBINING: Self = Self(1);
    /// Write-through.
    pub const WRITE_THROUGH: Self = Self(4);
    /// Write-protected.
    pub const WRITE_PROTECTED: Self = Self(5);
    /// Write-back.
    pub const WRITE_BACK: Self = Self(6);

    /// Whether the SDM defines the memory type.
    pub const fn is_defined(self) -> bool {
        matches!(self.0, 0 | 1 | 4 | 5 | 6)
    }
}

/// How accesses to a page are cached: bits 6:3 of a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caching(u64);

impl Caching {
    const MASK: u64 = 0x78;
    const IGNORE_PAT: u64 = 1 << 6;

    /// Caching by a memory type, combined with the guest's PAT.
    pub const fn new(memory_type: MemoryType) -> Self {
        Self((memory_type.0 as u64 & 7) << 3)
    }

    /// Caching by the memory type alone, whatever the guest's PAT says.
    pub const fn ignoring_pat(self) -> Self {
        Self(self.0 | Self::IGNORE_PAT)
    }

    /// The memory type.
    pub const fn memory_type(self) -> MemoryType {
        MemoryType((self.0 >> 3 & 7) as u8)
    }

    /// Whether the memory type is final.
    pub const fn ignores_pat(self) -> bool {
        self.0 & Self::IGNORE_PAT != 0
    }
}

/// The accessed flag, if the EPTP enables accessed and dirty flags.
pub const ACCESSED: u64 = 1 << 8;
/// The dirty flag, likewise; leaves only.
pub const DIRTY: u64 = 1 << 9;
/// Suppress #VE: an EPT violation that this entry ends causes a VM exit even with "EPT-violation #VE".
pub const SUPPRESS_VE: u64 = 1 << 63;
/// Bits that have a meaning only under controls that are not offered, and that the processor ignores without them:
/// verify guest paging, paging-write access, supervisor shadow stack, sub-page write permissions (SDM 29.3.2 "EPT
/// Translation Mechanism"). EPT02 has none of these bits.
pub const IGNORED: u64 = 1 << 57 | 1 << 58 | 1 << 60 | 1 << 61;

/// An entry of any level, in tables that lead to addresses of `T`: by default of the host's own tables. Every 64-bit
/// value is representable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Entry<T = Hpa>(u64, PhantomData<T>);

impl<T: Address> Entry<T> {
    /// An entry that maps nothing.
    pub const NOT_PRESENT: Self = Self::from_bits(0);

    const LARGE: u64 = 1 << 7;
    /// Bits 6:3: memory type and ignore-PAT of a leaf; reserved in a pointer to a table.
    const LOW_OF_TABLE: u64 = Caching::MASK;
    const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;

    /// The entry of this word in memory.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits, PhantomData)
    }

    /// The entry as a word in memory.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// A pointer to a table that restricts nothing, with or without mode-based execute control.
    #[inline]
    pub fn table(table: T) -> Self {
        Self::from_bits(table.raw() & Self::ADDRESS | ExecuteControl::BY_MODE.all().0)
    }

    /// An entry that maps a page.
    #[inline]
    pub fn leaf(page: T, size: PageSize, rights: Rights, caching: Caching) -> Self {
        let large = if matches!(size, PageSize::Size4K) { 0 } else { Self::LARGE };
        Self::from_bits(page.raw() & Self::ADDRESS & !(size.bytes() - 1) | large | caching.0 | rights.0)
    }

    /// The address of the table or page.
    #[inline]
    pub fn address(self) -> T {
        T::from_raw(self.0 & Self::ADDRESS)
    }

    /// Its rights.
    pub const fn rights(self, execute: ExecuteControl) -> Rights {
        Rights(self.0 & execute.all().0)
    }

    /// Whether a violation at this entry always causes a VM exit, never #VE.
    pub const fn suppresses_ve(self) -> bool {
        self.0 & SUPPRESS_VE != 0
    }

    /// Whether it maps a page: always at level 1, by bit 7 at levels 2 and 3.
    pub const fn is_leaf(self, level: u32) -> bool {
        level == 1 || matches!(level, 2 | 3) && self.0 & Self::LARGE != 0
    }

    /// How a leaf's page is cached.
    pub const fn caching(self) -> Caching {
        Caching(self.0 & Caching::MASK)
    }

    /// Whether the accessed flag is set.
    pub const fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// Whether the dirty flag is set.
    pub const fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// Whether the processor reports this entry, met at `level`, as an EPT misconfiguration (SDM 29.3.3.1 "EPT
    /// Misconfigurations"). An entry that is not present is never one.
    pub const fn is_misconfigured(self, level: u32, features: &Features, execute: ExecuteControl) -> bool {
        let rights = self.rights(execute);
        if rights.0 == 0 {
            return false;
        }
        let readable = rights.contain(Rights::READ);
        let write_without_read = rights.contain(Rights::WRITE) && !readable;
        // The entry grants fetches of one or both kinds, and nothing else.
        let execute_only = !readable && !features.execute_only;
        let reserved = self.0 & self.reserved(level, features) != 0;
        let bad_type = self.is_leaf(level) && !self.caching().memory_type().is_defined();
        write_without_read || execute_only || reserved || bad_type
    }

    /// Whether this entry, met above level 1, points to a table and restricts nothing: it grants all rights and sets no
    /// bit that any processor reserves. This quick test settles most entries; the others need
    /// [`Self::is_misconfigured`] and [`Self::rights`].
    #[inline(always)]
    pub const fn is_open_table(self, features: &Features, execute: ExecuteControl) -> bool {
        let all = execute.all().0;
        self.0 & (all | Self::LOW_OF_TABLE | Self::LARGE | Self::beyond(features)) == all
    }

    const fn reserved(self, level: u32, features: &Features) -> u64 {
        let leaf = self.is_leaf(level);
        let by_level = match level {
            1 => 0,
            2 | 3 if leaf => (1 << (12 + 9 * (level - 1))) - 0x1000,
            2 | 3 => Self::LOW_OF_TABLE,
            _ => Self::LOW_OF_TABLE | Self::LARGE,
        };
        let no_1g = if level == 3 && leaf && !features.page_1g { Self::LARGE } else { 0 };
        let no_2m = if level == 2 && leaf && !features.page_2m { Self::LARGE } else { 0 };
        Self::beyond(features) | by_level | no_1g | no_2m
    }

    /// Address bits that the processor does not have.
    const fn beyond(features: &Features) -> u64 {
        Self::ADDRESS & !((1 << features.physical_bits) - 1)
    }
}

/// Entries of the host's own tables.
impl Entry<Hpa> {
    /// Marks a pointer that was unlinked and keeps its address. For the processor such an entry is not present.
    const UNLINKED: u64 = 1 << 62;

    /// Whether any right is granted: bit 10 is a right or 0 here.
    pub const fn is_present(self) -> bool {
        self.0 & ExecuteControl::BY_MODE.all().0 != 0
    }

    /// The same entry with other rights.
    pub const fn with_rights(self, rights: Rights) -> Self {
        Self::from_bits(self.0 & !ExecuteControl::BY_MODE.all().0 | rights.0)
    }

    /// The same entry with the accessed and dirty flags set.
    pub const fn with_dirty(self) -> Self {
        Self::from_bits(self.0 | ACCESSED | DIRTY)
    }

    /// This pointer to a table, unlinked: the processor does not follow it until the host has checked the table. The
    /// address is inverted, because a processor with L1 terminal fault reads at the address of an entry that is not
    /// present, in speculation.
    pub const fn unlinked(self) -> Self {
        Self::from_bits(!self.table_address().0 & Self::ADDRESS | Self::UNLINKED)
    }

    /// The address of the table that this points to, for the processor or for the host alone.
    #[inline]
    pub const fn table_address(self) -> Hpa {
        let bits = if self.is_unlinked() { !self.0 } else { self.0 };
        Hpa(bits & Self::ADDRESS)
    }

    /// Whether this is an unlinked pointer.
    pub const fn is_unlinked(self) -> bool {
        self.0 & Self::UNLINKED != 0
    }

    /// Whether it points to another table, for the processor or for the host alone.
    pub const fn links_table(self, level: u32) -> bool {
        level > 1 && (self.is_present() || self.is_unlinked()) && !self.is_leaf(level)
    }
}

/// The EPT features of a processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// Physical-address width.
    pub physical_bits: u32,
    /// Execute-only translations.
    pub execute_only: bool,
    /// 2-MiB pages.
    pub page_2m: bool,
    /// 1-GiB pages.
    pub page_1g: bool,
    /// The processor's EPT violations say whether the linear address is a user-mode address.
    pub advanced_violation: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub const FEATURES: Features =
        Features { physical_bits: 40, execute_only: false, page_2m: true, page_1g: false, advanced_violation: false };

    #[test]
    fn an_open_table_restricts_nothing_and_is_no_misconfiguration() {
        for execute in [ExecuteControl::UNIFORM, ExecuteControl::BY_MODE] {
            for (level, bit) in (2..=5).flat_map(|level| (0..64).map(move |bit| (level, bit))) {
                let entry = Entry::<Hpa>::from_bits(0x5000 | execute.all().0 ^ 1 << bit);
                let expected = entry.rights(execute) == execute.all()
                    && !entry.is_leaf(level)
                    && !entry.is_misconfigured(level, &FEATURES, execute);
                // Bit 7 is reserved in an entry above level 3; at the other levels it makes a leaf.
                assert_eq!(entry.is_open_table(&FEATURES, execute), expected, "{execute:?}, level {level}, bit {bit}");
            }
        }
    }

    #[test]
    fn an_unlinked_pointer_hides_the_address_of_its_table_and_keeps_it() {
        let table = Entry::table(Hpa(0x1234_5000));
        for unlinked in [table.unlinked(), table.unlinked().unlinked()] {
            assert!(!unlinked.is_present() && unlinked.is_unlinked() && unlinked.links_table(2));
            assert_eq!((unlinked.table_address(), table.table_address()), (Hpa(0x1234_5000), Hpa(0x1234_5000)));
            assert_eq!(unlinked.address().0 & 0x1234_5000, 0, "no speculation reads the table");
        }
    }

    #[test]
    fn a_leaf_comes_apart_again() {
        let leaf = Entry::leaf(
            Hpa(0x4020_0000),
            PageSize::Size2M,
            Rights::ALL,
            Caching::new(MemoryType::WRITE_BACK).ignoring_pat(),
        );
        assert_eq!(leaf.bits(), 0x4020_00f7);
        assert!(leaf.is_leaf(2) && leaf.is_leaf(1) && !leaf.is_leaf(4));
        assert_eq!((leaf.address(), leaf.caching().memory_type()), (Hpa(0x4020_0000), MemoryType::WRITE_BACK));
        assert!(leaf.caching().ignores_pat());
    }

    #[test]
    fn misconfigurations_are_those_of_the_sdm() {
        let cases = [
            ("write without read", 0x2, 1, true),
            ("write and execute without read", 0x6, 4, true),
            ("execute-only, not supported", 0x1034, 1, true),
            ("read-only page", 0x1031, 1, false),
            ("memory type 2", 0x1011, 1, true),
            ("memory type is not one of a table", 0x1011, 2, true),
            ("table", 0x1007, 4, false),
            ("PML4E with bit 7", 0x1087, 4, true),
            ("PML5E with bit 7", 0x1087, 5, true),
            ("1-GiB page, not supported", 0x4000_00b7, 3, true),
            ("2-MiB page", 0x20_00b7, 2, false),
            ("2-MiB page with bit 12", 0x20_10b7, 2, true),
            ("beyond the physical-address width", 1 << 40 | 0x37, 1, true),
            ("not present, whatever else", 0xffff_ffff_ffff_fff8, 1, false),
            ("ignored bits", 0xfff0_0000_0000_1837, 1, false),
        ];
        for (name, bits, level, expected) in cases {
            assert_eq!(
                Entry::<Hpa>::from_bits(bits).is_misconfigured(level, &FEATURES, ExecuteControl::UNIFORM),
                expected,
                "{name}"
            );
        }
        let is_misconfigured = |bits, level, features| {
            Entry::<Hpa>::from_bits(bits).is_misconfigured(level, &features, ExecuteControl::UNIFORM)
        };
        assert!(!is_misconfigured(0x1034, 1, Features { execute_only: true, ..FEATURES }));
        assert!(!is_misconfigured(0x4000_00b7, 3, Features { page_1g: true, ..FEATURES }));
    }

    #[test]
    fn with_control_by_mode_bit_10_is_a_right_that_needs_what_the_other_needs() {
        let user_only = Entry::<Hpa>::from_bits(0x1430);
        assert!(!user_only.is_misconfigured(1, &FEATURES, ExecuteControl::UNIFORM), "bit 10 is ignored: not present");
        assert!(user_only.is_misconfigured(1, &FEATURES, ExecuteControl::BY_MODE));
        let execute_only = Features { execute_only: true, ..FEATURES };
        assert!(!user_only.is_misconfigured(1, &execute_only, ExecuteControl::BY_MODE));
        assert!(
            Entry::<Hpa>::from_bits(0x1432).is_misconfigured(1, &execute_only, ExecuteControl::BY_MODE),
            "write without read"
        );
        assert_eq!(user_only.rights(ExecuteControl::BY_MODE), Rights::USER_EXECUTE);
        let widened = ExecuteControl::BY_MODE.widen(Rights::ALL);
        assert_eq!((widened, ExecuteControl::UNIFORM.widen(Rights::ALL)), (ExecuteControl::BY_MODE.all(), Rights::ALL));
    }
}
