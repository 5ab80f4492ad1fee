//! The mark that our Bochs knows: `XCHG BX, BX` with [`SIGNATURE`] in RCX and a name in RAX and RDX.
//!
//! No hypervisor can intercept it, so that it works at every level and in user mode. See
//! `machines/bochs/0103-counters.patch`.

/// `L1HVMARK` in RCX.
pub const SIGNATURE: u64 = u64::from_le_bytes(*b"L1HVMARK");

/// The first 16 bytes of `name`, for RAX and RDX.
pub fn words(name: &[u8]) -> (u64, u64) {
    let mut bytes = [0; 16];
    for (slot, byte) in bytes.iter_mut().zip(name) {
        *slot = *byte;
    }
    let [low, high] = [0, 8].map(|at| {
        let word = &bytes[at..at + 8];
        word.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
    });
    (low, high)
}
