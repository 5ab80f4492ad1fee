//! Nesting: entering a nested guest for its hypervisor, and giving that hypervisor the exits that are its own.
//!
//! ```text
//!   VMLAUNCH/VMRESUME -> enter: check -> merge into vmcs02 -> VM entry
//!   exit of vmcs02    -> exit:  route -> the host repairs and resumes, or
//!                        reflect: sync to vmcs12 -> vmcs12's host state into vmcs01
//! ```

mod enter;
mod exit;
mod injection;
mod msr_bitmap;
mod onward;
mod page_log;
mod paging;
mod reflect;
mod shadowing;
mod short;
mod trap;
mod virtualization_exception;
mod vm_function;
mod watching;

pub use enter::enter;
pub use exit::{handle, handle_failed_entry};
pub use injection::Displaced;
pub use onward::{Onward, release_linked, release_linked_region};
pub use paging::{drop_translations, make_room};
pub use reflect::{abort, nmi};
pub use shadowing::bind_current;
pub use short::resume;
pub use trap::{TrappedWrite, has_caught, spring};
pub use watching::drop_what_ept01_forbids;
