//! Addresses of the three address spaces, one type each, so that they cannot be mixed up:
//!
//! ```compile_fail,E0308
//! # use ept::{Eptp01, NestedGpa, map::{Mapping, lookup}, table::TableMemory};
//! fn lookup_by_the_wrong_tables(tables: &impl TableMemory, ept01: Eptp01, address: NestedGpa) -> Option<Mapping> {
//!     lookup(tables, ept01, address)
//! }
//! ```

use core::fmt;
use core::ops::Add;

/// An address of one of the three address spaces: [`Hpa`], [`Gpa`], [`NestedGpa`].
pub trait Address: Copy + Ord + fmt::Debug + Add<u64, Output = Self> + sealed::Sealed {
    /// The address with this number.
    fn from_raw(raw: u64) -> Self;

    /// Its number.
    fn raw(self) -> u64;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The first byte of the page of size `size` that holds this address.
            pub const fn align_down(self, size: PageSize) -> Self {
                Self(self.0 & !(size.bytes() - 1))
            }

            /// Offset in bytes within a page of size `size`.
            pub const fn offset_in(self, size: PageSize) -> u64 {
                self.0 & (size.bytes() - 1)
            }

            /// The address `bytes` further on; `None` beyond 2^64.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Whether this is the first byte of a page of size `size`.
            pub const fn is_aligned(self, size: PageSize) -> bool {
                self.offset_in(size) == 0
            }
        }

        impl Add<u64> for $name {
            type Output = Self;

            /// # Panics
            ///
            /// The sum does not fit 64 bits, and the build has overflow checks. Other builds wrap, as all of Rust's
            /// arithmetic does: use [`Self::checked_add`] where a guest chooses the summands.
            #[inline]
            fn add(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }
        }

        impl Address for $name {
            #[inline]
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }

            #[inline]
            fn raw(self) -> u64 {
                self.0
            }
        }

        impl sealed::Sealed for $name {}

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// Host-physical address, as on the processor's memory bus.
    Hpa, "hpa"
}
address! {
    /// Guest-physical address of the guest hypervisor; EPT01 translates it to an [`Hpa`].
    Gpa, "gpa"
}
address! {
    /// Guest-physical address of a nested guest; EPT12 translates it to a [`Gpa`].
    NestedGpa, "ngpa"
}

/// The page sizes of 4- and 5-level EPT.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageSize {
    /// 4 KiB, mapped by a page table.
    Size4K,
    /// 2 MiB, mapped by a page directory.
    Size2M,
    /// 1 GiB, mapped by a page-directory-pointer table.
    Size1G,
}

impl PageSize {
    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Base-2 logarithm of the size in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }
}
