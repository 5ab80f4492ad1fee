//! `cargo l1hv image`.

use std::path::PathBuf;

use anyhow::Result;

use super::load::{GuestArgs, Image};
use crate::build;
use crate::layout::Layout;
use crate::linux::PC_ARGUMENTS;
use crate::machine::{Boot, Entry, Menu, Module};
use crate::progress::Progress;
use crate::provision;

/// Arguments of `image`. The ISO boots from CD and, copied to it as it is, from a USB stick, by a BIOS and by EFI
/// firmware.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The ISO, or the EFI application.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Make an EFI application instead, for EFI/BOOT/BOOTX64.EFI of a USB stick.
    #[arg(long)]
    efi: bool,
    #[command(flatten)]
    guest: GuestArgs,
    /// l1hv's command line.
    #[arg(long, value_name = "STRING", default_value = "")]
    hv_append: String,
    /// How long the menu waits before it boots its first entry, which is l1hv.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    menu: u32,
}

/// Makes the image.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let image = args.guest.open(PC_ARGUMENTS)?.map(Image::unnamed);
    let provisioned = provision::provision(layout, progress)?;
    let l1hv = build::l1hv(layout, progress)?;
    let host = |arguments: String| Module::with_args(&l1hv, arguments.trim());
    let entries = match image {
        None => {
            let boot = Boot::L1hv { host: host(format!("boot=disk {}", args.hv_append)), guest: Vec::new() };
            vec![Entry { title: "l1hv: below the first disk".to_owned(), boot }]
        }
        Some(image) => {
            let name = image.name();
            let under = Boot::L1hv { host: host(args.hv_append.clone()), guest: image.clone().modules() };
            vec![
                Entry { title: format!("l1hv: below {name}"), boot: under },
                Entry { title: format!("bare: {name} without l1hv"), boot: image.bare()? },
            ]
        }
    };
    let menu = Menu { seconds: args.menu, entries };
    if args.efi {
        menu.make_efi(&args.out, &provisioned.grub_mkstandalone)?;
    } else {
        menu.make(&args.out, &provisioned.grub_mkrescue)?;
    }
    println!("{}", args.out.display());
    Ok(0)
}
