//! Pages that the host has merged are read-only in EPT01, and so in every EPT02, until somebody writes to them ([`crate::watch`]).

use ept::Gpa;

use super::drop_translations;
use crate::arch::vmx::{Invept, invept};
use crate::hw::GuestPhysical;
use crate::processor;
use crate::vcpu::Vcpu;
use crate::watch::{Watches, is_watched};

/// Write-protects a page before it is read, so that no write is missed. A page that cannot be protected is merged at every entry. Returns
/// its slot.
#[cold]
pub fn watch(vcpu: &mut Vcpu, watches: impl Fn(&GuestPhysical) -> &Watches, page: Gpa) -> usize {
    let own = watches(&vcpu.memory);
    if let Some(slot) = own.find_awaited(page) {
        own.look_for_flush(slot);
        return slot;
    }
    let protectable = !vcpu.memory.is_host(page) && own.is_worthwhile();
    let writer = vcpu.ept01.writer();
    let was_protected = vcpu.ept01.is_protected(page);
    let (slot, loser) = own.assign(page);
    if let Some(loser) = loser
        && !is_watched(loser)
    {
        writer.permit_writes(loser);
    }
    if !protectable || !was_protected && writer.protect(&mut vcpu.tables, page).is_err() {
        own.abandon(slot);
        return slot;
    }
    // What protected it first has asked for a flush already.
    let flush = if was_protected { processor::last_flush() } else { vcpu.processor.request_flush_of_others() };
    drop(writer);
    if !was_protected {
        drop_what_ept01_forbids(vcpu, flush);
    }
    watches(&vcpu.memory).await_flush(slot, flush);
    slot
}

/// EPT01 permits less than before: what the processor has of it goes, in EPT02s and in its own caches.
pub fn drop_what_ept01_forbids(vcpu: &mut Vcpu, flush: u64) {
    drop_translations(vcpu, None);
    invept(Invept::Global);
    vcpu.processor.note_flush(flush);
}
