//! Watched pages, whose content the host has merged, are read-only in EPT01, and so in every EPT02, until a write to
//! them ([`crate::watch`]).

use crate::hw::GuestMemory;
use ept::{Gpa, Hpa};

use super::machine::{Invept, Machine, Protection, WatchedMemory};
use super::nested_ept::drop_translations;
use super::vcpu::Vcpu;
use crate::watch::{MergedAs, MergedBitmap, SLOTS};

/// The bitmap of the host's among `copies` that is merged from one of the guest hypervisor: found, or merged now and
/// watched for the next change. `add_host` sets the bits that the host adds to the copy.
pub fn merged<M: Machine>(
    vcpu: &mut Vcpu<M>,
    kind: MergedAs,
    bitmap12: Gpa,
    copies: &mut [MergedBitmap; SLOTS],
    add_host: impl FnOnce(&mut [u8]),
) -> Hpa {
    let found = vcpu.memory.watches(kind).find(bitmap12);
    let slot = found.unwrap_or_else(|| watch(vcpu, kind, bitmap12));
    let copy = &mut copies[slot];
    if found.is_none() {
        vcpu.memory.read(bitmap12, copy.bytes);
        add_host(copy.bytes);
    }
    copy.address
}

/// Write-protects a page before it is read, so that no write is missed. A page that cannot be protected is merged at
/// every entry. Returns its slot.
#[cold]
pub fn watch<M: Machine>(vcpu: &mut Vcpu<M>, kind: MergedAs, page: Gpa) -> usize {
    let (machine, watches) = (&vcpu.machine, vcpu.memory.watches(kind));
    let has_ended = |flush| machine.all_have_flushed(flush);
    if let Some(slot) = watches.find_awaited(page) {
        watches.look_for_flush(slot, has_ended);
        return slot;
    }
    let wanted = !vcpu.memory.is_host(page) && watches.is_worthwhile();
    let (slot, protection) = machine.protect(&mut vcpu.tables, watches, page, wanted);
    let flush = match protection {
        Protection::Impossible => {
            watches.abandon(slot);
            return slot;
        }
        Protection::Already(flush) => flush,
        Protection::New(flush) => {
            drop_what_ept01_forbids(vcpu, flush);
            flush
        }
    };
    let machine = &vcpu.machine;
    vcpu.memory.watches(kind).await_flush(slot, flush, |flush| machine.all_have_flushed(flush));
    slot
}

/// Called when EPT01 permits less than before: drops the translations derived from it, in EPT02s and in the processor's
/// caches.
pub fn drop_what_ept01_forbids<M: Machine>(vcpu: &mut Vcpu<M>, flush: u64) {
    drop_translations(vcpu, None);
    vcpu.machine.invept(Invept::Global);
    vcpu.machine.note_flush(flush);
}
