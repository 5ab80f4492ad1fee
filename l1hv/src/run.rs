//! Runs the guest.

use crate::boot_flow::HostSetup;
use crate::stop::stop_internal;

/// Takes over from the boot.
pub fn launch(setup: HostSetup) -> ! {
    log::info!("guest ready: {:x?}", setup.entry);
    stop_internal!("nothing runs the guest yet")
}
