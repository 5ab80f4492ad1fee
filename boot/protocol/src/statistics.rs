//! Statistics: CPUID with [`LEAF`] and [`SUBLEAF`] makes an l1hv with the option `stats` write them to its log. The
//! answer is that of any leaf that the processor does not have.

use core::fmt;

/// EAX: "l1hv" in ASCII, 6C316876H.
pub const LEAF: u32 = crate::SIGNATURE;

/// ECX.
pub const SUBLEAF: u32 = 1;

/// The beginning of each line.
pub const LINE_PREFIX: &str = "[l1hv STATS] ";

/// The beginning of the line with a checksum of l1hv's code and constants: the same each time, unless somebody has
/// changed the host's memory.
pub const CHECKSUM_PREFIX: &str = "[l1hv CHECKSUM] ";

/// The beginning of each line of a profile, which follows with the option `profile`: `FIELD READS WRITES GRANTED MOST`.
/// The last two are each one of `none`, `r`, `w` and `rw`.
pub const PROFILE_PREFIX: &str = "[l1hv PROFILE] ";

/// [`Row::reason`] of the sum of all reasons.
pub const TOTAL: &str = "total";

/// The names of a [`Row`]'s parts, for a heading line.
pub const HEADING: &str = "reason guest-hypervisor nested reflected";

/// Exits of one reason, as a line lists them after [`LINE_PREFIX`].
///
/// ```
/// use protocol::statistics::Row;
/// let row = Row { reason: "VM-entry failure", guest_hypervisor: 1, nested: 20, reflected: 19 };
/// assert_eq!(row.to_string(), "VM-entry failure 1 20 19");
/// assert_eq!(Row::parse("VM-entry failure 1 20 19"), Some(row));
/// assert_eq!(Row::parse(protocol::statistics::HEADING), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row<'a> {
    /// The basic exit reason's name, or [`TOTAL`].
    pub reason: &'a str,
    /// Exits of the guest hypervisor.
    pub guest_hypervisor: u64,
    /// Exits of nested guests.
    pub nested: u64,
    /// Exits of nested guests that were reflected to the guest hypervisor.
    pub reflected: u64,
}

impl<'a> Row<'a> {
    /// Reads a line without its prefix; `None` if it is no row.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.rsplitn(4, ' ');
        let mut number = || words.next()?.parse().ok();
        let (reflected, nested, guest_hypervisor) = (number()?, number()?, number()?);
        Some(Self { reason: words.next()?, guest_hypervisor, nested, reflected })
    }
}

impl fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { reason, guest_hypervisor, nested, reflected } = self;
        write!(f, "{reason} {guest_hypervisor} {nested} {reflected}")
    }
}
