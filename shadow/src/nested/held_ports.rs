//! The I/O ports that the host looks at, and the bitmaps that make accesses to them exit; [`super::ports`] says what
//! becomes of the exits.

use arrayvec::ArrayVec;

use crate::controls::Primary;
use crate::fields::*;
use crate::hw::VmcsAccess;
use crate::watch::{MergedBitmap, SLOTS};
use ept::Hpa;

/// The most ports that the host looks at.
pub const MOST_PORTS: usize = 12;

/// Ports of one bitmap.
pub(super) const PORTS_OF_A_BITMAP: u32 = 0x8000;

/// The ports, and the bitmaps of one processor.
#[derive(Debug)]
pub struct HeldPorts {
    pub(super) ports: ArrayVec<u16, MOST_PORTS>,
    /// The host's bitmaps.
    pub(super) host: [Hpa; 2],
    /// Merged ones, by the slots of the watched pages.
    pub(super) merged: [[MergedBitmap; SLOTS]; 2],
}

impl HeldPorts {
    /// The bitmaps at `host` have just the bits of `ports`.
    pub const fn new(ports: ArrayVec<u16, MOST_PORTS>, host: [Hpa; 2], merged: [[MergedBitmap; SLOTS]; 2]) -> Self {
        Self { ports, host, merged }
    }

    /// Makes accesses to these ports exit.
    pub fn intercept(ports: &[u16], bitmaps: [&mut [u8]; 2]) {
        for (number, bitmap) in bitmaps.into_iter().enumerate() {
            set_bits(ports, number, bitmap);
        }
    }
}

/// The places of ports in one of the bitmaps: byte and bit.
pub(super) fn bits(ports: &[u16], number: usize) -> impl Iterator<Item = (usize, u8)> {
    let of_this =
        ports.iter().map(|&port| u32::from(port)).filter(move |port| (port / PORTS_OF_A_BITMAP) as usize == number);
    of_this.map(|port| ((port % PORTS_OF_A_BITMAP / 8) as usize, 1 << (port % 8)))
}

/// Sets the bits of ports in one of the bitmaps.
pub(super) fn set_bits(ports: &[u16], number: usize, bitmap: &mut [u8]) {
    for (byte, bit) in bits(ports, number) {
        bitmap[byte] |= bit;
    }
}

/// What vmcs02 needs beside what VMCS12 has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bitmaps02 {
    pub(super) addresses: [Hpa; 2],
    /// The bitmaps are merged from VMCS12's, which may be written to at any time.
    pub are_merged: bool,
}

impl Bitmaps02 {
    /// Writes them to vmcs02, which has been merged.
    pub fn write(&self, vmcs02: &mut impl VmcsAccess) {
        vmcs02.write(IO_BITMAP_A, self.addresses[0].0);
        vmcs02.write(IO_BITMAP_B, self.addresses[1].0);
        if !self.are_merged {
            vmcs02.write(PRIMARY_CONTROLS, vmcs02.read(PRIMARY_CONTROLS) | Primary::USE_IO_BITMAPS);
        }
    }
}
