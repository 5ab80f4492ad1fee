//! Watched pages, whose content the host has merged, are read-only in EPT01, and so in every EPT02, until a write to
//! them ([`crate::watch`]).

use ept::Gpa;

use super::machine::{Invept, Machine, Protection, WatchedMemory};
use super::nested_ept::drop_translations;
use super::vcpu::Vcpu;
use crate::watch::MergedAs;

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
