//! Pages that the host has merged are read-only in EPT01, and so in every EPT02, until somebody writes to them ([`crate::watch`]).

use ept::map::set_rights;
use ept::{Gpa, PageSize, Rights};

use super::drop_translations;
use crate::arch::vmx::{Invept, invept};
use crate::hw::GuestPhysical;
use crate::vcpu::Vcpu;
use crate::watch::Watches;

/// Lets the guest hypervisor write to a page again: it is about to. Nothing happens if the page is not watched.
pub fn unwatch(vcpu: &mut Vcpu, address: Gpa) {
    let page = address.align_down(PageSize::Size4K);
    // A page may be watched as more than one thing.
    if vcpu.memory.all_watches().map(|watches| watches.remove(page)).contains(&true) {
        permit_writes(vcpu, page);
        invept(Invept::Global);
    }
}

/// Write-protects a page before it is read, so that no write is missed. A page that cannot be protected is merged at every entry. Returns
/// its slot.
#[cold]
pub fn watch(vcpu: &mut Vcpu, watches: impl Fn(&GuestPhysical) -> &Watches, page: Gpa) -> usize {
    let (slot, loser) = watches(&vcpu.memory).assign(page);
    if let Some(loser) = loser
        && !vcpu.memory.all_watches().iter().any(|watches| watches.contains(loser))
    {
        permit_writes(vcpu, loser);
    }
    let protectable = !vcpu.memory.is_host(page);
    if protectable && set_rights(&mut vcpu.tables, vcpu.ept01, page.0, Rights::READ.or(Rights::EXECUTE)).is_ok() {
        // What EPT02s have of the page may still be writable.
        drop_translations(vcpu, None);
        invept(Invept::Global);
    } else {
        watches(&vcpu.memory).remove(page);
    }
    slot
}

fn permit_writes(vcpu: &mut Vcpu, page: Gpa) {
    // The page is mapped by a table of its own since it was watched, so there is nothing to split.
    let _ = set_rights(&mut vcpu.tables, vcpu.ept01, page.0, Rights::ALL);
}
