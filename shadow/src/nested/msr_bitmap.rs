//! msr_bitmap02: an access exits if the guest hypervisor or the host intercepts it. The bitmap is merged again only
//! after a write ([`crate::watch`]).

use crate::controls::Primary;
use crate::fields::{MSR_BITMAP, PRIMARY_CONTROLS};
use crate::hw::GuestMemory;
use crate::msr::{BITMAP_BYTES, HOST_INTERCEPTS};
use ept::Gpa;

use super::machine::{Machine, WatchedMemory};
use super::vcpu::Vcpu;
use super::watching::watch;
use crate::watch::MergedAs;

/// Whether vmcs02's bitmap is up to date, or VMCS12 uses none.
#[inline]
pub fn is_merged<M: Machine>(vcpu: &Vcpu<M>) -> bool {
    let vmcs12 = &vcpu.vmx.vmcs12;
    !vmcs12.get(PRIMARY_CONTROLS).contains(Primary::USE_MSR_BITMAPS)
        || vcpu
            .memory
            .watches(MergedAs::MsrBitmap)
            .is_unchanged(vcpu.nested.msr_bitmap_slot, Gpa(vmcs12.get(MSR_BITMAP)))
}

/// Finds the merged bitmap, or merges and watches for the next change. The caller then gives vmcs02 the address of the
/// slot's bitmap.
pub fn merge<M: Machine>(vcpu: &mut Vcpu<M>) {
    let bitmap12 = Gpa(vcpu.vmx.vmcs12.get(MSR_BITMAP));
    vcpu.nested.msr_bitmap_slot = match vcpu.memory.watches(MergedAs::MsrBitmap).find(bitmap12) {
        Some(slot) => slot,
        None => {
            let slot = watch(vcpu, MergedAs::MsrBitmap, bitmap12);
            copy(&vcpu.memory, bitmap12, vcpu.nested.msr_bitmaps[slot].bytes);
            slot
        }
    };
}

fn copy(memory: &impl GuestMemory, bitmap12: Gpa, target: &mut [u8]) {
    memory.read(bitmap12, target);
    let (words, _) = target.as_chunks_mut::<{ size_of::<u64>() }>();
    for &(index, intercepts) in HOST_WORDS {
        let merged = u64::from_le_bytes(words[index]) | intercepts;
        words[index] = merged.to_le_bytes();
    }
}

/// The few words of the MSR bitmaps in which the host has an intercept.
const HOST_WORDS: &[(usize, u64)] = &host_words::<{ count_host_words() }>();

const fn host_word(index: usize) -> u64 {
    let mut word = 0;
    let mut byte = 0;
    while byte < 8 {
        word |= (HOST_INTERCEPTS[index * 8 + byte] as u64) << (8 * byte);
        byte += 1;
    }
    word
}

const fn count_host_words() -> usize {
    let mut count = 0;
    let mut index = 0;
    while index < BITMAP_BYTES / 8 {
        count += (host_word(index) != 0) as usize;
        index += 1;
    }
    count
}

const fn host_words<const COUNT: usize>() -> [(usize, u64); COUNT] {
    let mut words = [(0, 0); COUNT];
    let (mut index, mut used) = (0, 0);
    while index < BITMAP_BYTES / 8 {
        if host_word(index) != 0 {
            words[used] = (index, host_word(index));
            used += 1;
        }
        index += 1;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeMemory;

    #[test]
    fn a_bitmap_that_lets_everything_through_keeps_the_intercepts_of_the_host() {
        let (memory, mut merged) = (FakeMemory::new(0x3000), [0xff; BITMAP_BYTES]);
        copy(&memory, Gpa(0x1000), &mut merged);
        assert_eq!(merged, HOST_INTERCEPTS);
        memory.write(Gpa(0x1000), &[0xff; BITMAP_BYTES]);
        copy(&memory, Gpa(0x1000), &mut merged);
        assert_eq!(merged, [0xff; BITMAP_BYTES]);
    }
}
