//! The heap, for collections of libraries: the hash tables of EPT02s. Each is made at boot, with all the memory that it
//! ever needs; no code allocates afterwards.
#![allow(unsafe_code, reason = "gives the allocator its memory")]

use linked_list_allocator::LockedHeap;

use super::HostPages;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// Gives the heap its memory, `pages`. Until then every allocation fails.
pub fn init(pages: HostPages) {
    let bytes = pages.into_bytes();
    // SAFETY: the memory is mapped and has no other user, now or later. Nothing calls this twice.
    unsafe { HEAP.lock().init(bytes.as_mut_ptr(), bytes.len()) };
}
