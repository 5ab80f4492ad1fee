//! `cargo l1hv bench-image`.

use std::path::PathBuf;

use anyhow::Result;

use crate::bench::image::{self, Image};
use crate::build;
use crate::layout::Layout;
use crate::progress::Progress;
use crate::provision;

/// Arguments of `bench-image`. The image boots from USB and CD by a BIOS; results come on the screen and on COM1.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The ISO.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Debian kernel series of every Linux.
    #[arg(long, default_value = "6.1")]
    series: String,
    /// How long the menu waits before it boots its first entry, which is l1hv.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    menu: u32,
    /// How long the results stay before the machine is switched off.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    linger: u32,
}

/// Makes the image.
pub fn run(args: &Args, layout: &Layout, progress: &Progress) -> Result<u8> {
    let provisioned = provision::provision(layout, progress)?;
    let programs = build::guest_programs(layout, progress)?;
    let l1hv = build::l1hv(layout, progress)?;
    let image = Image { series: &args.series, menu_seconds: args.menu, linger_seconds: args.linger };
    image::make(&image, &args.out, layout, &provisioned, &programs, &l1hv)?;
    println!("{}", args.out.display());
    Ok(0)
}
