//! The benchmark as an ISO that needs no runner: a menu with the systems. Results appear on the screen and on COM1.

use std::path::Path;

use anyhow::Result;

use super::System;
use crate::build::GuestPrograms;
use crate::guest::{KvmEpt, Plan, Shown};
use crate::layout::Layout;
use crate::linux::PC_ARGUMENTS;
use crate::machine::{Entry, Menu, Module};
use crate::provision::Provisioned;

/// The settings of the image.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    /// Debian kernel series of every Linux.
    pub series: &'a str,
    /// How long the menu waits for a choice.
    pub menu_seconds: u32,
    /// How long the results stay.
    pub linger_seconds: u32,
}

/// Systems, the menu's first one first.
const SYSTEMS: [System; 3] = [System::L1hv, System::Bare, System::Kvm];

/// Writes the image to `out`.
///
/// # Errors
/// When a file cannot be read or written, or GRUB's tools fail.
pub fn make(
    image: &Image<'_>,
    out: &Path,
    layout: &Layout,
    provisioned: &Provisioned,
    programs: &GuestPrograms,
    l1hv: &Path,
) -> Result<()> {
    let &Image { series, menu_seconds, linger_seconds } = image;
    let mut entries = Vec::new();
    for system in SYSTEMS {
        let name = system.to_string();
        let shown = Some(Shown { system: &name, linger_seconds });
        let plan = Plan { shown, ..Plan::new(provisioned.kernel(series)?, system.payload(), KvmEpt::On) };
        let guest = plan.prepare_with(layout, provisioned, programs, PC_ARGUMENTS)?;
        let title = match system {
            System::L1hv => format!("l1hv: below Linux {series} KVM"),
            System::Bare => format!("bare: Linux {series} KVM is the only hypervisor"),
            System::Kvm => format!("kvm: Linux {series} KVM below Linux {series} KVM"),
        };
        let boot = match system {
            System::L1hv => guest.under(Module::new(l1hv)),
            System::Bare | System::Kvm => guest.on_bare_machine(),
        };
        entries.push(Entry { title, boot });
    }
    Menu { seconds: menu_seconds, entries }.make(out, &provisioned.grub_mkrescue)
}
